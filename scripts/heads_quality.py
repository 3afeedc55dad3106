"""Accuracy of heads: against plain LogisticRegression, of views, and of cheap changes.

For bench_heads.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import ExtractConfig, FinetuneConfig, StageColumns, TrainHeadConfig
from featcache.heads import train_head
from featcache.heads.selection import InMemoryData, assign_parts, load_data, same_rows
from featcache.heads.train import run_protocol
from featcache.heads.training_data import Rows, TestSplit, load_rows
from featcache.results.metrics import mcnemar, top1
from featcache.runtime import say
from heads_stream import make_cache

SOLVERS = ("logistic", "ridge", "knn", "auto")
SEEDS = 5
TEST_SHARE = 0.3
RANDOM_FEATURES = 4000
WISE = "weights halfway to the fine-tuned ones"

Split = tuple[Any, Any]


def table(folders: tuple[Path, ...], work_dir: Path) -> dict[str, Any]:
    """Test accuracy of each solver, settings chosen on train, against scikit-learn's default.

    scikit-learn's bundled datasets are split five times; a folder has its own test split. The
    p value is McNemar's, over the test rows of all splits.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for dataset, splits in [*bundled_datasets(), *folder_features(folders, Path(name))]:
            rows.append(compare(dataset, splits, Path(name)))
            say(table_line(rows[-1]))
    header = "| dataset | rows, width, classes | LogisticRegression | " + " | ".join(SOLVERS)
    lines = [f"{header} | p (logistic) |", "| --- " * (4 + len(SOLVERS)) + "|"]
    return {"rows": rows, "summary": [*lines, *map(table_line, rows)]}


def compare(dataset: str, splits: list[dict[str, Split]], folder: Path) -> dict[str, Any]:
    """One dataset's row."""
    from sklearn.linear_model import LogisticRegression

    right: dict[str, list[Any]] = {name: [] for name in ("plain", *SOLVERS)}
    for number, split in enumerate(splits):
        (X, y), (Z, t) = split["train"], split["test"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged within 1,000 steps: that is "plain"
            plain = LogisticRegression(max_iter=1000).fit(X, y)
        right["plain"].append(plain.predict(Z) == t)
        cache = folder / f"{dataset}-{number}.h5"
        make_cache(cache, split, int(max(y.max(), t.max())) + 1)
        for solver in SOLVERS:
            output = folder / f"{dataset}-{number}-{solver}.safetensors"
            train_head(TrainHeadConfig(cache=cache, solver=solver, output=output))
            right[solver].append(predictions(output, Z) == t)
    scores = {name: float(np.mean(np.concatenate(parts))) for name, parts in right.items()}
    p = mcnemar(np.concatenate(right["logistic"]), np.concatenate(right["plain"]))
    shape = (len(y) + len(t), X.shape[1], int(y.max()) + 1)
    return {"dataset": dataset, "shape": shape, "scores": scores, "p": p}


def predictions(head: Path, features: Any) -> Any:
    """What a saved head says."""
    from featcache.heads import load_head

    return load_head(head).predict(features)


def table_line(row: dict[str, Any]) -> str:
    """One dataset as a line of a Markdown table."""
    num_rows, dim, num_classes = row["shape"]
    scores = " | ".join(f"{row['scores'][name]:.4f}" for name in ("plain", *SOLVERS))
    shape = f"{num_rows:,}, {dim}, {num_classes}"
    return f"| {row['dataset']} | {shape} | {scores} | {row['p']:.2f} |"


def bundled_datasets() -> Iterator[tuple[str, list[dict[str, Split]]]]:
    """scikit-learn's own small datasets, raw, each split five times."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    for name in ("digits", "wine", "breast_cancer", "iris"):
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        splits = []
        for seed in range(SEEDS):
            train, test = train_test_split(
                np.arange(len(y)), test_size=TEST_SHARE, random_state=seed, stratify=y
            )
            data = X.astype(np.float32)
            splits.append({"train": (data[train], y[train]), "test": (data[test], y[test])})
        yield name, splits


def folder_features(
    folders: tuple[Path, ...], work_dir: Path
) -> Iterator[tuple[str, list[dict[str, Split]]]]:
    """Features of image folders by the bundled weights, with the folder's own test split."""
    from featcache.extract import extract

    for folder in folders:
        path = work_dir / f"{folder.name}.h5"
        extract(ExtractConfig(dataset=str(folder), weights="bundled", output=path))
        cache = FeatureCache(path)
        split = {}
        for name in ("train", "test"):
            X, y = cache.split(name)
            split[name] = (np.asarray(X), y)
        yield folder.name, [split]


def views(folder: Path, work_dir: Path) -> dict[str, Any]:
    """Heads on no, flipped and random views of one folder: accuracy, seconds, megabytes."""
    from featcache.extract import extract

    rows = []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for kind in ("none", "flip", "4", "8"):
            path = Path(name) / f"views-{kind}.h5"
            start = time.perf_counter()
            extract(ExtractConfig(dataset=str(folder), weights="bundled", views=kind, output=path))
            row = {
                "views": kind, "extract_seconds": time.perf_counter() - start,
                "megabytes": path.stat().st_size / 1e6, **fit_views(path, kind),
            }  # fmt: skip
            rows.append(row)
            say(views_line(row))
    header = "| views | extraction | file | logistic | its fit | with --tta | adam | with --tta |"
    return {"rows": rows, "summary": [header, "| --- " * 8 + "|", *map(views_line, rows)]}


def fit_views(path: Path, kind: str) -> dict[str, Any]:
    """Test accuracy of both solvers on one cache, with view 0 and averaged over the views."""
    found: dict[str, Any] = {}
    for solver in ("logistic", "adam"):
        for tta in (False, True):
            if tta and kind == "none":
                continue
            config = TrainHeadConfig(
                cache=path, solver=solver, tta=tta, epochs=10, cache_dir=path.parent
            )  # fmt: skip
            report = train_head(config)
            found[f"{solver}{'_tta' if tta else ''}"] = report["test_top1"]
            if not tta:
                found[f"{solver}_seconds"] = report["fit_seconds"]
    return found


def views_line(row: dict[str, Any]) -> str:
    """One kind of views as a line of a Markdown table."""

    def score(name: str) -> str:
        return f"{row[name]:.3f}" if name in row else ""

    return (
        f"| {row['views']} | {row['extract_seconds']:.0f} s | {row['megabytes']:.0f} MB "
        f"| {score('logistic')} | {row['logistic_seconds']:.2f} s | {score('logistic_tta')} "
        f"| {score('adam')} | {score('adam_tta')} |"
    )


def gains(datasets: tuple[str, ...], work_dir: Path, wise_seeds: int) -> dict[str, Any]:
    """What each cheap change adds to a head on all stages, on held-out train rows and on test.

    A fifth of train is held out by each seed; the rest chooses settings and is fitted, as
    train-head does. A change wins on a dataset where it adds more than two standard errors.

    Args:
        datasets: As bench_answer.py takes them.
        work_dir: Where caches and models go while they are needed.
        wise_seeds: Fine-tuning runs for each dataset, to average their weights with the start's.
    """
    rows = []
    for dataset in datasets:
        with tempfile.TemporaryDirectory(dir=work_dir) as name:
            found = dataset_gains(dataset, Path(name), wise_seeds)
        for row in found:
            say(gains_line(row))
        rows += found
    header = "| dataset | change | held-out, points | test, points | seconds |"
    return {"rows": rows, "summary": [header, "| --- " * 5 + "|", *map(gains_line, rows)]}


def dataset_gains(dataset: str, folder: Path, wise_seeds: int) -> list[dict[str, Any]]:
    """Every change on one dataset."""
    from bench_answer import dataset_settings

    shared = {**dataset_settings(dataset, folder, 42), "weights": "bundled", "cache_dir": folder}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "flip": {"views": "flip"},
        "adapt": {"batchnorm": "adapt"},
    }
    data = {}
    for kind, changes in kinds.items():
        output = folder / f"{kind}.h5"
        data[kind] = Extracted(ExtractConfig(**shared, **changes, layers="stages", output=output))
    runs: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        parts = {kind: part_of(one, seed) for kind, one in data.items()}
        runs += changed_heads(parts, data["flip"].seconds - data["plain"].seconds)
    for seed in range(wise_seeds):
        runs.append(wise_ft(shared, part_of(data["plain"], seed), folder / f"wise-{seed}"))
    names = dict.fromkeys(run["change"] for run in runs)
    label = Path(dataset).stem
    return [averaged(label, name, [r for r in runs if r["change"] == name]) for name in names]


class Extracted:
    """One cache's rows in memory, and the seconds of its extraction."""

    def __init__(self, settings: ExtractConfig) -> None:
        from featcache.extract import extract

        report = extract(settings)
        cache = FeatureCache(report["cache"])
        self.seconds = float(report["seconds_total"])
        self.train, self.stages = load_data(cache), cache.meta.backbone.stages
        self.test = load_rows(cache.split("test"), cache.class_names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one seed fits and scores.

    Attributes:
        fit: Rows that choose settings and are fitted; every view.
        scored: The held-out rows and the test rows.
        places: Places in train of the rows to fit and of the held-out rows.
        content: Digests of the rows to fit.
        stages: Which columns are which; None where all count.
        seed: Of the held-out fifth and of choosing.
    """

    fit: Rows
    scored: tuple[Rows, Rows]
    places: tuple[Any, Any]
    content: Any
    stages: StageColumns | None
    seed: int

    def changed(self, change: Callable[[Rows], Rows], **fields: Any) -> Part:
        """With all three sets of rows changed."""
        held, tested = map(change, self.scored)
        return dataclasses.replace(self, fit=change(self.fit), scored=(held, tested), **fields)

    def mapped(self, transform: Callable[[Any], Any], **fields: Any) -> Part:
        """With the features [N, D] of each view transformed."""

        def change(rows: Rows) -> Rows:
            views = [transform(np.asarray(view, np.float32)) for view in rows.views]
            return dataclasses.replace(rows, views=np.stack(views).astype(np.float32))

        return self.changed(change, **fields)


def part_of(data: Extracted, seed: int) -> Part:
    """Hold a fifth of train out, as train-head does, to score what the rest chose and fitted."""
    train, content = data.train.train, data.train.content
    parts = assign_parts(train.y, same_rows(content), seed, fraction=0.2, num_parts=1)
    fit, held = np.flatnonzero(parts != 0), np.flatnonzero(parts == 0)
    return Part(
        fit=train.take(fit), scored=(train.take(held), data.test), places=(fit, held),
        content=content[fit], stages=data.stages, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Answer:
    """Classes that a head gives the held-out rows and the test rows.

    Attributes:
        probabilities: [N, C] of both.
        chose: Its accuracy on the rows that chose its settings.
    """

    probabilities: list[Any]
    chose: float = 0.0

    def mean(self, other: Answer) -> Answer:
        """The mean of two heads' probabilities."""
        pairs = zip(self.probabilities, other.probabilities, strict=True)
        return Answer([(one + two) / 2 for one, two in pairs])


def answer(part: Part, **changes: Any) -> Answer:
    """Fit a head as train-head does; probabilities are averaged over the views of scored rows."""
    held = part.scored[0]
    test = TestSplit(
        y=held.y, ids=list(map(str, held.y)), num_views=1, blocks=lambda: iter([[held.plain]])
    )
    config = TrainHeadConfig(cache=Path("in-memory.h5"), seed=part.seed, **changes)
    data = InMemoryData(train=part.fit, content=part.content)
    run = run_protocol(config, data, test, part.stages)
    found = [
        np.mean([run.fitted.head.predict_proba(view) for view in rows.views], axis=0)
        for rows in part.scored
    ]
    return Answer(found, run.choice.val_top1 or 0.0)


def changed_heads(parts: dict[str, Part], mirroring_s: float) -> list[dict[str, Any]]:
    """Every change of features, views or heads, with one held-out fifth.

    Args:
        parts: Of the caches: plain, flip and adapt.
        mirroring_s: Seconds of extracting the mirror images too.
    """
    plain, flip, adapt = parts["plain"], parts["flip"], parts["adapt"]
    base, base_s = timed(lambda: answer(plain))
    other, other_s = timed(lambda: answer(adapt))
    better = max(base, other, key=lambda found: found.chose)
    one_view = dataclasses.replace(flip, fit=plain.fit)
    changes: dict[str, tuple[Callable[[], Answer], float]] = {
        "power: signed square root": (lambda: answer(plain.mapped(signed_sqrt)), 0),
        "power: Yeo-Johnson": (lambda: yeo_johnson(plain), 0),
        "L2 norm of each row": (lambda: answer(plain.mapped(unit_rows)), 0),
        "L2 norm of each stage": (lambda: answer(plain.mapped(unit_stages(plain))), 0),
        "flips averaged at test time": (lambda: answer(one_view), mirroring_s),
        "flips learned from and averaged": (lambda: answer(flip), mirroring_s),
        "mean of last-layer and all-stages heads": (lambda: last_and_all(plain), 0),
        "ridge on random Fourier features": (lambda: random_ridge(plain, fourier), 0),
        "ridge on random ReLU features": (lambda: random_ridge(plain, relu), 0),
    }
    found = []
    for name, (task, more) in changes.items():
        made, seconds = timed(task)
        found.append(compared(name, plain, base, made, seconds - base_s + more))
    joined, joined_s = timed(lambda: answer(side_by_side(plain, adapt)))
    more = joined_s - base_s - other_s
    found.append(compared("frozen and adapted side by side", plain, better, joined, more))
    name = "mean of frozen and adapted heads"
    return [*found, compared(name, plain, better, base.mean(other), 0.0)]


def timed(task: Callable[[], Answer]) -> tuple[Answer, float]:
    """A task's answer and its seconds."""
    start = time.perf_counter()
    return task(), time.perf_counter() - start


def signed_sqrt(X: Any) -> Any:
    """The square root of each value's size, with its sign."""
    return np.sign(X) * np.sqrt(np.abs(X))


def unit_rows(X: Any) -> Any:
    """Rows [N, D] of unit length."""
    return X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)


def unit_stages(part: Part) -> Callable[[Any], Any]:
    """Makes every stage's part of a row a vector of unit length."""
    stages = part.stages
    assert stages is not None
    return lambda X: np.concatenate([unit_rows(X[:, stages.group(n)]) for n in stages.names], 1)


def yeo_johnson(part: Part) -> Answer:
    """A head on features to powers that the rows to fit choose by likelihood."""
    from sklearn.preprocessing import PowerTransformer

    power = PowerTransformer().fit(np.asarray(part.fit.plain, np.float64))
    # A column that hardly varies can throw a new row far out.
    return answer(part.mapped(lambda X: np.clip(power.transform(X), -10, 10)))


def last_and_all(part: Part) -> Answer:
    """The mean of a head on the last layer and one on all stages."""
    return answer(part, columns="last").mean(answer(part, columns="all"))


def side_by_side(one: Part, other: Part) -> Part:
    """The columns of two caches with equal ids."""
    more = iter([*other.scored, other.fit])  # in the order in which `changed` asks

    def join(rows: Rows) -> Rows:
        return dataclasses.replace(rows, views=np.concatenate([rows.views, next(more).views], 2))

    return one.changed(join, stages=None)


def random_ridge(part: Part, make: Callable[[int, int], Callable[[Any], Any]]) -> Answer:
    """Ridge on random functions of standardized features."""
    X = np.asarray(part.fit.plain, np.float32)
    mean, deviation = X.mean(0), np.maximum(X.std(0), 1e-6)
    lift = make(X.shape[1], part.seed)
    lifted = part.mapped(lambda X: lift((X - mean) / deviation), stages=None)
    return answer(lifted, solver="ridge", standardize="off")


def fourier(dim: int, seed: int) -> Callable[[Any], Any]:
    """Random Fourier features of a Gaussian kernel as wide as the features are apart."""
    from sklearn.kernel_approximation import RBFSampler

    sampler = RBFSampler(gamma=0.5 / dim, n_components=RANDOM_FEATURES, random_state=seed)
    transform: Callable[[Any], Any] = sampler.fit(np.zeros((1, dim))).transform
    return transform


def relu(dim: int, seed: int) -> Callable[[Any], Any]:
    """Random projections cut off at zero, as in RanPAC (arXiv:2307.02251)."""
    weight = np.random.default_rng(seed).normal(size=(dim, RANDOM_FEATURES)) / np.sqrt(dim)
    return lambda X: np.maximum(X @ weight.astype(np.float32), 0)


def wise_ft(shared: dict[str, Any], part: Part, folder: Path) -> dict[str, Any]:
    """Weights halfway from the frozen network and its head to the fine-tuned ones.

    WiSE-FT (arXiv:2109.01903) with its coefficient of a half, against the fine-tuned weights.
    """
    from featcache.data import load_dataset
    from featcache.finetune import finetune_report
    from featcache.finetune.loop import read_images, score
    from featcache.finetune.probe import fit_probe
    from featcache.finetune.setup import prepare
    from featcache.tensor_files import read_tensor_file

    config = FinetuneConfig(
        **shared, recipe="good", score="end", output=folder / "tuned.safetensors"
    )
    dataset = load_dataset(config)
    config = dataclasses.replace(config, seed=part.seed)
    train = dataset.splits["train"]
    fit, held = (train.subset(places) for places in part.places)
    dataset = dataclasses.replace(dataset, splits={**dataset.splits, "train": fit})
    run = prepare(config, dataset)
    fit_probe(run.trainable, run.train, run.placement, len(dataset.class_names))
    model = run.trainable.model
    begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune_report(config, dataset)
    end = read_tensor_file(config.output).tensors()
    sets = [read_images(held, run.test.prep, config, run.placement.workers)[0], run.test]
    right = {}
    for name, share in (("tuned", 1.0), ("halfway", 0.5)):
        start = time.perf_counter()
        model.load_state_dict({k: v.lerp(end[k], share) if v.is_floating_point() else end[k]
                               for k, v in begin.items()})  # fmt: skip
        right[name] = [score(model, images, run.placement).top1 for images in sets]
        seconds = time.perf_counter() - start
    (held_0, test_0), (held_1, test_1) = right["tuned"], right["halfway"]
    return {"change": WISE, "held_out": held_1 - held_0, "test": test_1 - test_0,
            "held_out_top1": held_1, "test_top1": test_1, "seconds": seconds}  # fmt: skip


def compared(change: str, part: Part, base: Answer, made: Answer, seconds: float) -> dict[str, Any]:
    """One change against its base, with one held-out fifth."""
    before, after = (
        [top1(rows.y, p.argmax(1)) for rows, p in zip(part.scored, each.probabilities, strict=True)]
        for each in (base, made)
    )
    return {
        "change": change, "held_out": after[0] - before[0], "test": after[1] - before[1],
        "held_out_top1": after[0], "test_top1": after[1], "seconds": seconds,
    }  # fmt: skip


def averaged(dataset: str, change: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A change's mean over seeds, and its standard errors."""
    names = ("held_out", "test", "held_out_top1", "test_top1", "seconds")
    mean = {name: float(np.mean([run[name] for run in runs])) for name in names}
    errors = {
        f"{name}_se": float(np.std([run[name] for run in runs], ddof=1) / np.sqrt(len(runs)))
        if len(runs) > 1 else None
        for name in ("held_out", "test")
    }  # fmt: skip
    return {"dataset": dataset, "change": change, "seeds": len(runs), **mean, **errors}


def gains_line(row: dict[str, Any]) -> str:
    """One change on one dataset as a line of a Markdown table; points are hundredths."""

    def points(name: str) -> str:
        error = row[f"{name}_se"]
        return f"{100 * row[name]:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

    return (
        f"| {row['dataset']} | {row['change']} | {points('held_out')} | {points('test')} "
        f"| {row['seconds']:+.1f} |"
    )

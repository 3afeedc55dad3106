"""What cheap changes of heads gain, on held-out train rows and on test; for bench_heads.py."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import ExtractConfig, FinetuneConfig, StageColumns, TrainHeadConfig
from featcache.config.commands import Solver
from featcache.display import say
from featcache.groups import assign_parts, kept_together
from featcache.heads.scoring import TestSplit
from featcache.heads.selection import InMemoryData, load_data
from featcache.heads.train import run_protocol
from featcache.heads.training_data import Rows, load_rows
from featcache.results.metrics import top1

SEEDS = 5
FIT_ROWS = 500
RANDOM_FEATURES = 4000
WISE = "weights halfway to the fine-tuned ones"


def gains(datasets: tuple[str, ...], work_dir: Path, wise_seeds: int) -> dict[str, Any]:
    """What each cheap change adds to a head on all stages, on held-out train rows and on test.

    Each seed draws the rows to fit, half of train and at most FIT_ROWS; they choose the strength as
    in train-head, standardized unless the change says otherwise, and the other train rows score. A
    change wins on a dataset where it adds more than two standard errors.

    Args:
        datasets: As bench_answer.py takes them.
        work_dir: Where caches and models go while they are needed.
        wise_seeds: Fine-tuning runs for each dataset, to average their weights with the start's.
    """
    rows = []
    for dataset in datasets:
        with tempfile.TemporaryDirectory(dir=work_dir) as name:
            rows += dataset_gains(dataset, Path(name), wise_seeds)
        say(f"{dataset}: done")
    return {"rows": rows, "summary": summary(rows)}


def dataset_gains(dataset: str, folder: Path, wise_seeds: int) -> list[dict[str, Any]]:
    """Every change on one dataset."""
    from bench_answer import dataset_settings
    from benchmark import BenchmarkConfig, warm_up

    shared = {**dataset_settings(dataset, 42), "weights": "bundled", "cache_dir": folder}
    warm_up(BenchmarkConfig(**shared))
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
    power = yeo_johnson(data["plain"].train.train)
    for seed in range(SEEDS):
        parts = {kind: part_of(one, seed) for kind, one in data.items()}
        runs += changed_heads(parts, power, data["flip"].seconds - data["plain"].seconds)
    for seed in range(wise_seeds):
        runs.append(wise_ft(shared, part_of(data["plain"], seed), folder / f"wise-{seed}"))
    names = dict.fromkeys(run["change"] for run in runs)
    label = Path(dataset).stem
    return [averaged(label, name, [r for r in runs if r["change"] == name]) for name in names]


class Extracted:
    """One cache's rows in memory, and the processor seconds of its extraction."""

    def __init__(self, settings: ExtractConfig) -> None:
        from featcache.extract import extract

        start = time.process_time()
        cache = FeatureCache(extract(settings)["cache"])
        self.seconds = time.process_time() - start
        self.train, stages = load_data(cache), cache.meta.backbone.stages
        assert stages is not None
        self.stages = stages
        self.test = load_rows(cache.split("test"), cache.class_names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one seed fits and scores.

    Attributes:
        fit: What settings are chosen on and heads are fitted to; every view.
        scored: The held-out rows and the test rows.
        places: Places in train of the rows to fit and of the held-out rows.
        stages: Which columns are which.
        seed: Of the draw and of choosing.
    """

    fit: InMemoryData
    scored: tuple[Rows, Rows]
    places: tuple[Any, Any]
    stages: StageColumns
    seed: int

    def changed(self, change: Callable[[Rows], Rows]) -> Part:
        """With all three sets of rows changed."""
        held, tested = map(change, self.scored)
        fit = dataclasses.replace(self.fit, train=change(self.fit.train))
        return dataclasses.replace(self, fit=fit, scored=(held, tested))

    def mapped(self, transform: Callable[[Any], Any]) -> Part:
        """With the features [N, D] of each view transformed."""

        def change(rows: Rows) -> Rows:
            views = [transform(np.asarray(view, np.float32)) for view in rows.views]
            return dataclasses.replace(rows, views=np.stack(views).astype(np.float32))

        return self.changed(change)

    def standardized(self) -> Part:
        """With features of zero mean and unit deviation on the rows to fit."""
        X = np.asarray(self.fit.train.plain, np.float32)
        mean, deviation = X.mean(0), np.maximum(X.std(0), 1e-6)
        return self.mapped(lambda X: (X - mean) / deviation)

    def in_row_space(self) -> Part:
        """With coordinates in the span of the rows to fit.

        A head with an L2 penalty lies in that span, so it stays the same, and is fitted faster.
        """
        X = np.asarray(self.fit.train.plain, np.float64)
        values, vectors = np.linalg.eigh(X @ X.T)
        kept = values > 1e-9 * values[-1]
        basis = (X.T @ (vectors[:, kept] / np.sqrt(values[kept]))).astype(np.float32)
        return self.mapped(lambda X: X @ basis)


def part_of(data: Extracted, seed: int) -> Part:
    """Draw the rows to fit; the other train rows are held out, as train-head would."""
    whole = data.train
    parts = assign_parts(
        whole.train.y,
        kept_together(whole.content, whole.groups),
        seed,
        fraction=max(0.5, 1 - FIT_ROWS / whole.train.num_rows),
        num_parts=1,
        grouped=whole.groups is not None,
    )
    fit, held = np.flatnonzero(parts != 0), np.flatnonzero(parts == 0)
    return Part(
        fit=whole.take(fit),
        scored=(whole.train.take(held), data.test),
        places=(fit, held),
        stages=data.stages,
        seed=seed,
    )


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


def answer(part: Part, solver: Solver = "logistic") -> Answer:
    """Fit a head as train-head does, on the features as they are.

    Probabilities are averaged over the views of the scored rows.
    """
    held = part.scored[0]
    test = TestSplit(
        y=held.y, ids=list(map(str, held.y)), num_views=1, blocks=lambda: iter([[held.plain]])
    )
    config = TrainHeadConfig(
        cache=Path("in-memory.h5"), seed=part.seed, solver=solver, standardize="off"
    )
    run = run_protocol(config, part.fit, test)
    found = [
        np.mean([run.fitted.head.predict_proba(view) for view in rows.views], axis=0)
        for rows in part.scored
    ]
    return Answer(found, run.choice.val_top1 or 0.0)


def logistic(part: Part) -> Answer:
    """A logistic head on standardized features."""
    return answer(part.standardized().in_row_space())


def changed_heads(
    parts: dict[str, Part], power: Callable[[Any], Any], mirroring_s: float
) -> list[dict[str, Any]]:
    """Every change of features, views or heads, with one draw of rows.

    Args:
        parts: Of the caches: plain, flip and adapt.
        power: Makes each feature's distribution more normal.
        mirroring_s: Processor seconds of extracting the mirror images too.
    """
    plain, flip, adapt = parts["plain"], parts["flip"], parts["adapt"]
    base, base_s = timed(lambda: logistic(plain))
    other, other_s = timed(lambda: logistic(adapt))
    better = max(base, other, key=lambda found: found.chose)
    mirrored = dataclasses.replace(flip, fit=plain.fit)
    changes: dict[str, tuple[Callable[[], Answer], float]] = {
        "no standardization": (lambda: answer(plain.in_row_space()), 0),
        "signed square root": (lambda: logistic(plain.mapped(signed_sqrt)), 0),
        "Yeo-Johnson powers": (lambda: logistic(plain.mapped(power)), 0),
        "L2 norm of each row": (lambda: logistic(plain.mapped(unit_rows)), 0),
        "L2 norm of each stage": (lambda: logistic(plain.mapped(unit_stages(plain.stages))), 0),
        "flips averaged at test time": (lambda: logistic(mirrored), mirroring_s),
        "ridge on random Fourier features": (lambda: random_ridge(plain, fourier), 0),
        "ridge on random ReLU features": (lambda: random_ridge(plain, relu), 0),
        "mean of last-layer and all-stages heads": (lambda: logistic(last(plain)).mean(base), 0),
    }
    found = []
    for name, (task, more) in changes.items():
        made, seconds = timed(task)
        found.append(compared(name, plain, base, made, seconds - base_s + more))
    joined, joined_s = timed(lambda: logistic(side_by_side(plain, adapt)))
    more = joined_s - base_s - other_s
    found.append(compared("frozen and adapted side by side", plain, better, joined, more))
    name = "mean of frozen and adapted heads"
    return [*found, compared(name, plain, better, base.mean(other), 0.0)]


def timed(task: Callable[[], Answer]) -> tuple[Answer, float]:
    """A task's answer and its processor seconds, which a busy machine changes little."""
    start = time.process_time()
    return task(), time.process_time() - start


def signed_sqrt(X: Any) -> Any:
    """The square root of each value's size, with its sign."""
    return np.sign(X) * np.sqrt(np.abs(X))


def unit_rows(X: Any) -> Any:
    """Rows [N, D] of unit length."""
    return X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)


def unit_stages(stages: StageColumns) -> Callable[[Any], Any]:
    """Makes every stage's part of a row a vector of unit length."""
    return lambda X: np.concatenate([unit_rows(X[:, stages.group(n)]) for n in stages.names], 1)


def yeo_johnson(train: Rows) -> Callable[[Any], Any]:
    """Features to powers that train rows choose by likelihood, without labels."""
    from sklearn.preprocessing import PowerTransformer

    power = PowerTransformer().fit(np.asarray(train.plain[::4], np.float64))
    # A column that hardly varies can throw a new row far out.
    return lambda X: np.clip(power.transform(X), -10, 10)


def last(part: Part) -> Part:
    """The columns of the last layer."""
    columns = part.stages.group("last")
    return part.mapped(lambda X: X[:, columns])


def side_by_side(one: Part, other: Part) -> Part:
    """The columns of two caches with equal ids."""
    more = iter([*other.scored, other.fit.train])  # in the order in which `changed` asks

    def join(rows: Rows) -> Rows:
        return dataclasses.replace(rows, views=np.concatenate([rows.views, next(more).views], 2))

    return one.changed(join)


def random_ridge(part: Part, make: Callable[[int, int], Callable[[Any], Any]]) -> Answer:
    """Ridge on random functions of standardized features."""
    lift = make(part.fit.train.feature_dim, part.seed)
    return answer(part.standardized().mapped(lift), "ridge")


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
    from bench_answer import mirrored
    from featcache.data import load_dataset
    from featcache.finetune import finetune_report
    from featcache.finetune.loop import score
    from featcache.finetune.probe import fit_probe
    from featcache.finetune.samples import read_images
    from featcache.finetune.setup import prepare
    from featcache.tensor_files import read_tensor_file

    output, flip = folder / "tuned.safetensors", mirrored(shared["dataset"])
    config = FinetuneConfig(**shared, recipe="good", flip=flip, score="end", output=output)
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
    sets = [read_images(held, run.info.preprocessing, config, run.placement), run.test]
    right = {}
    for name, share in (("tuned", 1.0), ("halfway", 0.5)):
        start = time.process_time()
        model.load_state_dict({k: v.lerp(end[k], share) if v.is_floating_point() else end[k]
                               for k, v in begin.items()})  # fmt: skip
        scores = [(images, score(run.trainable, images, run.placement)) for images in sets]
        right[name] = [top1(images.split.labels, found.predicted) for images, found in scores]
        seconds = time.process_time() - start
    (held_0, test_0), (held_1, test_1) = right["tuned"], right["halfway"]
    return {"change": WISE, "held_out": held_1 - held_0, "test": test_1 - test_0,
            "held_out_top1": held_1, "test_top1": test_1, "seconds": seconds}  # fmt: skip


def compared(change: str, part: Part, base: Answer, made: Answer, seconds: float) -> dict[str, Any]:
    """One change against its base, with one draw of rows."""
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


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table: a line for each change, a column for each dataset.

    Cells are points of held-out accuracy with their standard error, and points of test accuracy.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    lines = [
        f"| change | {' | '.join(datasets)} | processor s | wins |",
        "| --- " + "| ---: " * (len(datasets) + 2) + "|",
    ]
    for change in dict.fromkeys(row["change"] for row in rows):
        own = {row["dataset"]: row for row in rows if row["change"] == change}
        cells = [cell(own[name]) if name in own else "" for name in datasets]
        seconds = np.mean([row["seconds"] for row in own.values()])
        wins = sum(row["held_out"] > 2 * (row["held_out_se"] or np.inf) for row in own.values())
        lines.append(f"| {change} | {' | '.join(cells)} | {seconds:+.1f} | {wins} of {len(own)} |")
    return lines


def cell(row: dict[str, Any]) -> str:
    """One change on one dataset."""
    error = "" if row["held_out_se"] is None else f" ± {100 * row['held_out_se']:.1f}"
    return f"{100 * row['held_out']:+.1f}{error} ({100 * row['test']:+.1f})"

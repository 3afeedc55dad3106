"""How fast heads are fitted, how good they are, and what they need when memory is short.

    python scripts/bench_heads.py              # speed against scikit-learn, some minutes
    python scripts/bench_heads.py --table      # accuracy against plain LogisticRegression
    python scripts/bench_heads.py --views-of FOLDER   # what cached views buy and cost
    python scripts/bench_heads.py --probabilities CACHE   # are they right, are others noticed
    python scripts/bench_heads.py --gains digits FOLDER   # what cheap changes of heads gain
    python scripts/bench_heads.py --few        # few rows of many classes
    python scripts/bench_heads.py --stream     # 5 million rows in bounded memory, 6 GB of disk

Speed is measured in turns with scikit-learn on the same rows in the same process, and the median
of the rounds counts; scikit-learn-intelex takes its turns too if it is installed. Rows are made,
not read: non-negative, correlated and overlapping, as the features of a ReLU network are;
--features FILE … takes real ones (a cache, or .npz with X [N, D] and y [N]).
"""

from __future__ import annotations

import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import heads_gains
import heads_probabilities
import heads_quality
import heads_stream
from featcache import FeatureCache, cli
from featcache.config import OutputConfig, TrainHeadConfig
from featcache.display import say
from featcache.errors import UserError
from featcache.heads.selection import InMemoryData, choose
from featcache.heads.solvers.logistic import (
    C_GRID,
    SELECTION_TOLERANCE,
    LogisticPath,
    LogisticProblem,
    LogisticSolver,
)
from featcache.heads.solvers.ridge import alpha_grid, ridge_from_moments
from featcache.heads.training_data import Rows
from featcache.runtime import environment
from heads_stream import make_cache

PATH_TOLERANCE = 1e-6
# Tolerances to give a rival until its objective is at most this much higher than ours, relative.
RIVAL_TOLERANCES, AS_LOW = (1e-4, 1e-5, 1e-6, 1e-7), 1e-5
# Of at most so many rows, choosing is timed too: rivals take their time.
MOST_CHOSEN = 10_000
# Classes and rows of each, how far rows are from their class's mean, and scikit-learn's C.
FEW_CASES = ((300, 2), (600, 1), (1200, 2), (300, 5), (100, 5))
FEW_NOISE = (1.0, 5.0)
FEW_C = (1e-4, 1e-2, 1.0, 100.0, 1e4)
PATH_C = tuple(float(c) for c in np.geomspace(1e-4, 1.0, 20))


@dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """Measure heads: speed, accuracy, views, or bounded memory."""

    num_rows: int = 50_000
    """Rows of the speed comparison."""
    feature_dim: int = 512
    """Their width."""
    num_classes: tuple[int, ...] = (10, 100)
    """Numbers of classes to measure."""
    C: tuple[float, ...] = (0.01, 1.0)
    """scikit-learn's C."""
    as_low: bool = False
    """Also time rivals at the first tolerance that ends as low as ours does."""
    rounds: int = 3
    """How often everything is measured; the median counts."""
    features: tuple[Path, ...] = ()
    """Use these rows (train splits of caches, or .npz with X [N, D] and y [N]) instead of made
    ones. Of caches with several layers, the last layer alone takes part too."""
    table: bool = False
    """Compare accuracy with plain LogisticRegression on real datasets instead."""
    folder: tuple[Path, ...] = ()
    """Of --table: class folders with train/ and test/ to add, as bundled-weight features."""
    views_of: Path | None = None
    """Extract this folder with no, flipped and random views, and compare heads on them instead."""
    probabilities: tuple[Path, ...] = ()
    """Measure calibration, and how well left-out classes are noticed, on these caches instead."""
    gains: tuple[str, ...] = ()
    """Measure what cheap changes of heads gain on these datasets instead."""
    wise_seeds: int = 3
    """Of --gains: fine-tuning runs for each dataset, to average weights with the frozen ones."""
    few: bool = False
    """Measure few rows of many classes instead."""
    stream: bool = False
    """Fit a large made cache in bounded memory instead."""
    stream_rows: int = 5_000_000
    """Rows of --stream."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Where made caches go while they are needed."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the settings ask for."""
    if config.table:
        report = heads_quality.table(config.folder, config.work_dir)
    elif config.views_of is not None:
        report = heads_quality.views(config.views_of, config.work_dir)
    elif config.probabilities:
        report = heads_probabilities.probabilities(config.probabilities, config.work_dir)
    elif config.gains:
        report = heads_gains.gains(config.gains, config.work_dir, config.wise_seeds)
    elif config.few:
        report = few_rows(config)
    elif config.stream:
        report = heads_stream.run(config.work_dir, config.stream_rows, config.feature_dim)
    else:
        report = speed(config)
    return {"command": "bench-heads", **report, "environment": environment()}


def speed(config: BenchConfig) -> dict[str, Any]:
    """Everything that is timed on one large set of rows, and the whole command on a small one."""
    if find_spec("sklearnex") is None:
        say("scikit-learn-intelex is not installed and takes no turns")
    rows: list[dict[str, Any]] = []
    for name, X, y in load_rows(config):
        say(name)
        for C in config.C:
            row = against_rivals(X, y, C, config.rounds, as_low=config.as_low)
            rows.append({"features": name, **row})
            say(logistic_line(rows[-1]))
        if len(y) <= MOST_CHOSEN:
            rows.append(choice_cost(X, y, config.rounds))
            say(choice_line(rows[-1]))
        rows.append(path_cost(X, y, config.rounds))
        say(path_line(rows[-1]))
        rows.append(ridge_cost(X, y, config.rounds))
        say(path_line(rows[-1]))
    rows.append(command_seconds(config))
    say(rows[-1]["text"])
    return {"rows": rows, "summary": []}


def few_rows(config: BenchConfig) -> dict[str, Any]:
    """Single fits, and all strengths as choosing needs them, as a Markdown table."""
    rows: list[dict[str, Any]] = []
    heads = [f"C = {C:g}" for C in FEW_C]
    say(f"| classes × rows, noise | {' | '.join(heads)} | {len(C_GRID)} values of C |")
    say("| --- |" + " ---: |" * (len(heads) + 1))
    for (num_classes, per_class), noise in itertools.product(FEW_CASES, FEW_NOISE):
        X, y = few_of_each(num_classes, per_class, noise, config.feature_dim)
        cells = []
        for C in FEW_C:
            row = against_rivals(X, y, C, config.rounds)
            rival = row["rivals"]["sklearn"]
            rows.append({"noise": noise, **row})
            cells.append(f"{1 / rival['speedup']:.2f} ({rival['objective_against']:+.0e})")
        ours, theirs = in_turns(
            [
                functools.partial(fit_all, X, y, C_GRID, SELECTION_TOLERANCE),
                functools.partial(sklearn_all, X, y, C_GRID),
            ],
            config.rounds,
        )
        rows.append({"name": "all C", "seconds": ours, "sklearn_seconds": theirs})
        label = f"{num_classes:,} × {per_class}, {noise:g}"
        say(f"| {label} | {' | '.join(cells)} | {ours / theirs:.2f} |")
    return {"rows": rows, "summary": []}


def few_of_each(num_classes: int, per_class: int, noise: float, dim: int) -> tuple[Any, Any]:
    """Rows around random class means."""
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(num_classes), per_class)
    means = random.normal(size=(num_classes, dim))[y]
    return (means + noise * random.normal(size=means.shape)).astype(np.float32), y


def fit_all(X: Any, y: Any, grid: tuple[float, ...], tolerance: float) -> int:
    """Our fits of one C after another; returns the passes."""
    path = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False)
    return sum(path.fit(C, tolerance).num_passes for C in grid)


def sklearn_all(X: Any, y: Any, grid: tuple[float, ...]) -> int:
    """scikit-learn's likewise, with its warm starts; returns its iterations."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=20_000, warm_start=True)
    return sum(int(model.set_params(C=C).fit(X, y).n_iter_[0]) for C in grid)


def load_rows(config: BenchConfig) -> Iterator[tuple[str, Any, Any]]:
    """Names, features [N, D] float32 and labels [N], given or made."""
    for num_classes in () if config.features else config.num_classes:
        X, y = made_features(config.num_rows, config.feature_dim, num_classes)
        yield f"made, {num_classes} classes", X, y
    for path in config.features:
        if path.suffix == ".h5":
            cache = FeatureCache(path)
            split, stages = cache.split("train"), cache.meta.backbone.stages
            X, y = np.asarray(split.X, np.float32), split.y
            if stages is not None:
                last = np.ascontiguousarray(X[:, stages.group("last")])
                yield f"{path.stem}, last layer", last, y
            yield f"{path.stem}, all columns", X, y
            continue
        with np.load(path, allow_pickle=False) as file:
            X, y = file["X"].astype(np.float32), file["y"].astype(np.int64)
        if X.ndim != 2 or y.shape != X.shape[:1]:
            raise UserError(f"{path}: X {X.shape} and y {y.shape}; wanted [N, D] and [N]")
        yield path.stem, X, y


def made_features(num_rows: int, dim: int, num_classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Rows as a ReLU network gives: few strong directions, many weak ones, classes that overlap."""
    fixed, drawn = np.random.default_rng(12345), np.random.default_rng(seed)
    latent = 128
    sizes = np.geomspace(2.0, 0.1, latent)[:, None]
    means = 0.22 * fixed.normal(size=(num_classes, latent))
    mixing = (sizes * fixed.normal(size=(latent, dim)) / np.sqrt(latent)).astype(np.float32)
    offset = fixed.normal(size=dim).astype(np.float32)
    y = drawn.integers(num_classes, size=num_rows)
    hidden = (means[y] + drawn.normal(size=(num_rows, latent))).astype(np.float32)
    noise = 0.1 * drawn.standard_normal((num_rows, dim), dtype=np.float32)
    return np.maximum(3 * (hidden @ mixing) + noise + offset, 0), y


def rows_of(X: Any, y: Any) -> Rows:
    """The rows as solvers take them."""
    names = [f"c{i}" for i in range(int(y.max()) + 1)]
    return Rows(views=X[None], y=y, weights=np.ones(len(y)), class_names=names)


def rivals() -> dict[str, Any]:
    """The estimators that are installed, by name."""
    from sklearn.linear_model import LogisticRegression

    found = {"sklearn": LogisticRegression}
    if find_spec("sklearnex") is not None:
        from sklearnex.linear_model import LogisticRegression as Intelex

        found["intelex"] = Intelex
    return found


def against_rivals(
    X: Any, y: Any, C: float, rounds: int, *, as_low: bool = False
) -> dict[str, Any]:
    """One fit: ours, and each rival's at its default tolerance.

    With `as_low` also at the first tolerance whose objective is as low as ours, if that is another.
    """

    def ours() -> tuple[Any, Any, int]:
        fitted = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False).fit(C)
        return fitted.head.weight, fitted.head.bias, fitted.num_passes

    def theirs(kind: Any, tol: float) -> tuple[Any, Any, int]:
        model = kind(C=C, max_iter=20_000, tol=tol).fit(X, y)
        return model.coef_, model.intercept_, int(model.n_iter_[0])

    def value(found: tuple[Any, Any, int]) -> float:
        return objective(found[0], found[1], X, y, C)

    tasks: dict[str, Callable[[], tuple[Any, Any, int]]] = {"featcache": ours}
    goal = value(ours()) * (1 + AS_LOW)
    for name, kind in rivals().items():
        tasks[name] = functools.partial(theirs, kind, RIVAL_TOLERANCES[0])
        for tol in RIVAL_TOLERANCES if as_low else ():
            if value(theirs(kind, tol)) <= goal:
                if tol < RIVAL_TOLERANCES[0]:
                    tasks[f"{name} to {tol:g}"] = functools.partial(theirs, kind, tol)
                break
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    result = {}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            result[name] = task()
            seconds[name].append(time.perf_counter() - start)
    values = {name: value(found) for name, found in result.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    weight, bias, passes = result["featcache"]
    return {
        "name": "logistic", "num_rows": len(y), "num_classes": int(y.max()) + 1, "C": C,
        "seconds": median["featcache"], "passes": passes,
        "train_top1": float(np.mean((X @ weight.T.astype(np.float32) + bias).argmax(axis=1) == y)),
        "rivals": {
            name: {
                "seconds": median[name], "speedup": median[name] / median["featcache"],
                "objective_against": values["featcache"] / values[name] - 1,
                "iterations": result[name][2],
            }
            for name in tasks if name != "featcache"
        },
    }  # fmt: skip


def choice_cost(X: Any, y: Any, rounds: int) -> dict[str, Any]:
    """Choosing C on a held-out fifth as `train-head` does, and rivals' fits of the same values.

    Rivals fit the same rows and score the same held-out ones; scikit-learn starts each fit where
    the one before ended.
    """
    content = np.zeros((len(y), 32), np.uint8)
    content[:, :8] = np.arange(len(y))[:, None].view(np.uint8)
    data = InMemoryData(train=rows_of(X, y), content=content)
    selection = data.selection(TrainHeadConfig(cache=Path()))
    fit, held = selection.pairs[0]
    solver = LogisticSolver(standardize="off")
    tried = [row["C"] for row in choose(solver, selection).table]

    def theirs(kind: Any, options: dict[str, bool]) -> int:
        model = kind(max_iter=20_000, **options)
        fits = (model.set_params(C=C).fit(fit.plain, fit.y) for C in tried)
        return len([each.score(held.plain, held.y) for each in fits])

    tasks: dict[str, Callable[[], int]] = {
        "featcache": lambda: len(choose(solver, selection).table)
    }
    for name, kind in rivals().items():
        options = {"warm_start": True} if name == "sklearn" else {}
        tasks[name] = functools.partial(theirs, kind, options)
    seconds = dict(zip(tasks, in_turns(list(tasks.values()), rounds), strict=True))
    return {
        "name": "choosing C", "num_classes": int(y.max()) + 1, "num_tried": len(tried),
        "seconds": seconds.pop("featcache"), "rival_seconds": seconds,
    }  # fmt: skip


def choice_line(row: dict[str, Any]) -> str:
    """The comparison of choosing in words."""
    theirs = [
        f"{name} {seconds:.2f} s ({seconds / row['seconds']:.1f} times)"
        for name, seconds in row["rival_seconds"].items()
    ]
    ours = f"choosing among {row['num_tried']} values of C: {row['seconds']:.3f} s"
    return "; ".join([ours, *theirs])


def objective(weight: Any, bias: Any, X: Any, y: Any, C: float) -> float:
    """scikit-learn's objective for three classes or more, in float64."""
    total = 0.0
    for start in range(0, len(y), 8192):
        cut = slice(start, start + 8192)
        logits = X[cut].astype(np.float64) @ weight.T + bias
        logits -= logits.max(axis=1, keepdims=True)
        own = logits[np.arange(len(logits)), y[cut]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - own).sum())
    return C * total + 0.5 * float((weight.astype(np.float64) ** 2).sum())


def path_cost(X: Any, y: Any, rounds: int) -> dict[str, Any]:
    """Twenty values of C with warm starts against one cold fit of the largest, all to 1e-6.

    Choosing fits them to `SELECTION_TOLERANCE` only, which is timed too.
    """

    def some(grid: tuple[float, ...], tolerance: float) -> Callable[[], int]:
        return lambda: fit_all(X, y, grid, tolerance)

    one, many, rough = in_turns(
        [
            some(PATH_C[-1:], PATH_TOLERANCE),
            some(PATH_C, PATH_TOLERANCE),
            some(PATH_C, SELECTION_TOLERANCE),
        ],
        rounds,
    )
    return {
        "name": f"{len(PATH_C)} values of C with warm starts",
        "num_classes": int(y.max()) + 1,
        "one_seconds": one, "all_seconds": many, "ratio": many / one,
        "as_choosing_seconds": rough, "as_choosing_ratio": rough / one,
    }  # fmt: skip


def ridge_cost(X: Any, y: Any, rounds: int) -> dict[str, Any]:
    """Fifty ridge alphas against one."""
    rows = rows_of(X, y)
    grid = alpha_grid(rows)

    def some(alphas: Any) -> Callable[[], int]:
        def task() -> int:
            sums = rows.moments(products=True)
            problem = ridge_from_moments(sums, rows.class_names, standardize=False)
            return len([problem.fit(alpha) for alpha in alphas])

        return task

    one, many = in_turns([some(grid[25:26]), some(grid)], rounds)
    return {
        "name": f"{len(grid)} ridge alphas", "num_classes": int(y.max()) + 1,
        "one_seconds": one, "all_seconds": many, "ratio": many / one,
    }  # fmt: skip


def in_turns(tasks: list[Callable[[], int]], rounds: int) -> list[float]:
    """Median seconds of tasks that take turns."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(rounds):
        for times, task in zip(seconds, tasks, strict=True):
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def command_seconds(config: BenchConfig) -> dict[str, Any]:
    """The whole `train-head` process, choice and start-up included, on the notebook's size."""
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        path = Path(folder) / "small.h5"
        splits = {
            "train": made_features(2000, config.feature_dim, 10, seed=1),
            "test": made_features(500, config.feature_dim, 10, seed=2),
        }
        make_cache(path, splits, 10)
        command = [
            sys.executable,
            "-m",
            "featcache",
            "train-head",
            str(path),
            "--cache-dir",
            folder,
        ]
        seconds = []
        for _ in range(max(config.rounds, 3) + 1):  # the first run reads the disk
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    text = f"train-head on 2,000 × {config.feature_dim}, whole process with choice: {median:.2f} s"
    return {"name": "train-head process", "seconds": median, "text": text}


def logistic_line(row: dict[str, Any]) -> str:
    """One comparison in words."""
    ours = (
        f"logistic, {row['num_rows']:,} rows, {row['num_classes']} classes, C = {row['C']:g}: "
        f"{row['seconds']:.3f} s, {row['passes']} passes, train accuracy {row['train_top1']:.3f}"
    )
    theirs = [
        f"{name} {rival['seconds']:.3f} s ({rival['speedup']:.2f} times), {rival['iterations']} "
        f"iterations, our objective {rival['objective_against']:+.1e} relative"
        for name, rival in row["rivals"].items()
    ]
    return "; ".join([ours, *theirs])


def path_line(row: dict[str, Any]) -> str:
    """One ratio in words."""
    return (
        f"{row['name']}, {row['num_classes']} classes: {row['all_seconds']:.2f} s, "
        f"{row['ratio']:.2f} times one fit ({row['one_seconds']:.2f} s)"
        + (
            f"; as exactly as choosing needs {row['as_choosing_seconds']:.2f} s, "
            f"{row['as_choosing_ratio']:.2f} times"
            if "as_choosing_ratio" in row
            else ""
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-heads", BenchConfig, bench, argv, lambda report: report["summary"])


if __name__ == "__main__":
    sys.exit(main())

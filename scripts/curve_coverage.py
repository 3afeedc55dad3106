#!/usr/bin/env python
"""How often the interval of an extrapolated learning curve holds, where larger sizes are known.

For each cache: heads on nested draws of train images at growing sizes. Then, many times: take one
or three draws, fit the curve to their sizes up to a quarter of a target, and see whether a further
draw's accuracy at the target lies in the 80 % interval. Each time another half of the test images
scores.

    python scripts/curve_coverage.py cache/digits-....h5 cache/cifar10-2500-....h5

Measuring takes minutes; what was measured is kept in the folder, and taken from there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from featcache.cache import FeatureCache
from featcache.compare.planned_runs import nested_rows
from featcache.config import TrainHeadConfig
from featcache.config.commands import Solver
from featcache.heads import train_head_report
from featcache.results.forecast import LEVEL, extrapolate

QUARTER = 2
"""Places between the largest size that is fitted and the target."""


@dataclass(frozen=True, kw_only=True)
class CoverageConfig:
    """What to measure."""

    caches: tyro.conf.Positional[tuple[Path, ...]]
    """Files that extract-features wrote."""
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Train images per class; each is a quarter of the one two places on."""
    num_draws: int = 25
    """Nested draws of train images."""
    num_repeats: int = 200
    """Extrapolations for each target and number of draws."""
    solver: Solver = "logistic"
    """As in train-head."""
    folder: Path = Path("cache/curve-coverage")
    """Where measured scores and coverage.json go."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Which test images the head of every draw and size got right.

    Attributes:
        num_train: Train images of each size, [K].
        correct: [draws, K, test images] bool.
    """

    num_train: list[int]
    correct: np.ndarray


def main(config: CoverageConfig) -> None:
    """Measure, extrapolate, print a table in Markdown, write coverage.json."""
    config.folder.mkdir(parents=True, exist_ok=True)
    rows = [row for cache in config.caches for row in coverage_of(cache, config)]
    (config.folder / "coverage.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| dataset | fitted to (per class) | target | draws | coverage | mean width | bias |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['dataset']} | {row['fitted']} | {row['target']} | {row['draws']} "
            f"| {row['coverage']:.2f} | {row['width']:.3f} | {row['bias']:+.3f} |"
        )


def coverage_of(cache: Path, config: CoverageConfig) -> list[dict[str, Any]]:
    """The table's rows for one cache: each target, from one draw and from three."""
    scores = measured(cache, config)
    return [
        {
            "dataset": FeatureCache(cache).meta.dataset.name,
            "fitted": ", ".join(map(str, config.sizes[: place - QUARTER + 1])),
            "target": config.sizes[place],
            "draws": draws,
            **coverage(scores, place, draws, config.num_repeats),
        }
        for place in range(QUARTER + 2, len(config.sizes))
        for draws in (1, 3)
    ]


def measured(cache: Path, config: CoverageConfig) -> Scores:
    """Fit the heads, or take what was measured earlier."""
    path = config.folder / f"{cache.stem}-{config.solver}.json"
    asked = {**dataclasses.asdict(config), "digest": FeatureCache(cache).digest.hex()}
    asked = {name: str(asked[name]) for name in ("sizes", "num_draws", "solver", "digest")}
    if not path.is_file() or json.loads(path.read_text())["asked"] != asked:
        path.write_text(json.dumps({"asked": asked, **fit_all(cache, config)}))
    values = json.loads(path.read_text())
    correct = np.array([[list(map(int, size)) for size in draw] for draw in values["correct"]])
    return Scores(num_train=values["num_train"], correct=correct.astype(bool))


def fit_all(cache: Path, config: CoverageConfig) -> dict[str, Any]:
    """Every draw at every size; what is right as text of zeros and ones."""
    train = FeatureCache(cache).split("train")
    head = TrainHeadConfig(
        cache=cache,
        solver=config.solver,
        columns="auto" if config.solver == "knn" else "last",
        output=config.folder / "head.safetensors",
    )
    correct, num_train = [], []
    for draw in range(config.num_draws):
        rows = [nested_rows(train.ids, train.y, size, draw) for size in config.sizes]
        runs = [train_head_report(dataclasses.replace(head, seed=draw), each) for each in rows]
        correct.append(["".join("01"[r] for r in run.test.correct()) for run in runs if run.test])
        num_train = [len(each) for each in rows]
    return {"num_train": num_train, "correct": correct}


def coverage(scores: Scores, place: int, draws: int, num_repeats: int) -> dict[str, float]:
    """How often the interval at a target holds a further draw, how wide and how wrong it is.

    Args:
        scores: What was measured.
        place: The target's among the sizes.
        draws: Draws to fit.
        num_repeats: How often to try.
    """
    random = np.random.default_rng(0)
    num_draws, _, num_test = scores.correct.shape
    known = range(place - QUARTER + 1)
    held, widths, errors = [], [], []
    for _ in range(num_repeats):
        chosen = random.permutation(num_draws)[: draws + 1]
        half = random.permutation(num_test)[: num_test // 2]
        top1 = scores.correct[chosen][..., half].mean(axis=2)
        sizes = [scores.num_train[i] for i in known]
        [(middle, low, high)] = extrapolate(
            sizes, [top1[:draws, i].tolist() for i in known], len(half), [scores.num_train[place]]
        )
        right = top1[draws, place]
        held.append(low <= right <= high)
        widths.append(high - low)
        errors.append(middle - right)
    found = {"coverage": held, "width": widths, "bias": errors}
    return {"level": LEVEL, **{name: float(np.mean(values)) for name, values in found.items()}}


if __name__ == "__main__":
    main(tyro.cli(CoverageConfig))

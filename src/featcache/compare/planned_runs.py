"""Which runs a comparison consists of, on which samples, in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.config import CompareConfig, JsonObject
from featcache.finetune.checkpoint import run_key
from featcache.groups import whole_groups_first
from featcache.results.learning_curve import CurveMode

Ints = NDArray[np.int64]
FORMAT = 1
"""Increased whenever the same settings come to mean a different run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """One run.

    Attributes:
        mode: What to train.
        size: Train images per class as text, or "all".
        draw: Which draw of train images, from 0.
        seed: Of the draw and of training.
        rows: Train rows, [n], indices of the usable train images, ascending.
        key: A hash of everything that decides the outcome: 64 hex digits.
    """

    mode: CurveMode
    size: str
    draw: int
    seed: int
    rows: Ints
    key: str

    @property
    def name(self) -> str:
        """For file names: "finetune-20-draw0"."""
        return f"{self.mode}-{self.size}-draw{self.draw}"

    @property
    def title(self) -> str:
        """For people."""
        what = {"cached": "cached head", "tail": "tail", "finetune": "fine-tune"}[self.mode]
        count = "all" if self.size == "all" else f"{self.size} per class"
        return f"{what}, {count} ({len(self.rows):,} images), seed {self.seed}"


def nested_rows(
    ids: Sequence[str],
    labels: Ints,
    per_class: int | None,
    seed: int,
    groups: Sequence[str] | None = None,
) -> Ints:
    """Train rows of one size: `per_class` of every class, or all of them.

    A class's rows are ranked by a hash of seed and id, so the rows of a size are among those of
    every larger one, and do not depend on the order of the dataset.

    Args:
        ids: Names of the train images, [N].
        labels: Their classes, [N].
        per_class: How many of each class; None for all.
        seed: Different seeds draw different rows.
        groups: Their groups, [N], if there are any: each class takes one after the other.

    Returns:
        Row numbers, ascending.
    """
    if per_class is None:
        return np.arange(len(labels))
    ranks = [hashlib.sha256(f"{seed}\0compare\0{name}".encode()).digest() for name in ids]
    order = np.array(sorted(range(len(ids)), key=lambda row: (ranks[row], row)))
    order = whole_groups_first(groups, order)
    rows = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def plan_runs(
    config: CompareConfig,
    ids: Sequence[str],
    labels: Ints,
    decisive: dict[CurveMode, JsonObject],
    groups: Sequence[str] | None = None,
) -> list[PlannedRun]:
    """Every run, the most important first: all sizes of a draw before the next draw.

    Within a draw the largest size comes first, since it is the data that a user has, then the
    others from the smallest up; the tail, which decides nothing, after all of them. A size that
    includes every train image counts as "all".

    Args:
        config: The command's settings.
        ids: Names of the usable train images, [N].
        labels: Their classes, [N].
        decisive: By mode, what decides a run's outcome besides its samples and seed.
        groups: Their groups, [N], if there are any.
    """
    largest = int(np.bincount(labels).max())
    sizes: list[int | None] = [n for n in config.wanted_sizes() if n is not None and n < largest]
    if len(sizes) < len(config.wanted_sizes()):
        sizes.append(None)
    sizes = [sizes[-1], *sizes[:-1]]
    runs = []
    for draw in range(config.num_seeds):
        seed = (config.seed + draw) % 2**32
        of_draw = []
        for size in sizes:
            rows = nested_rows(ids, labels, size, seed, groups)
            samples = hashlib.sha256("\0".join(ids[row] for row in rows).encode()).hexdigest()
            name = "all" if size is None else str(size)
            for mode, settings in decisive.items():
                facts = {"format": FORMAT, "mode": mode, "seed": seed, "samples": samples}
                key = run_key({**settings, **facts})
                of_draw.append(
                    PlannedRun(mode=mode, size=name, draw=draw, seed=seed, rows=rows, key=key)
                )
        runs += sorted(of_draw, key=lambda run: run.mode == "tail")
    return runs

"""Runs of a comparison made up from figures that a person can check."""

from __future__ import annotations

import numpy as np

from featcache.results import CurveRun

NUM_TEST = 500


def cell(
    mode: str,
    size: str,
    num_train: int,
    num_right: int,
    *,
    seed: int = 0,
    cost: float = 1.0,
    trial: float = 0.5,
    first_right: int = 0,
) -> CurveRun:
    """`num_right` of 500 test images right, counted from image `first_right` on."""
    labels = np.arange(NUM_TEST) % 10
    predicted = (labels + 1) % 10
    right = slice(first_right, first_right + num_right)
    predicted[right] = labels[right]
    assert (labels == predicted).sum() == num_right
    return CurveRun(
        mode=mode,
        size=size,
        num_train=num_train,
        seed=seed,
        labels=labels,
        predicted=predicted,
        cost_seconds=cost,
        trial_seconds=trial,
    )


def pair(size: str, num_train: int, cached: int, tuned: int, seed: int = 0) -> list[CurveRun]:
    """Both modes; a fine-tune costs 120 s, a first head 6 s, each further one 0.5 s."""
    return [
        cell("cached", size, num_train, cached, seed=seed, cost=6.0, trial=0.5),
        cell("finetune", size, num_train, tuned, seed=seed, cost=120.0, trial=120.0),
    ]

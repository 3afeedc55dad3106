"""Few-shot samples: K train rows of each class, drawn several times."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from featcache.groups import whole_groups_first
from featcache.heads.linear import Ints


def draw_shots(
    y: Ints, shots: int, seed: int, number: int, groups: ArrayLike | None = None
) -> Ints:
    """Draw rows of one few-shot sample.

    Args:
        y: Class indices [N].
        shots: Rows per class; a class with fewer gives all it has.
        seed: The run's seed.
        number: Which sample, from 0.
        groups: The group of each row [N], if there are any: a class takes one after the other, so
            that a small sample is one of few groups, as small datasets are.

    Returns:
        Row numbers, ascending.
    """
    random = np.random.default_rng([seed, 0x5407, number])
    if groups is None:
        drawn = [random.permutation(np.flatnonzero(y == label))[:shots] for label in np.unique(y)]
    else:
        order = whole_groups_first(groups, random.permutation(len(y)))
        drawn = [order[y[order] == label][:shots] for label in np.unique(y)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def shots_summary(
    shots: int, y: Ints, class_names: list[str], scores: list[dict[str, Any]]
) -> dict[str, Any]:
    """Mean and spread over the samples.

    Args:
        shots: Rows per class.
        y: Class indices of all train rows [N].
        class_names: Names of the C classes.
        scores: One entry per sample, with its `test_top1`.

    Returns:
        `std` is the sample standard deviation, None for one sample; `short_classes` are those
        that have fewer rows.
    """
    top1 = np.array([score["test_top1"] for score in scores])
    counts = np.bincount(y, minlength=len(class_names))
    return {
        "shots": shots,
        "num_seeds": len(scores),
        "mean": float(top1.mean()),
        "std": float(top1.std(ddof=1)) if len(top1) > 1 else None,
        "seeds": scores,
        "short_classes": [n for n, k in zip(class_names, counts, strict=True) if k < shots],
    }

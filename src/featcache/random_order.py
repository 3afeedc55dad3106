"""Initial weights and the order of rows, shared by cached and uncached training.

A head trained on cached features and one trained with the frozen network in the loop must end with
the same weights, so both take their random numbers from here. Every draw depends only on its
arguments: not on the training library, the batch size, or earlier draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# One stream of random numbers per purpose, so that draws are independent.
_INIT, _ORDER, _FLIP, _VIEW = range(4)


def init_linear(
    feature_dim: int, num_classes: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Initial weights of a linear head, uniform as in a fresh `nn.Linear`.

    Args:
        feature_dim: Width D of the features.
        num_classes: Number C of outputs.
        seed: The run's seed.

    Returns:
        Weight [C, D] and bias [C], float32, uniform within plus and minus 1/sqrt(D).
    """
    random = np.random.default_rng([seed, _INIT])
    bound = 1.0 / np.sqrt(feature_dim)
    weight = random.uniform(-bound, bound, (num_classes, feature_dim)).astype(np.float32)
    bias = random.uniform(-bound, bound, num_classes).astype(np.float32)
    return weight, bias


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the rows.

    Args:
        num_rows: Number N of train rows.
        seed: The run's seed.
        epoch: Counted from 0.

    Returns:
        A permutation of 0 .. N-1, [N] int64.
    """
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(num_rows)


def flip_mask(num_rows: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Which rows are mirrored in an epoch, each with probability one half.

    Args:
        num_rows: Number N of train rows.
        seed: The run's seed.
        epoch: Counted from 0.

    Returns:
        [N] bool, by row number (not by position within the epoch's order).
    """
    return np.random.default_rng([seed, _FLIP, epoch]).random(num_rows) < 0.5


def epoch_views(num_rows: int, num_views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which cached view of every row is used in an epoch.

    With two views this is `flip_mask`: view 0 plain, view 1 mirrored.

    Args:
        num_rows: Number N of train rows.
        num_views: Number V of cached views, at least 1.
        seed: The run's seed.
        epoch: Counted from 0.

    Returns:
        View numbers below V, [N] int64, by row number.
    """
    if num_views == 1:
        return np.zeros(num_rows, np.int64)
    if num_views == 2:
        return flip_mask(num_rows, seed, epoch).astype(np.int64)
    return np.random.default_rng([seed, _VIEW, epoch]).integers(num_views, size=num_rows)

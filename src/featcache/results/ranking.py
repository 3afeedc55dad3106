"""Areas under curves: rows are ranked once, and each resample is a weight for every row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]
Counts = NDArray[np.float32]


class Ranking(NamedTuple):
    """Rows by the K different values of a score, highest first, in B resamples.

    Attributes:
        thresholds: The values [K].
        true: How often positive rows with each value were drawn [K, B] float32: whole numbers.
        false: The other rows, likewise.
    """

    thresholds: Doubles
    true: Counts
    false: Counts

    def auroc(self) -> Doubles:
        """Area under the ROC curve [B]; NaN without rows of either kind."""
        above = self.true.cumsum(axis=0)
        area = ((above - self.true / 2) * self.false).sum(axis=0, dtype=np.float64)
        return ratio(area, above[-1] * self.false.sum(axis=0, dtype=np.float64))

    def average_precision(self) -> Doubles:
        """Precision averaged over gains in recall [B]; NaN without positive rows."""
        gains = self.true.any(axis=1)  # other values gain no recall
        above, ranked = self.true.cumsum(axis=0), (self.true + self.false).cumsum(axis=0)
        true = self.true[gains].astype(np.float64)
        gained = (true * above[gains] / np.maximum(ranked[gains], 1)).sum(axis=0)
        return ratio(gained, above[-1].astype(np.float64))


def rank(positive: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> Ranking:
    """Count rows by the values of a score.

    Args:
        positive: Whether a row is positive [N] bool.
        score: [N].
        weights: How often each resample drew a row [N, B]; unless given, all rows count once.
    """
    truth, values = np.asarray(positive, bool), np.asarray(score, np.float64)
    order = np.argsort(-values, kind="stable")
    values = values[order]
    drawn = np.ones((len(values), 1)) if weights is None else np.asarray(weights)
    drawn = drawn.astype(np.float32, copy=False)
    drawn = drawn[order]
    true = drawn * truth[order][:, None]
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    if len(starts) < len(values):  # rows of equal score are above a threshold together
        drawn, true = np.add.reduceat(drawn, starts), np.add.reduceat(true, starts)
    return Ranking(values[starts], true, drawn - true)


def ratio(part: Doubles, whole: Doubles) -> Doubles:
    """A part over a whole, elementwise; NaN where there is no whole."""
    found: Doubles = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return found


def resample(num_rows: int, num_resamples: int, groups: ArrayLike | None, seed: int) -> Counts:
    """How often each row is drawn, [N, 1 + num_resamples]; in the first, every row once.

    Args:
        num_rows: N.
        num_resamples: Bootstrap draws with replacement.
        groups: Each row's group [N]; whole groups are drawn where given, since rows of
            one group err together.
        seed: Of the draws.
    """
    unit = np.arange(num_rows)
    if groups is not None:
        _, unit = np.unique(np.asarray(groups), return_inverse=True)
    num_units = int(unit.max()) + 1
    random = np.random.default_rng([seed, 0xB007])
    drawn = random.integers(num_units, size=(num_units, num_resamples))
    drawn = drawn * num_resamples + np.arange(num_resamples)
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_units)
    counts = counts.reshape(num_units, num_resamples)[unit]
    return np.concatenate([np.ones((num_rows, 1)), counts], axis=1, dtype=np.float32)

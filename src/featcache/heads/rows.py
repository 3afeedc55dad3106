"""Rows that a head trains on: cached views, labels and weights, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import UserError
from featcache.heads.linear import Floats, row_blocks

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Features with what is needed to learn from them.

    Attributes:
        views: Features [V, N, D], any float type; view 0 is the plain image.
        y: Class indices [N].
        weights: What each row counts for, [N], above zero.
        num_classes: Number C of classes, whether or not each has rows.
    """

    views: Floats
    y: Ints
    weights: Doubles
    num_classes: int

    @property
    def num_rows(self) -> int:
        """Number N of rows, views not counted."""
        return len(self.y)

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return int(self.views.shape[2])

    @property
    def plain(self) -> Floats:
        """View 0, [N, D]."""
        plain: Floats = self.views[0]
        return plain

    def take(self, index: Ints) -> Rows:
        """The rows at `index`, all their views, copied."""
        return Rows(
            views=self.views[:, index],
            y=self.y[index],
            weights=self.weights[index],
            num_classes=self.num_classes,
        )

    def stacked(self) -> tuple[Floats, Ints, Doubles]:
        """Every view as a row of its own: features [V * N, D], labels, weights over V.

        One view is not copied.
        """
        num_views = len(self.views)
        features = self.views.reshape(-1, self.feature_dim)
        return features, np.tile(self.y, num_views), np.tile(self.weights / num_views, num_views)


def check_rows(
    views: Floats, y: Ints, ids: Sequence[str], class_names: Sequence[str], split: str
) -> None:
    """Refuse rows that no head can learn from or be scored on.

    Args:
        views: Features [V, N, D].
        y: Class indices [N].
        ids: N sample ids, for messages.
        class_names: Names of the C classes.
        split: The split's name, for messages.

    Raises:
        UserError: No rows, a label outside the classes, or a value that is not finite.
    """
    if not len(y):
        raise UserError(f"split {split!r} has no rows; run extract-features with more images")
    wrong = np.flatnonzero((y < 0) | (y >= len(class_names)))
    if wrong.size:
        row = int(wrong[0])
        raise UserError(
            f"sample {ids[row]!r} of {split!r} has label {int(y[row])}, but there are "
            f"{len(class_names)} classes; run verify on the cache"
        )
    for view in views:
        for rows, block in row_blocks(view):
            # A sum is finite when all its terms are; only a suspicious block is looked through.
            if not np.isfinite(block.sum(dtype=np.float64)):
                check_finite(block, ids[rows.start : rows.stop], split)


def check_finite(block: Floats, ids: Sequence[str], split: str) -> None:
    """Refuse features [n, D] that hold NaN or infinity.

    Raises:
        UserError: Naming the first such sample.
    """
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if bad.size:
        raise UserError(
            f"features of sample {ids[int(bad[0])]!r} in {split!r} are not finite; run verify on "
            "the cache, then extract-features again"
        )


def check_classes(y: Ints, class_names: Sequence[str]) -> None:
    """Refuse to tell fewer than two classes apart.

    Raises:
        UserError: Fewer than two classes have rows.
    """
    present = np.unique(y)
    if len(present) < 2:
        raise UserError(
            f"every train row is {class_names[int(present[0])]!r}: a head needs rows of at least "
            "two classes; run extract-features with more images or another dataset"
        )


def balanced_weights(y: Ints, weights: Doubles, num_classes: int) -> Doubles:
    """Weights [N] changed so that every class with rows counts alike; their sum stays.

    Args:
        y: Class indices [N].
        weights: What each row counts for otherwise [N].
        num_classes: Number C of classes.
    """
    totals = np.bincount(y, weights, num_classes)
    present = np.count_nonzero(totals)
    share = np.divide(1.0, totals, out=np.zeros(num_classes), where=totals > 0)
    return np.asarray(weights * share[y] * (totals.sum() / present))

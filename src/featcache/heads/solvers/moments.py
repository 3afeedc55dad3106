"""Weighted sums over rows: means, deviations and closed forms follow from them.

Rows can come in blocks and be forgotten, and the sums of disjoint sets of rows add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from featcache.heads.features import Doubles, Floats, Ints


@dataclass(eq=False)
class Moments:
    """Weighted sums of features and, optionally, of their products.

    Features are taken relative to `shift`, a point near their mean, so that large offsets do not
    cancel digits.

    Attributes:
        shift: [D].
        first: Sum of s (x - shift), [D].
        square: Sum of s (x - shift)^2, [D].
        class_total: Sum of s by class, [C].
        second: Sum of s (x - shift) (x - shift)^T, [D, D]; None where products are not needed.
        cross: Sum of s (x - shift) onehot(y)^T, [D, C]; likewise.
    """

    shift: Doubles
    first: Doubles
    square: Doubles
    class_total: Doubles
    second: Doubles | None = None
    cross: Doubles | None = None

    @classmethod
    def empty(cls, shift: Floats, num_classes: int, *, products: bool) -> Self:
        """Sums of no rows."""
        dim = len(shift)
        return cls(
            shift=shift.astype(np.float64),
            first=np.zeros(dim),
            square=np.zeros(dim),
            class_total=np.zeros(num_classes),
            second=np.zeros((dim, dim)) if products else None,
            cross=np.zeros((dim, num_classes)) if products else None,
        )

    @property
    def total(self) -> float:
        """Sum of s."""
        return float(self.class_total.sum())

    def add(self, X: Floats, y: Ints, weights: Doubles) -> None:
        """Add rows: features [n, D] of float32 or float64, class indices [n], weights [n]."""
        shifted = X - self.shift.astype(X.dtype)
        self.class_total += np.bincount(y, weights, len(self.class_total))
        if self.second is None or self.cross is None:
            share = weights.astype(X.dtype)
            self.first += share @ shifted
            self.square += share @ np.square(shifted, out=shifted)
            return
        root = np.sqrt(weights).astype(X.dtype)
        if not (weights == 1).all():
            shifted *= root[:, None]
        onehot = np.zeros((len(y), len(self.class_total)), X.dtype)
        onehot[np.arange(len(y)), y] = root
        self.first += root @ shifted
        self.second += shifted.T @ shifted
        self.cross += shifted.T @ onehot
        self.square = self.second.diagonal().copy()

    def plus(self, other: Moments) -> Moments:
        """The sums of both sets of rows; `other` has the same shift and the same parts."""
        assert np.array_equal(self.shift, other.shift)

        def added(a: Doubles | None, b: Doubles | None) -> Doubles | None:
            assert (a is None) == (b is None)
            return None if a is None or b is None else a + b

        return Moments(
            shift=self.shift,
            first=self.first + other.first,
            square=self.square + other.square,
            class_total=self.class_total + other.class_total,
            second=added(self.second, other.second),
            cross=added(self.cross, other.cross),
        )

    def mean(self) -> Doubles:
        """Mean of every feature, [D]."""
        return np.asarray(self.shift + self.first / self.total)

    def deviation(self) -> Doubles:
        """Standard deviation of every feature [D]; 1 where it never changes but for rounding."""
        square = self.square / self.total
        variance = square - (self.first / self.total) ** 2
        rounding = 1e-10 * (square + self.shift**2)
        return np.asarray(np.where(variance > rounding, np.sqrt(variance.clip(min=0)), 1.0))

    def centered(self) -> tuple[Doubles, Doubles]:
        """Covariance of the features [D, D], and with the one-hot labels [D, C]."""
        assert self.second is not None
        assert self.cross is not None
        total = self.total
        covariance = self.second / total - np.outer(self.first, self.first) / total**2
        cross = self.cross / total - np.outer(self.first, self.class_total) / total**2
        return covariance, cross

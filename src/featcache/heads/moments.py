"""Sums over rows from which closed forms follow; rows can come in blocks and be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from featcache.heads.linear import Floats
from featcache.heads.rows import Doubles, Ints


@dataclass(eq=False)
class Moments:
    """Weighted sums of features, their products, and their products with one-hot labels.

    Features are taken relative to `shift`, some point near their mean, so that large offsets do
    not cancel digits away. Sums of disjoint rows add up.

    Attributes:
        shift: [D].
        first: Sum of s x, [D].
        second: Sum of s x x^T, [D, D].
        cross: Sum of s x onehot(y)^T, [D, C].
        class_total: Sum of s by class, [C].
    """

    shift: Doubles
    first: Doubles
    second: Doubles
    cross: Doubles
    class_total: Doubles

    @classmethod
    def empty(cls, shift: Doubles, num_classes: int) -> Self:
        """Of no rows."""
        dim = len(shift)
        return cls(
            shift=shift.astype(np.float64),
            first=np.zeros(dim),
            second=np.zeros((dim, dim)),
            cross=np.zeros((dim, num_classes)),
            class_total=np.zeros(num_classes),
        )

    @property
    def total(self) -> float:
        """Sum of s."""
        return float(self.class_total.sum())

    def add(self, X: Floats, y: Ints, weights: Doubles) -> None:
        """Add rows: features [n, D] of float32 or float64, class indices [n], weights [n]."""
        root = np.sqrt(weights).astype(X.dtype)
        shifted = X - self.shift.astype(X.dtype)
        if not (weights == 1).all():
            shifted *= root[:, None]
        onehot = np.zeros((len(y), len(self.class_total)), X.dtype)
        onehot[np.arange(len(y)), y] = root
        self.first += root @ shifted
        self.second += shifted.T @ shifted
        self.cross += shifted.T @ onehot
        self.class_total += np.bincount(y, weights, len(self.class_total))

    def plus(self, other: Moments, sign: float = 1.0) -> Moments:
        """Of both sets of rows; with sign -1, of these without the other's.

        Args:
            other: With the same shift.
            sign: 1 or -1.
        """
        assert np.array_equal(self.shift, other.shift)
        return Moments(
            self.shift,
            self.first + sign * other.first,
            self.second + sign * other.second,
            self.cross + sign * other.cross,
            self.class_total + sign * other.class_total,
        )

    def mean(self) -> Doubles:
        """Mean of the features [D]."""
        return np.asarray(self.shift + self.first / self.total)

    def centred(self) -> tuple[Doubles, Doubles]:
        """Covariance of the features [D, D], and with the one-hot labels [D, C]."""
        total = self.total
        covariance = self.second / total - np.outer(self.first, self.first) / total**2
        cross = self.cross / total - np.outer(self.first, self.class_total) / total**2
        return covariance, cross

    def deviation(self) -> Doubles:
        """Standard deviation of every feature [D]; 1 where it never changes but for rounding."""
        return self.scale().deviation()

    def scale(self) -> ScaleSums:
        """The part that mean and deviation follow from."""
        square = self.second.diagonal().copy()
        return ScaleSums(self.shift, self.total, self.first.copy(), square)


@dataclass(eq=False)
class ScaleSums:
    """Weighted sums from which every feature's mean and deviation follow.

    Attributes:
        shift: Some point near the mean, [D].
        total: Sum of s.
        first: Sum of s (x - shift), [D].
        square: Sum of s (x - shift)^2, [D].
    """

    shift: Doubles
    total: float
    first: Doubles
    square: Doubles

    @classmethod
    def empty(cls, shift: Doubles) -> Self:
        """Of no rows."""
        return cls(shift.astype(np.float64), 0.0, np.zeros(len(shift)), np.zeros(len(shift)))

    def add(self, X: Floats, weights: Doubles) -> None:
        """Add rows: features [n, D] of float32 or float64, weights [n]."""
        share = weights.astype(X.dtype)
        shifted = X - self.shift.astype(X.dtype)
        self.first += share @ shifted
        self.square += share @ np.square(shifted, out=shifted)
        self.total += float(weights.sum())

    def mean(self) -> Doubles:
        """Mean of the features [D]."""
        return np.asarray(self.shift + self.first / self.total)

    def deviation(self) -> Doubles:
        """Standard deviation of every feature [D]; 1 where it never changes but for rounding."""
        square = self.square / self.total
        variance = square - (self.first / self.total) ** 2
        rounding = 1e-10 * (square + self.shift**2)
        return np.asarray(np.where(variance > rounding, np.sqrt(variance.clip(min=0)), 1.0))

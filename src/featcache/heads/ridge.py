"""Ridge regression onto one-hot labels: one eigendecomposition serves every strength.

With weights s of sum S, rows and labels centred, the minimiser of

    sum_i s_i |onehot(y_i) - W x_i - b|^2 + alpha |W|^2

is W^T = (M + alpha / S)^-1 K, with M the covariance of the features and K their covariance with the
labels. With M = Q V Q^T it is Q (V + alpha / S)^-1 (Q^T K): after one decomposition a strength
costs one small product. Where there are fewer rows than features, the rows' inner products, [N, N],
are decomposed instead; the formula has the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.heads.linear import Floats, row_blocks
from featcache.heads.logistic import ABSENT_BIAS, SMALL, Fit, moments
from featcache.heads.moments import Moments
from featcache.heads.rows import Doubles, Rows

# Rows on which the sharpness of the probabilities is set.
CALIBRATION_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeProblem:
    """Rows decomposed, for any strength: W^T = basis @ (targets / (values + alpha / total)).

    Attributes:
        basis: Orthonormal directions [D, R]; R is at most the smaller of rows and features.
        values: Eigenvalues [R].
        targets: [R, C].
        mean: Of the features [D].
        deviation: What features were divided by [D]; None for plain ones.
        class_share: Mean of the one-hot labels [C].
        total: Sum S of the weights.
    """

    basis: Doubles
    values: Doubles
    targets: Doubles
    mean: Doubles
    deviation: Doubles | None
    class_share: Doubles
    total: float

    def fit(self, alpha: float) -> Fit:
        """The head for one strength, of raw features; its scores estimate one-hot labels.

        Args:
            alpha: scikit-learn's `Ridge(alpha)`, above zero.
        """
        weight = (self.basis @ (self.targets / (self.values + alpha / self.total)[:, None])).T
        if self.deviation is not None:
            weight = weight / self.deviation
        bias = self.class_share - weight @ self.mean
        weight[self.class_share == 0], bias[self.class_share == 0] = 0.0, ABSENT_BIAS
        standardized = self.deviation is not None
        return Fit(
            weight=weight,
            bias=bias,
            mean=self.mean if standardized else None,
            scale=self.deviation,
            num_passes=1,
        )

    def leverage(self, X: Floats, alpha: float) -> Doubles:
        """How much each fitted row of weight one moves its own estimate, [n].

        Args:
            X: Raw features [n, D].
            alpha: The strength.
        """
        scaled = (X - self.mean) / (1.0 if self.deviation is None else self.deviation)
        projected = scaled @ self.basis
        lam = alpha / self.total
        return np.asarray((1 + (projected**2 / (self.values + lam)).sum(axis=1)) / self.total)


def ridge_from_moments(sums: Moments, *, standardize: bool) -> RidgeProblem:
    """Decompose the features' covariance.

    Args:
        sums: Over all rows.
        standardize: Whether features are scaled to unit deviation.
    """
    covariance, cross = sums.centred()
    deviation = sums.deviation() if standardize else None
    if deviation is not None:
        covariance = covariance / np.outer(deviation, deviation)
        cross = cross / deviation[:, None]
    values, vectors = np.linalg.eigh(covariance)
    return RidgeProblem(
        basis=vectors,
        values=values.clip(min=0.0),
        targets=vectors.T @ cross,
        mean=sums.mean(),
        deviation=deviation,
        class_share=sums.class_total / sums.total,
        total=sums.total,
    )


def ridge_from_few_rows(rows: Rows, *, standardize: bool) -> RidgeProblem:
    """Decompose the rows' inner products: for fewer rows than features.

    Args:
        rows: Train rows; all views count.
        standardize: Whether features are scaled to unit deviation.
    """
    features, y, weights = rows.stacked()
    total = float(weights.sum())
    share = weights / total
    X = features.astype(np.float64)
    mean, deviation = moments(X, share)
    X -= mean
    if standardize:
        X /= deviation
    root = np.sqrt(share)
    X *= root[:, None]
    onehot = np.zeros((len(y), rows.num_classes))
    onehot[np.arange(len(y)), y] = 1.0
    class_share = share @ onehot
    values, vectors = np.linalg.eigh(X @ X.T)
    # Directions in which the rows do not differ carry nothing, and cannot be scaled to length one.
    some = values > 1e-12 * values[-1]
    values, vectors = values[some], vectors[:, some]
    size = np.sqrt(values)
    return RidgeProblem(
        basis=(X.T @ vectors) / size,
        values=values,
        targets=size[:, None] * (vectors.T @ ((onehot - class_share) * root[:, None])),
        mean=mean,
        deviation=deviation if standardize else None,
        class_share=class_share,
        total=total,
    )


def moments_of(rows: Rows, shift: Doubles | None = None) -> Moments:
    """Sums over all views of rows in memory.

    Args:
        rows: Each view counts with its part of the row's weight.
        shift: See `Moments`; the mean of some rows unless given.
    """
    if shift is None:
        shift = rows.plain[:1024].mean(axis=0, dtype=np.float64)
    sums = Moments.empty(shift, rows.num_classes)
    num_views = len(rows.views)
    exact = np.float64 if rows.views.size <= SMALL else np.float32
    for view in rows.views:
        for cut, block in row_blocks(view):
            sums.add(block.astype(exact, copy=False), rows.y[cut], rows.weights[cut] / num_views)
    return sums


def calibration(problem: RidgeProblem, fit: Fit, rows: Rows, alpha: float) -> float:
    """The factor on scores that makes their softmax fit the labels best.

    Ridge scores estimate one-hot labels; their plain softmax would be far too unsure. Each row's
    score is taken as if the row had been left out (its residual over one minus its leverage), so
    that a close fit of train is not mistaken for certainty.

    Args:
        problem: The decomposed rows.
        fit: Its solution for `alpha`.
        rows: Some or all of the fitted rows.
        alpha: The strength.
    """
    step = max(1, -(-rows.num_rows // CALIBRATION_ROWS))
    X, y = rows.plain[::step].astype(np.float64), rows.y[::step]
    own = rows.weights[::step]
    onehot = np.zeros((len(y), rows.num_classes))
    onehot[np.arange(len(y)), y] = 1.0
    present = problem.class_share > 0
    kept = 1 - np.minimum(problem.leverage(X, alpha) * own, 0.999)
    scores = onehot - (onehot - (X @ fit.weight.T + fit.bias)) / kept[:, None]
    return best_factor(scores[:, present], np.cumsum(present)[y] - 1, own)


def best_factor(scores: Doubles, y: np.ndarray, weights: Doubles) -> float:
    """The positive factor on scores [n, C] that minimises their cross-entropy with labels [n]."""
    centred = scores - scores.max(axis=1, keepdims=True)
    own = centred[np.arange(len(y)), y]
    low, high = np.log(1e-2), np.log(1e4)
    # The loss is convex in the factor: halve the interval on the sign of its slope.
    for _ in range(40):
        middle = (low + high) / 2
        p = np.exp(np.exp(middle) * centred)
        p /= p.sum(axis=1, keepdims=True)
        slope = weights @ ((p * centred).sum(axis=1) - own)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def strength_grid(rows: Rows, num: int = 50) -> Sequence[float]:
    """Strengths for plain features, strong to weak, in proportion to their mean variance.

    Args:
        rows: Train rows; labels play no part.
        num: How many.
    """
    some = rows.plain[:: max(1, rows.num_rows // 4096)].astype(np.float64)
    size = float(some.var(axis=0).mean()) * float(rows.weights.sum())
    return [float(f"{x * (size or 1.0):.4g}") for x in np.logspace(3, -6, num)]

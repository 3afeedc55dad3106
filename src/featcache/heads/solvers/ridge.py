"""Ridge regression onto one-hot labels, or onto numbers: one eigendecomposition serves every alpha.

With weights s of sum S, rows and targets t (one-hot labels) centered, the minimizer of

    sum_i s_i |t_i - W x_i - b|^2 + alpha |W|^2

is W^T = (M + alpha / S)^-1 K, with M the covariance of the features and K their covariance with the
targets. With M = Q V Q^T it is Q (V + alpha / S)^-1 (Q^T K): after one decomposition each alpha
costs one small product. Where there are fewer rows than features, the rows' inner products, [N, N],
are decomposed instead; the formula has the same shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featcache.heads.features import Doubles, Floats, row_blocks
from featcache.heads.linear import ABSENT_BIAS, LinearHead
from featcache.heads.solvers.base import (
    FittedHead,
    HeldOutPredictions,
    Prepared,
    Settings,
    standardize_choices,
)
from featcache.heads.solvers.moments import Moments
from featcache.heads.training_data import SMALL, Rows, TrainRows

# Rows on which the probabilities are calibrated.
CALIBRATION_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeProblem:
    """Rows decomposed, for any alpha: W^T = basis @ (targets / (values + alpha / total)).

    Attributes:
        basis: Orthonormal directions [D, R]; R is at most the smaller of rows and features.
        values: Eigenvalues [R].
        targets: [R, C].
        mean: Of the features [D].
        deviation: What features were divided by [D]; None for plain ones.
        target_mean: Mean of the targets [C]; of one-hot labels it is each class's share.
        total: Sum S of the weights.
        class_names: C names.
        present: Which targets have rows [C]; the others get an output that never wins.
    """

    basis: Doubles
    values: Doubles
    targets: Doubles
    mean: Doubles
    deviation: Doubles | None
    target_mean: Doubles
    total: float
    class_names: list[str]
    present: NDArray[np.bool_]

    def fit(self, alpha: float) -> FittedHead[LinearHead]:
        """The float64 head for one alpha, of raw features; its scores estimate one-hot labels.

        Args:
            alpha: scikit-learn's `Ridge(alpha)`, above zero.
        """
        weight = (self.basis @ (self.targets / (self.values + alpha / self.total)[:, None])).T
        if self.deviation is not None:
            weight = weight / self.deviation
        bias = self.target_mean - weight @ self.mean
        weight[~self.present], bias[~self.present] = 0.0, ABSENT_BIAS
        standardized = self.deviation is not None
        head = LinearHead(
            weight=weight,
            bias=bias,
            mean=self.mean if standardized else None,
            scale=self.deviation,
            class_names=self.class_names,
            solver="ridge",
        )
        return FittedHead(head=head)

    def leverage(self, X: Floats, alpha: float) -> Doubles:
        """How much each fitted row of weight one moves its own estimate, [n].

        Args:
            X: Raw features [n, D].
            alpha: Of the fit.
        """
        scaled = (X - self.mean) / (1.0 if self.deviation is None else self.deviation)
        lengths = self.basis / np.sqrt(self.values + alpha / self.total)
        projected = scaled.astype(X.dtype) @ lengths.astype(X.dtype)
        return np.asarray((1 + np.einsum("nr,nr->n", projected, projected)) / self.total)


def ridge_from_moments(sums: Moments, class_names: list[str], *, standardize: bool) -> RidgeProblem:
    """Decompose the features' covariance.

    Args:
        sums: Over all rows, with products.
        class_names: C names.
        standardize: Whether features are scaled to unit deviation.
    """
    covariance, cross = sums.centered()
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
        target_mean=sums.class_total / sums.total,
        total=sums.total,
        class_names=class_names,
        present=sums.class_total > 0,
    )


def ridge_of(
    rows: TrainRows, *, standardize: bool, sums: Callable[[], Moments] | None = None
) -> RidgeProblem:
    """Decompose rows the cheaper way.

    Args:
        rows: Train rows; all views count.
        standardize: Whether features are scaled to unit deviation.
        sums: Gives their moments with products, if those are needed.
    """
    if isinstance(rows, Rows) and rows.num_values < rows.feature_dim**2:
        return ridge_from_few_rows(rows, standardize=standardize)
    moments = rows.moments(products=True) if sums is None else sums()
    return ridge_from_moments(moments, rows.sample.class_names, standardize=standardize)


def ridge_from_few_rows(rows: Rows, *, standardize: bool) -> RidgeProblem:
    """Decompose the rows' inner products: for fewer rows than features.

    Args:
        rows: Train rows; all views count.
        standardize: Whether features are scaled to unit deviation.
    """
    _, y, _ = rows.stacked()
    onehot = np.zeros((len(y), rows.num_classes))
    onehot[np.arange(len(y)), y] = 1.0
    return ridge_to_targets(
        rows,
        onehot,
        rows.class_names,
        present=np.bincount(y, minlength=rows.num_classes) > 0,
        standardize=standardize,
    )


def ridge_to_targets(
    rows: Rows,
    targets: Doubles,
    names: list[str],
    *,
    present: NDArray[np.bool_],
    standardize: bool,
) -> RidgeProblem:
    """Decompose rows in memory, by their inner products where they are fewer than the features.

    Args:
        rows: Train rows; all views count, labels do not.
        targets: What to estimate, [V * N, C], views one after the other.
        names: C names.
        present: See `RidgeProblem`.
        standardize: Whether features are scaled to unit deviation.
    """
    features, _, weights = rows.stacked()
    total = float(weights.sum())
    share = weights / total
    moments = rows.moments()
    mean, deviation = moments.mean(), moments.deviation()
    X = features.astype(np.float64) - mean
    if standardize:
        X /= deviation
    root = np.sqrt(share)[:, None]
    X *= root
    target_mean = share @ targets
    T = (targets - target_mean) * root
    if len(X) < X.shape[1]:
        values, vectors = np.linalg.eigh(X @ X.T)
        # Directions in which the rows do not differ have no information and no length to divide by.
        some = values > 1e-12 * values[-1]
        values, vectors = values[some], vectors[:, some]
        size = np.sqrt(values)
        basis, projected = (X.T @ vectors) / size, size[:, None] * (vectors.T @ T)
    else:
        values, basis = np.linalg.eigh(X.T @ X)
        values, projected = values.clip(min=0.0), basis.T @ (X.T @ T)
    return RidgeProblem(
        basis=basis,
        values=values,
        targets=projected,
        mean=mean,
        deviation=deviation if standardize else None,
        target_mean=target_mean,
        total=total,
        class_names=names,
        present=present,
    )


def calibration(problem: RidgeProblem, head: LinearHead, rows: Rows, alpha: float) -> float:
    """The factor on scores that makes their softmax fit the labels best.

    Ridge scores estimate one-hot labels; their plain softmax would be far too uncertain. Each row's
    score is taken as if the row had been left out (its residual over one minus its leverage), so
    that overfitting is not mistaken for certainty.

    Args:
        problem: The decomposed rows.
        head: Its solution for `alpha`.
        rows: Some or all of the fitted rows.
        alpha: Of the fit.
    """
    step = -(-rows.num_rows // CALIBRATION_ROWS)
    exact = np.float64 if rows.num_values <= SMALL else np.float32
    X: Floats = rows.plain[::step].astype(exact)
    y, own = rows.y[::step], rows.weights[::step]
    onehot = np.eye(rows.num_classes)[y]
    present = problem.present
    kept = 1 - np.minimum(problem.leverage(X, alpha) * own, 0.999)
    scores = onehot - (onehot - (X @ head.weight.T + head.bias)) / kept[:, None]
    return best_factor(scores[:, present], np.cumsum(present)[y] - 1, own)


def best_factor(scores: Doubles, y: np.ndarray, weights: Doubles) -> float:
    """The positive factor on scores [n, C] that minimizes their cross-entropy with labels [n]."""
    centered = scores - scores.max(axis=1, keepdims=True)
    own = centered[np.arange(len(y)), y]
    low, high = np.log(1e-2), np.log(1e4)
    # The loss is convex in the factor: halve the interval on the sign of its slope.
    for _ in range(40):
        middle = (low + high) / 2
        p = np.exp(np.exp(middle) * centered)
        p /= p.sum(axis=1, keepdims=True)
        slope = weights @ ((p * centered).sum(axis=1) - own)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def alpha_grid(rows: Rows, num: int = 50) -> Sequence[float]:
    """Alphas for plain features, from large to small, in proportion to their mean variance.

    Args:
        rows: Train rows; labels are not used.
        num: How many.
    """
    some = rows.plain[:: max(1, rows.num_rows // 4096)].astype(np.float64)
    size = float(some.var(axis=0).mean()) * float(rows.weights.sum())
    return [float(f"{x * (size or 1.0):.4g}") for x in np.logspace(3, -6, num)]


@dataclass(frozen=True, kw_only=True)
class RidgeSolver:
    """Ridge regression as `train-head` uses it.

    Attributes:
        alpha: The only alpha to try, if given.
        standardize: Whether to scale features; auto tries both.
    """

    alpha: float | None = None
    standardize: Literal["auto", "on", "off"] = "auto"
    name: str = "ridge"
    backend: str = "numpy"
    patience: int | None = None

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Fifty alphas on plain features, then fifty on standardized ones."""
        series: list[list[Settings]] = []
        for scaled in standardize_choices(self.standardize):
            if self.alpha is not None:
                alphas: Sequence[float] = [self.alpha]
            elif scaled:
                total = float(rows.weights.sum())
                alphas = [float(f"{x * total:.4g}") for x in np.logspace(3, -6, 50)]
            else:
                alphas = alpha_grid(rows)
            series.append([{"alpha": alpha, "standardize": scaled} for alpha in alphas])
        return series

    def default(self) -> Settings:
        """scikit-learn's default, alpha = 1."""
        alpha = 1.0 if self.alpha is None else self.alpha
        return {"alpha": alpha, "standardize": self.standardize == "on"}

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> Prepared:
        """Rows are decomposed when the first candidate is used."""
        return PreparedRidge(rows, candidates)


class PreparedRidge:
    """Rows decomposed once; the heads of all alphas predict in one product."""

    def __init__(self, rows: TrainRows, candidates: Sequence[Settings]) -> None:
        self._rows, self._candidates = rows, candidates
        self._moments: Moments | None = None
        self._problems: dict[bool, RidgeProblem] = {}
        self._predicted: dict[bool, tuple[Rows, list[HeldOutPredictions]]] = {}

    def fit(self, settings: Settings) -> FittedHead[LinearHead]:
        """The head for one alpha, its probabilities calibrated."""
        alpha = float(settings["alpha"])
        problem = self._problem(bool(settings["standardize"]))
        fitted = problem.fit(alpha)
        head = fitted.head
        factor = calibration(problem, head, self._rows.sample, alpha)
        bias = np.where(problem.present, head.bias * factor, head.bias)
        head = head.replace(weight=head.weight * factor, bias=bias)
        return dataclasses.replace(fitted, head=head.to_float32())

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Classes and squared errors; the first call for some rows finds those of all alphas."""
        scaled = bool(settings["standardize"])
        alike = [c for c in self._candidates if c["standardize"] is scaled]
        if scaled not in self._predicted or self._predicted[scaled][0] is not held:
            self._predicted[scaled] = held, self._predict_all(alike, scaled, held)
        return self._predicted[scaled][1][alike.index(settings)]

    def _predict_all(
        self, candidates: Sequence[Settings], scaled: bool, held: Rows
    ) -> list[HeldOutPredictions]:
        problem = self._problem(scaled)
        heads = [problem.fit(float(c["alpha"])).head for c in candidates]
        weight = np.concatenate([head.weight for head in heads]).T
        bias = np.concatenate([head.bias for head in heads])
        classes = np.empty((len(heads), held.num_rows), np.int64)
        losses = np.empty((len(heads), held.num_rows), np.float32)
        for cut, block in row_blocks(held.plain, 1024):
            scores = block @ weight.astype(block.dtype) + bias.astype(block.dtype)
            scores = scores.reshape(len(block), len(heads), -1)
            classes[:, cut] = scores.argmax(axis=2).T
            scores[np.arange(len(block)), :, held.y[cut]] -= 1
            scores *= problem.present  # a class without rows to fit has a bias of its own
            losses[:, cut] = np.einsum("nsc,nsc->sn", scores, scores)
        return [HeldOutPredictions(*pair) for pair in zip(classes, losses, strict=True)]

    def _problem(self, scaled: bool) -> RidgeProblem:
        if scaled not in self._problems:
            self._problems[scaled] = ridge_of(self._rows, standardize=scaled, sums=self._sums)
        return self._problems[scaled]

    def _sums(self) -> Moments:
        if self._moments is None:
            self._moments = self._rows.moments(products=True)
        return self._moments


class ValueRidgeSolver(RidgeSolver):
    """Ridge regression onto the rows' numbers; the least squared error on held-out rows wins."""

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> Prepared:
        """Rows are decomposed when the first candidate is used."""
        assert isinstance(rows, Rows)
        return PreparedValueRidge(rows)


class PreparedValueRidge:
    """Rows with numbers, decomposed once for all alphas."""

    def __init__(self, rows: Rows) -> None:
        assert rows.values is not None
        self._rows, self._values = rows, np.tile(rows.values, len(rows.views))[:, None]
        self._problems: dict[bool, RidgeProblem] = {}

    def fit(self, settings: Settings) -> FittedHead[LinearHead]:
        """The head for one alpha; its one output is the number."""
        fitted = self._fit(settings)
        return dataclasses.replace(fitted, head=fitted.head.to_float32())

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Squared errors; every row counts as its only class."""
        assert held.values is not None
        head = self._fit(settings).head
        logits = head.decision_function(held.plain)
        return HeldOutPredictions(held.y, (logits[:, 0] - held.values) ** 2, logits)

    def _fit(self, settings: Settings) -> FittedHead[LinearHead]:
        scaled = bool(settings["standardize"])
        if scaled not in self._problems:
            self._problems[scaled] = ridge_to_targets(
                self._rows,
                self._values,
                self._rows.class_names,
                present=np.ones(1, bool),
                standardize=scaled,
            )
        return self._problems[scaled].fit(float(settings["alpha"]))

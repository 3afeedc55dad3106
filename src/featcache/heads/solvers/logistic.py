"""Multinomial logistic regression with an L2 penalty, solved to convergence.

The objective is that of scikit-learn's `LogisticRegression(C)`: with S the sum of the weights,

    C * sum_i s_i * cross_entropy_i + |W|^2 / 2,    the bias unpenalized,

divided here by C * S, so that it is a mean loss plus lam / 2 * |W|^2. For two classes scikit-learn
penalizes the difference of the two weight rows instead of both rows; halving C gives the same
classifier. Rows are centered first, which only changes the bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from featcache.heads.features import Doubles, Floats, row_blocks, widen
from featcache.heads.linear import ABSENT_BIAS, LinearHead
from featcache.heads.solvers.base import (
    FittedHead,
    HeldOutPredictions,
    NotConverged,
    Settings,
    cross_entropy_predictions,
    standardize_choices,
)
from featcache.heads.solvers.curvature import ShiftedInverses
from featcache.heads.solvers.few_rows import FewRows, are_few
from featcache.heads.solvers.lbfgs import (
    TOLERANCE,
    Solution,
    minimize,
)
from featcache.heads.solvers.moments import Moments
from featcache.heads.solvers.softmax_loss import Block, SoftmaxLoss, loss_in_memory
from featcache.heads.streaming import StreamedRows
from featcache.heads.training_data import CACHED_ROWS, SMALL, Rows, TrainRows

# Candidates for C, half a decade apart. Few rows of few clean features want strong regularization,
# many correlated features want little.
C_GRID = tuple(float(f"{c:.3g}") for c in np.logspace(-5, 2, 15))
# From this many times as many features as rows on, rows are rotated into one column per row.
WIDE = 4
# How far from its minimum the objective may be while choosing, relative to itself.
SELECTION_TOLERANCE = 1e-4
# The same of streamed rows, where each further digit is another pass over the file.
STREAMED_TOLERANCE = 1e-7


class LogisticProblem:
    """Rows made ready once, for many values of C.

    Args:
        rows: Train rows; all views count, each with its part of the row's weight.
        moments: Sums whose mean, deviation and classes to use instead of the rows' own, where
            the rows are a sample.
    """

    def __init__(self, rows: Rows, moments: Moments | None = None) -> None:
        features, labels, weights = rows.stacked()
        moments = rows.moments() if moments is None else moments
        self.total = float(weights.sum())
        self.class_names = rows.class_names
        self.present = np.flatnonzero(moments.class_total)
        self.y = np.searchsorted(self.present, labels)
        self.share = weights / self.total
        self.mean, self.deviation = moments.mean(), moments.deviation()
        self._centered = _centered(features, self.mean)
        self._scaled: Floats | None = None

    def features(self, *, standardize: bool) -> Floats:
        """Centered rows [N, D], of unit deviation if asked for."""
        if not standardize:
            return self._centered
        if self._scaled is None:
            self._scaled = self._centered / self.deviation.astype(self._centered.dtype)
        return self._scaled

    def loss(self, *, standardize: bool) -> SoftmaxLoss:
        """The loss over these rows and the classes that have any."""
        features = self.features(standardize=standardize)
        return loss_in_memory(features, self.y, self.share, len(self.present))

    def penalty(self, C: float, total: float | None = None) -> float:
        """The objective's lam for scikit-learn's C; `total` replaces the rows' own weight."""
        own = C / 2 if len(self.present) == 2 else C
        return 1.0 / (own * (self.total if total is None else total))

    def fitted(self, solution: Solution, *, standardize: bool) -> FittedHead[LinearHead]:
        """The solution as a float64 head of raw features; classes without rows get their output."""
        weight, bias = solution.point[:-1].T, solution.point[-1]
        if standardize:
            weight = weight / self.deviation
        bias = bias - weight @ self.mean
        full_weight = np.zeros((len(self.class_names), weight.shape[1]))
        full_bias = np.full(len(self.class_names), ABSENT_BIAS)
        full_weight[self.present], full_bias[self.present] = weight, bias
        head = LinearHead(
            weight=full_weight,
            bias=full_bias,
            mean=self.mean if standardize else None,
            scale=self.deviation if standardize else None,
            class_names=self.class_names,
            solver="logistic",
        )
        return FittedHead(
            head=head,
            converged=solution.converged,
            num_passes=solution.num_passes,
            objective=solution.objective,
        )


class LogisticPath:
    """Fits of the same rows with one C after another.

    The solution moves smoothly with the logarithm of C: each fit begins on the straight line
    through the previous two, with the curvature they learned.

    Args:
        problem: The rows.
        standardize: Whether features are scaled to unit deviation.
    """

    def __init__(self, problem: LogisticProblem, *, standardize: bool) -> None:
        self._problem, self._standardize = problem, standardize
        self._before: list[tuple[float, Solution]] = []
        self._few: FewRows | None = None
        self._basis: Doubles | None = None
        X = problem.features(standardize=standardize)
        if WIDE * len(X) <= X.shape[1]:
            # Weights are sums of rows, so as many columns as rows are enough.
            self._basis, triangle = np.linalg.qr(X.T.astype(np.float64))
            X = np.ascontiguousarray(triangle.T, X.dtype)
        rows = X, problem.y, problem.share, len(problem.present)
        if are_few(len(X), X.shape[1], len(problem.present)):
            self._few = FewRows(*rows)
        else:
            self._loss, self._inverses = loss_in_memory(*rows), ShiftedInverses(X)

    def fit(self, C: float, tolerance: float = TOLERANCE) -> FittedHead[LinearHead]:
        """Fit with scikit-learn's C; from small to large is fastest.

        Args:
            C: Inverse strength of the regularization, above zero.
            tolerance: How far the objective may be from its minimum, relative to itself.
        """
        lam, start = self._problem.penalty(C), self._start(np.log(C))
        if self._few is not None:
            solution = self._few.minimize(lam, tolerance, start)
        else:
            pairs = self._before[-1][1].pairs if self._before else None
            solution = minimize(self._loss, lam, self._inverses, start, pairs, tolerance=tolerance)
        self._before = [*self._before[-1:], (np.log(C), solution)]
        return self._problem.fitted(self.last(), standardize=self._standardize)

    def last(self) -> Solution:
        """The last fit, of centered (and scaled) rows."""
        solution = self._before[-1][1]
        if self._basis is None:
            return solution
        point = np.vstack([self._basis @ solution.point[:-1], solution.point[-1:]])
        return dataclasses.replace(solution, point=point, pairs=None)

    def _start(self, log_C: float) -> Doubles | None:
        if not self._before:
            return None
        last, end = self._before[-1]
        if len(self._before) == 1 or last == self._before[0][0]:
            return end.point
        first, begin = self._before[0]
        # No farther than the two are apart: a line is a poor guide to far away.
        ahead = float(np.clip((log_C - last) / (last - first), -1.0, 1.0))
        return np.asarray(end.point + ahead * (end.point - begin.point))


class Path(Protocol):
    """Fits the same rows with one C after another."""

    def fit(self, C: float, tolerance: float) -> FittedHead[LinearHead]:
        """Fit with one C, to a tolerance relative to the objective."""


@dataclass(frozen=True, kw_only=True)
class LogisticSolver:
    """Logistic regression as `train-head` uses it.

    Attributes:
        C: The only C to try, if given.
        standardize: Whether to scale features; auto tries both.
        backend: The library that computes.
    """

    C: float | None = None
    standardize: Literal["auto", "on", "off"] = "auto"
    backend: str = "numpy"
    name: str = "logistic"
    patience: int | None = 4  # two decades of C without gain

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Every C on plain features, then every C on standardized ones."""
        del rows
        grid = C_GRID if self.C is None else (self.C,)
        return [
            [{"C": C, "standardize": scaled} for C in grid]
            for scaled in standardize_choices(self.standardize)
        ]

    def default(self) -> Settings:
        """scikit-learn's default, C = 1."""
        return {"C": 1.0 if self.C is None else self.C, "standardize": self.standardize == "on"}

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> PreparedLogistic:
        """Center the rows, or the sample of streamed ones, once for all candidates."""
        del candidates
        return PreparedLogistic(self, rows)


class PreparedLogistic:
    """Rows ready for logistic regression; each fit starts from the previous one."""

    def __init__(self, solver: LogisticSolver, rows: TrainRows) -> None:
        self._solver, self._rows = solver, rows
        self._problem: LogisticProblem | None = None
        self._paths: dict[bool, Path] = {}

    def fit(self, settings: Settings) -> FittedHead[LinearHead]:
        """Fit to convergence.

        Raises:
            NotConverged: Naming a setting to try.
        """
        if isinstance(self._rows, StreamedRows):
            scaled = bool(settings["standardize"])
            return _converged(fit_streamed(self._rows, settings["C"], standardize=scaled), settings)
        return self._fit(settings, TOLERANCE)

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Predict with a fit whose objective is within a ten-thousandth of its minimum.

        Of streamed rows the sample is fitted: C means the same prior whatever the number of rows.
        """
        return cross_entropy_predictions(self._fit(settings, SELECTION_TOLERANCE).head, held)

    def _fit(self, settings: Settings, tolerance: float) -> FittedHead[LinearHead]:
        scaled = bool(settings["standardize"])
        if scaled not in self._paths:
            # Only one path at a time: each holds a copy of the rows.
            self._paths = {scaled: self._make_path(scaled)}
        return _converged(self._paths[scaled].fit(float(settings["C"]), tolerance), settings)

    def _make_path(self, scaled: bool) -> Path:
        if self._problem is None:
            self._problem = LogisticProblem(self._rows.sample)
        if self._solver.backend == "numpy":
            return LogisticPath(self._problem, standardize=scaled)
        from featcache.heads.solvers import backends

        sklearn = self._solver.backend == "sklearn"
        kind = backends.SklearnPath if sklearn else backends.TorchPath
        return kind(self._problem, standardize=scaled)


def _converged(fitted: FittedHead[LinearHead], settings: Settings) -> FittedHead[LinearHead]:
    """The fit with its head in float32; refused if it did not converge."""
    if not fitted.converged:
        raise NotConverged(
            f"logistic with C {settings['C']:g} did not converge in {fitted.num_passes} passes: "
            "give a smaller --C, or --standardize on"
        )
    return dataclasses.replace(fitted, head=fitted.head.to_float32())


def fit_streamed(rows: StreamedRows, C: float, *, standardize: bool) -> FittedHead[LinearHead]:
    """Fit streamed rows, one pass over the file per evaluation.

    Starts where a fit of the sample ends, with the curvature learned there.
    """
    moments = rows.moments()
    near = LogisticProblem(rows.sample, moments)
    path = LogisticPath(near, standardize=standardize)
    path.fit(C)
    start = path.last()
    solution = minimize(
        streamed_loss(rows, near, standardize=standardize),
        near.penalty(C, moments.total),
        ShiftedInverses(near.features(standardize=standardize)),
        start.point,
        start.pairs,
        tolerance=STREAMED_TOLERANCE,
    )
    return near.fitted(solution, standardize=standardize)


def streamed_loss(rows: StreamedRows, near: LogisticProblem, *, standardize: bool) -> SoftmaxLoss:
    """The loss over streamed rows, which are read anew at each evaluation.

    Args:
        rows: All rows.
        near: A sample of them; rows are centered and scaled in the same way.
        standardize: Whether features are scaled to unit deviation.
    """
    mean = near.mean.astype(np.float32)
    inverse = (1 / near.deviation).astype(np.float32)
    place = np.zeros(len(near.class_names), np.int64)
    place[near.present] = np.arange(len(near.present))
    moments = rows.moments()

    def ready(block: Block) -> Block:
        features, y, weights = block
        X = widen(features) - mean
        if standardize:
            X *= inverse
        return X, place[y], (weights / moments.total).astype(np.float32)

    return SoftmaxLoss(
        blocks=lambda: rows.blocks(ready),
        feature_dim=rows.feature_dim,
        num_classes=len(near.present),
        class_share=moments.class_total[near.present] / moments.total,
    )


def _centered(features: Floats, mean: Doubles) -> Floats:
    """Features [N, D] without their mean; in float64 when they are few, else in float32."""
    dtype = np.float64 if features.size <= SMALL else np.float32
    X = np.empty(features.shape, dtype)
    shift = mean.astype(dtype)
    for rows, block in row_blocks(features, CACHED_ROWS):
        np.subtract(block, shift, out=X[rows])
    return X

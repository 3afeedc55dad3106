"""Multinomial logistic regression with an L2 penalty, solved to convergence.

The objective is scikit-learn's, `LogisticRegression(C=strength)`: with S the sum of the weights,

    strength * sum_i s_i * cross_entropy_i + |W|^2 / 2,    the bias unpenalised,

divided here by strength * S, so that it is a mean loss plus lam / 2 * |W|^2. For two classes
scikit-learn penalises the difference of the two weight rows instead of both rows; halving the
strength gives the same classifier. Rows are centred first, which only the bias notices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featcache.heads.lbfgs import TOLERANCE, Solution, minimise
from featcache.heads.linear import Floats, row_blocks
from featcache.heads.moments import ScaleSums
from featcache.heads.precondition import Spectrum, second_moment_spectrum
from featcache.heads.rows import Doubles, Ints, Rows
from featcache.heads.softmax_loss import SoftmaxLoss, loss_in_memory

# Up to so many values, float64 costs little and reaches the optimum to its last digits.
SMALL = 500_000
# Rows at a time that stay in the processor's cache.
MOMENT_ROWS = 1024
# Weight zero and this bias: a class without train rows is never predicted.
ABSENT_BIAS = -1e4


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fitted linear map of raw features and how it was reached.

    Attributes:
        weight: [C, D] float64.
        bias: [C] float64.
        mean: [D], if the features were standardised.
        scale: [D], likewise.
        converged: Whether the solver reached its tolerance.
        num_passes: Passes over the rows.
        objective: The minimised value: mean loss plus penalty.
    """

    weight: Doubles
    bias: Doubles
    mean: Doubles | None = None
    scale: Doubles | None = None
    converged: bool = True
    num_passes: int = 0
    objective: float | None = None


def moments(X: Floats, share: Doubles) -> tuple[Doubles, Doubles]:
    """Weighted mean and standard deviation of every feature.

    A feature that never changes but for rounding gets deviation 1: it is then left as it is.

    Args:
        X: Features [N, D].
        share: Weights [N] that sum to one.

    Returns:
        Mean [D] and deviation [D], float64.
    """
    sums = ScaleSums.empty(X[0].astype(np.float64))
    for rows, block in row_blocks(X, MOMENT_ROWS):
        sums.add(block, share[rows])
    return sums.mean(), sums.deviation()


class LogisticProblem:
    """Rows made ready once, for many strengths.

    Args:
        rows: Train rows; all views count, each with its part of the row's weight.
        scale: Mean and deviation [D] to use instead of the rows' own.
        present: Numbers of the classes to tell apart, instead of those that have rows.
    """

    def __init__(
        self,
        rows: Rows,
        scale: tuple[Doubles, Doubles] | None = None,
        present: Ints | None = None,
    ) -> None:
        features, labels, weights = rows.stacked()
        self.total = float(weights.sum())
        self.num_classes = rows.num_classes
        if present is None:
            present = np.flatnonzero(np.bincount(labels, minlength=rows.num_classes))
        self.present = present
        self.y = np.searchsorted(present, labels)
        self.share = weights / self.total
        self.mean, self.deviation = moments(features, self.share) if scale is None else scale
        self._centred = _centred(features, self.mean)
        self._scaled: Floats | None = None
        self._spectra: dict[bool, Spectrum] = {}

    def features(self, *, standardize: bool) -> Floats:
        """Centred rows [N, D], of unit deviation if asked for."""
        if not standardize:
            return self._centred
        if self._scaled is None:
            self._scaled = self._centred / self.deviation.astype(self._centred.dtype)
        return self._scaled

    def loss(self, *, standardize: bool) -> SoftmaxLoss:
        """The loss over these rows and the classes that have any."""
        features = self.features(standardize=standardize)
        return loss_in_memory(features, self.y, self.share, len(self.present))

    def spectrum(self, *, standardize: bool) -> Spectrum:
        """For the preconditioner; computed once."""
        if standardize not in self._spectra:
            features = self.features(standardize=standardize)
            self._spectra[standardize] = second_moment_spectrum(features)
        return self._spectra[standardize]

    def penalty(self, strength: float, total: float | None = None) -> float:
        """The objective's lam for scikit-learn's C; `total` stands for the rows' own weight."""
        own = strength / 2 if len(self.present) == 2 else strength
        return 1.0 / (own * (self.total if total is None else total))

    def raw(self, solution: Solution, *, standardize: bool) -> Fit:
        """Undo centring and scaling, and give classes without rows their output."""
        weight, bias = solution.point[:-1].T, solution.point[-1]
        if standardize:
            weight = weight / self.deviation
        bias = bias - weight @ self.mean
        full_weight = np.zeros((self.num_classes, weight.shape[1]))
        full_bias = np.full(self.num_classes, ABSENT_BIAS)
        full_weight[self.present], full_bias[self.present] = weight, bias
        return Fit(
            weight=full_weight,
            bias=full_bias,
            mean=self.mean if standardize else None,
            scale=self.deviation if standardize else None,
            converged=solution.converged,
            num_passes=solution.num_passes,
            objective=solution.objective,
        )


class StrengthPath:
    """Fits of the same rows with one strength after another.

    The solution moves smoothly with the logarithm of the strength: each fit begins on the straight
    line through the two before it, with the curvature that they learnt.

    Args:
        problem: The rows.
        standardize: Whether features are scaled to unit deviation.
    """

    def __init__(self, problem: LogisticProblem, *, standardize: bool) -> None:
        self._problem, self._standardize = problem, standardize
        self._loss = problem.loss(standardize=standardize)
        self._spectrum = problem.spectrum(standardize=standardize)
        self._before: list[tuple[float, Solution]] = []

    def fit(self, strength: float, tolerance: float = TOLERANCE) -> Fit:
        """Fit with scikit-learn's C = `strength`; from small to large is fastest.

        Args:
            strength: Above zero.
            tolerance: How far the objective may be from its minimum, relative to itself.
        """
        problem = self._problem
        solution = minimise(
            self._loss,
            problem.penalty(strength),
            self._spectrum,
            self._start(np.log(strength)),
            self._before[-1][1] if self._before else None,
            tolerance=tolerance,
        )
        self._before = [*self._before[-1:], (np.log(strength), solution)]
        return problem.raw(solution, standardize=self._standardize)

    def last(self) -> Solution:
        """The last fit, of centred (and scaled) rows."""
        return self._before[-1][1]

    def _start(self, place: float) -> Doubles | None:
        """Where to look first, for the logarithm of a strength."""
        if not self._before:
            return None
        last, end = self._before[-1]
        if len(self._before) == 1 or last == self._before[0][0]:
            return end.point
        first, begin = self._before[0]
        # Not further than the two are apart: a line is no guide to far away.
        ahead = float(np.clip((place - last) / (last - first), -1.0, 1.0))
        return np.asarray(end.point + ahead * (end.point - begin.point))


def _centred(features: Floats, mean: Doubles) -> Floats:
    """Features [N, D] without their mean; in float64 when they are few, else in float32."""
    dtype = np.float64 if features.size <= SMALL else np.float32
    X = np.empty(features.shape, dtype)
    shift = mean.astype(dtype)
    for rows, block in row_blocks(features, MOMENT_ROWS):
        np.subtract(block, shift, out=X[rows])
    return X

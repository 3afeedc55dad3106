"""Logistic regression on few rows of many classes.

The Hessian's block of class c is a sum over rows, each with weight s_i p_ic (1 - p_ic). With few
rows per class a handful of rows have nearly all of it: the class's own, and those mistaken for it.
No product of a class part and a feature part describes that. The search direction comes from the
inverse of these blocks instead: the heaviest rows exactly, by the Woodbury identity, all other rows
as a multiple of the second moment. It is taken anew at each step, which costs less than a pass.

In the eigenbasis of the second moment, that is diagonal, and rows of more features than there are
rows need no more columns than rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from featcache.heads.features import Doubles, Floats, Ints
from featcache.heads.solvers.lbfgs import (
    MAX_ITERATIONS,
    MAX_STALLED,
    TOLERANCE,
    Best,
    Memory,
    Pair,
    Solution,
    line_search,
    penalized,
    spectrum_of,
)
from featcache.heads.solvers.softmax_loss import prediction_errors
from featcache.runtime import progress

# Rows per class, on average, up to which a handful of them has most of a class's curvature.
MAX_ROWS_PER_CLASS = 5
# Below this many classes the usual solver takes no time.
MIN_CLASSES = 20
# Rows of each class's block that are taken exactly.
HEAVY_ROWS = 8
# Steps to remember, since the last one that had to be shortened: where that happens the curvature
# changes so fast that what earlier steps saw misleads.
STEPS = 4
# The penalty falls by this factor from stage to stage, each solved to this precision, down to the
# one asked for. With little penalty from the start steps would overshoot: rows that are separable
# soon have no curvature.
PENALTY_FACTOR = 4.0
STAGE_TOLERANCE = 0.1


def are_few(num_rows: int, num_classes: int) -> bool:
    """Whether rows are so few per class that this solver is the faster one."""
    return num_classes >= MIN_CLASSES and num_rows <= MAX_ROWS_PER_CLASS * num_classes


class FewRows:
    """The loss over few rows, in the eigenbasis of their second moment.

    Points are [R + 1, C], R at most the number of rows or features.

    Args:
        X: Centered features [N, D].
        y: Class indices [N].
        share: Weights [N] that sum to one.
        num_classes: Number C of classes, each with rows.
    """

    def __init__(self, X: Floats, y: Ints, share: Doubles, num_classes: int) -> None:
        A, basis = X, None
        if len(X) < X.shape[1]:
            basis, triangle = np.linalg.qr(X.T.astype(np.float64))
            A = triangle.T.astype(X.dtype)
        found = spectrum_of((A.T @ (A * share[:, None].astype(A.dtype))).astype(np.float64))
        values, vectors = found.values, found.vectors
        self._basis = vectors if basis is None else basis @ vectors
        ones = np.ones((len(X), 1), X.dtype)
        self._rows = np.hstack([A @ vectors.astype(X.dtype), ones])
        self._values = np.append(values, 1.0)  # the bias: a feature of one
        self._y, self._share = y, share.astype(X.dtype)
        self._weighted = self._rows * self._share[:, None]
        self._error: Floats = np.empty(0)
        self._total: Doubles = np.empty(0)
        self.num_classes, self.num_evaluations = num_classes, 0
        total = np.bincount(y, share, num_classes)
        self._first = np.zeros((len(self._values), num_classes))
        self._first[-1] = np.log(total) - np.log(total).mean()
        # One step from zero moves a row's own logit by about the logarithm of the classes.
        first_penalty = float(values.sum() * np.vdot(share, share) / np.log(num_classes))
        # The penalty of the last fit, and what that learned of the curvature.
        self._before: tuple[float, tuple[Pair, ...]] = (PENALTY_FACTOR * first_penalty, ())

    def evaluate(
        self, weight: Doubles, bias: Doubles, curvature: Doubles | None = None
    ) -> tuple[float, Doubles]:
        """Loss and gradient [R + 1, C]; keeps the errors that `blocks` needs."""
        del curvature
        self.num_evaluations += 1
        self._error, losses = prediction_errors(self._rows[:, :-1], self._y, weight, bias)
        gradient = (self._weighted.T @ self._error).astype(np.float64)
        wrong = -self._error[np.arange(len(self._y)), self._y]
        # Errors of other classes are positive: what all of them sum to.
        self._total = gradient[-1] + 2 * np.bincount(self._y, wrong * self._share, self.num_classes)
        return float(np.vdot(self._share.astype(float), losses)), gradient

    def blocks(self, lam: float) -> ClassBlocks:
        """The blocks of the Hessian at the point evaluated last."""
        num_heavy = min(HEAVY_ROWS, len(self._y))
        weight = np.abs(self._error.T, order="C")
        weight *= self._share
        heavy = np.argpartition(weight, -num_heavy, axis=1)[:, -num_heavy:]
        error = np.abs(self._error[heavy, np.arange(self.num_classes)[:, None]])
        own = (error * (1 - error) * self._share[heavy]).astype(np.float64)
        rest = (self._total - own.sum(axis=1)).clip(min=0.0)
        return ClassBlocks(self._rows, self._values, heavy, own, rest, lam)

    def turned_back(self, solution: Solution) -> Solution:
        """The solution for the features as they were, without what helps to go on from there."""
        point = np.vstack([self._basis @ solution.point[:-1], solution.point[-1:]])
        return dataclasses.replace(solution, point=point)

    def minimize(self, lam: float, tolerance: float, start: Doubles | None = None) -> Solution:
        """Find the minimum; see `lbfgs.minimize`.

        Args:
            lam: Penalty, above zero.
            tolerance: Part of the objective that the gap may be.
            start: Where to begin; the class frequencies unless given.
        """
        evaluations = self.num_evaluations
        last, pairs = self._before
        stage = max(lam, last / PENALTY_FACTOR)
        point = self._first if start is None else start
        value, gradient = penalized(self, stage, point, None)
        memory, best = Memory(stage, pairs, STEPS), Best(point, value, np.inf)
        stalled, values, steps = 0, [value], progress(None, "logistic", unit=" steps", late=True)
        for _ in range(MAX_ITERATIONS):
            direction = memory.direction(gradient, self.blocks(stage))
            decrement = float(np.vdot(gradient, direction))
            if stage > lam and decrement / 2 <= STAGE_TOLERANCE * value:
                fall, stage = stage, max(lam, stage / PENALTY_FACTOR)
                fall -= stage
                gradient[:-1] -= fall * point[:-1]
                value -= fall / 2 * float(np.vdot(point[:-1], point[:-1]))
                memory, best = Memory(stage, memory.pairs(), STEPS), Best(point, value, np.inf)
                stalled, values = 0, [value]
                continue
            stalled = 0 if best.update(point, value, decrement) else stalled + 1
            if max(decrement / 2, _to_come(values)) <= tolerance * value or stalled == MAX_STALLED:
                break
            counted = self.num_evaluations
            found = line_search(self, stage, (point, value, decrement), direction, None)
            if found is None:
                break
            if self.num_evaluations - counted > 1:
                memory = Memory(stage, (), STEPS)
            memory.add(found[0] - point, found[2] - gradient)
            point, value, gradient = found
            values.append(value)
            steps.update()
        steps.close()
        solution = best.solution((), max(tolerance, TOLERANCE))
        self._before = (lam, memory.pairs())
        return dataclasses.replace(
            solution,
            num_passes=self.num_evaluations - evaluations,
            converged=solution.converged and stage == lam,
        )


def _to_come(values: list[float]) -> float:
    """What further steps would gain if gains kept shrinking as the last two did."""
    if len(values) < 3:
        return 0.0
    before, last = values[-3] - values[-2], values[-2] - values[-1]
    return last * last / max(before - last, 0.01 * last) if last > 0 else 0.0


class ClassBlocks:
    """Applies the inverse of the Hessian's blocks, class by class, to a gradient [R + 1, C].

    Args:
        rows: [N, R + 1], the last column one.
        values: Eigenvalues [R + 1].
        heavy: Row numbers [C, K] that count most for each class.
        own: Their weights [C, K].
        rest: The weight of all others, [C].
        lam: Penalty.
    """

    def __init__(
        self, rows: Floats, values: Doubles, heavy: Ints, own: Doubles, rest: Doubles, lam: float
    ) -> None:
        penalty = np.full(len(values), lam)
        penalty[-1] *= 1e-2  # the bias has none, but the estimate must have an inverse
        base = 1.0 / (values * rest[:, None] + penalty)
        self._inverse = base.astype(rows.dtype)
        self._rows = rows[heavy]  # [C, K, R + 1]
        self._turned = self._rows * self._inverse[:, None]
        inner = (self._turned @ self._rows.transpose(0, 2, 1)).astype(np.float64)
        diagonal = np.arange(heavy.shape[1])
        inner[:, diagonal, diagonal] += 1.0 / own.clip(min=np.finfo(np.float32).tiny)
        self._inner = np.linalg.inv(inner).astype(rows.dtype)

    def __call__(self, gradient: Doubles) -> Doubles:
        """The blocks' inverse times a gradient [R + 1, C]."""
        per_class = gradient.T.astype(self._inverse.dtype)[:, :, None]
        turned = per_class * self._inverse[:, :, None]
        inner = self._inner @ (self._rows @ turned)
        turned -= self._turned.transpose(0, 2, 1) @ inner
        return np.asarray(turned[:, :, 0].T, np.float64)

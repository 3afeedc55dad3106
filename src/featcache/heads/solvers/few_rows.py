"""Logistic regression on few rows of many classes.

The Hessian's block of class c is a sum over rows, each with weight s_i p_ic (1 - p_ic). With few
rows per class a handful of rows have nearly all of it: the class's own, and those mistaken for it.
No product of a class part and a feature part describes that. The search direction comes from the
inverse of these blocks instead: the heaviest rows exactly, by the Woodbury identity, all other rows
as a multiple of the identity.

Rows so few are soon separable: then the loss falls exponentially, and Newton's steps from zero are
many and short. So the search starts where it would end if all rows were alike, and looks along each
step for the point where the objective is flat. Logits change linearly along a step, so that needs
no further product with the rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.display import progress
from featcache.heads.features import Doubles, Floats, Ints, Singles
from featcache.heads.solvers.lbfgs import (
    MAX_ITERATIONS,
    ROUNDING,
    TOLERANCE,
    Solution,
    gap_left,
)
from featcache.heads.solvers.softmax_loss import prediction_errors

# Rows per class, on average, up to which a handful of them has most of a class's curvature.
MAX_ROWS_PER_CLASS = 5
# Below this many classes the usual solver takes no time.
MIN_CLASSES = 20
# Rows of each class's block that are taken exactly, and the steps at which they are chosen anew.
HEAVY_ROWS = 8
CHOOSE = frozenset({0, 1, 3, 7, 15, 31, 63, 127, 255})
# Values of the largest arrays held: probabilities of all rows, and the heavy rows of all classes.
MAX_VALUES = 1 << 26
# Steps to remember: the curvature changes fast, and what earlier steps saw misleads.
STEPS = 4
# A step may end where the objective's slope is this part of what it was, and is found in at most
# so many tries.
FLAT = 0.3
MAX_TRIES = 12


def are_few(num_rows: int, dim: int, num_classes: int) -> bool:
    """Whether rows are so few per class that this solver is the faster one, and memory suffices."""
    values = max(num_rows, HEAVY_ROWS * dim) * num_classes
    fits = num_rows <= MAX_ROWS_PER_CLASS * num_classes and values <= MAX_VALUES
    return num_classes >= MIN_CLASSES and fits


# A step, the gradient's change along it, and one over their product.
Pair = tuple[Singles, Singles, float]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the search is.

    Attributes:
        point: Weight and, last, bias [R + 1, C].
        logits: Of the rows [C, N].
        error: Probabilities less one-hot labels [C, N].
        value: The objective.
    """

    point: Doubles
    logits: Singles
    error: Singles
    value: float


class FewRows:
    """The loss over few rows.

    Args:
        X: Centered features [N, R].
        y: Class indices [N].
        share: Weights [N] that sum to one.
        num_classes: Number C of classes, each with rows.
    """

    def __init__(self, X: Floats, y: Ints, share: Doubles, num_classes: int) -> None:
        ones = np.ones((len(X), 1), np.float32)
        self._rows: Singles = np.hstack([X.astype(np.float32), ones])
        self._y, self._share = y, share.astype(np.float32)
        self._weighted = self._rows * self._share[:, None]
        self._class_share = np.bincount(y, share, num_classes)
        self._blocks = ClassBlocks(self._rows, y, self._share)

    def minimize(self, lam: float, tolerance: float, start: Doubles | None = None) -> Solution:
        """Find the minimum; see `lbfgs.minimize`.

        Args:
            lam: Penalty, above zero.
            tolerance: Part of the objective that the gap may be.
            start: Where to begin; where rows that are alike would end unless given.
        """
        here = self._first(self._alike(lam) if start is None else start, lam)
        gradient, values, memory = (
            self._gradient(here, lam),
            [here.value],
            deque[Pair](maxlen=STEPS),
        )
        steps = progress(None, "logistic", unit=" steps", late=True)
        for iteration in range(MAX_ITERATIONS):
            if iteration in CHOOSE:
                self._blocks.choose(here.error)
            self._blocks.weigh(here.error, lam)
            direction = quasi_newton(gradient, memory, self._blocks)
            decrement = float(np.vdot(gradient, direction))
            if gap_left(values, decrement) <= tolerance * here.value:
                break
            found = self._search(here, direction, decrement, lam)
            if found is None:
                break  # any decrease left is below the features' precision
            here, length = found
            before, gradient = gradient, self._gradient(here, lam)
            step, change = -length * direction, gradient - before
            if (product := float(np.vdot(step, change))) > 0:
                memory.append((step, change, 1.0 / product))
            values.append(here.value)
            steps.update()
        steps.close()
        near = decrement / 2 <= max(tolerance, TOLERANCE) * here.value
        return Solution(here.point, here.value, decrement / 2, len(values), near)

    def _alike(self, lam: float) -> Doubles:
        """Where rows that are alike would end: ridge regression, scaled to the margin they have.

        Let all rows have squared length u * N, be orthogonal, and have weight 1 / N. Each then has
        the same error q and margin m, with lam m = u q: the gradient is zero. The curvature of its
        logits is q (1 - q), for which squares with that weight stand.
        """
        num_classes = len(self._class_share)
        X, weighted = self._rows[:, :-1], self._weighted[:, :-1]
        unit = float(np.vdot(X, weighted)) * float(np.vdot(self._share, self._share))

        def error(margin: float) -> float:
            return (num_classes - 1) / (num_classes - 1 + math.exp(margin))

        low, high = 0.0, 100.0
        for _ in range(50):
            margin = (low + high) / 2
            low, high = (low, margin) if lam * margin > unit * error(margin) else (margin, high)
        moment = (X.T @ weighted).astype(np.float64)
        moment.flat[:: len(moment) + 1] += lam / (error(low) * (1 - error(low)))
        order = np.argsort(self._y, kind="stable")
        starts = np.searchsorted(self._y[order], np.arange(num_classes))
        sums = np.add.reduceat(weighted[order], starts).T.astype(np.float64)
        weight = np.linalg.solve(moment, sums)
        weight *= low / float(np.vdot(weight, sums))  # the mean of the rows' own logits
        bias = np.log(self._class_share)
        return np.vstack([weight, bias - bias.mean()])

    def _first(self, point: Doubles, lam: float) -> Place:
        logits = np.ascontiguousarray((self._rows @ point.astype(np.float32)).T)
        error, losses = prediction_errors(logits.copy(), self._y)
        value = float(self._share @ losses) + lam / 2 * _square(point[:-1])
        return Place(point, logits, error, value)

    def _gradient(self, here: Place, lam: float) -> Singles:
        gradient = np.ascontiguousarray((here.error @ self._weighted).T)
        gradient[:-1] += (lam * here.point[:-1]).astype(np.float32)
        return gradient

    def _search(
        self, here: Place, direction: Singles, decrement: float, lam: float
    ) -> tuple[Place, float] | None:
        """Where the objective is nearly flat along a step, and the step's length; None if nowhere.

        The objective is convex, so lengths with negative slope are too short, the others too long.
        """
        change: Singles = np.ascontiguousarray((self._rows @ direction).T)
        step, weight = direction.astype(np.float64), here.point[:-1]
        along, square = lam * float(np.vdot(weight, step[:-1])), lam * _square(step[:-1])
        penalty, length = lam / 2 * _square(weight), 1.0
        short, long = (0.0, -decrement), (math.inf, math.inf)
        for _ in range(MAX_TRIES):
            logits: Singles = here.logits - np.float32(length) * change
            error, losses = prediction_errors(logits.copy(), self._y)
            value = float(self._share @ losses) + penalty - length * along + length**2 / 2 * square
            rows_slope = self._share @ np.einsum("cn,cn->n", error, change)
            slope = length * square - along - float(rows_slope)
            if value <= here.value * (1 + ROUNDING) and abs(slope) <= FLAT * decrement:
                return Place(here.point - length * step, logits, error, value), length
            if slope < 0:
                short = (length, slope)
            else:
                long = (length, slope)
            length = _between(short, long, decrement)
        return None


def quasi_newton(gradient: Singles, pairs: Sequence[Pair], first: ClassBlocks) -> Singles:
    """L-BFGS's step from the inverse Hessian's first estimate, which changes with every step."""
    rest, factors = gradient.copy(), []
    for step, change, inverse in reversed(pairs):
        factor = inverse * float(np.vdot(step, rest))
        rest -= factor * change
        factors.append(factor)
    direction = first(rest)
    for (step, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        direction += step * (factor - inverse * float(np.vdot(change, direction)))
    return direction


def _between(short: tuple[float, float], long: tuple[float, float], decrement: float) -> float:
    """The next length to try, between one too short and one too long, given with their slopes."""
    if math.isinf(long[0]):
        return short[0] * min(3.0, decrement / max(decrement + short[1], 0.5 * decrement))
    width = long[0] - short[0]
    # Where the slope jumped, a line is a poor guide.
    part = 0.3 if long[1] > 5 * decrement else -short[1] / (long[1] - short[1])
    return short[0] + width * min(max(part, 0.1), 0.9)


def _square(weight: Doubles) -> float:
    return float(np.vdot(weight, weight))


class ClassBlocks:
    """Applies the inverse of the Hessian's blocks, class by class, to a gradient [R + 1, C].

    Args:
        rows: [N, R + 1], the last column one.
        y: Class indices [N].
        share: Weights [N] that sum to one.
    """

    def __init__(self, rows: Singles, y: Ints, share: Singles) -> None:
        self._all, self._y, self._share = rows, y, share
        lengths = np.einsum("nd,nd->n", rows[:, :-1], rows[:, :-1])
        self._mean_square = float(share @ lengths) / max(rows.shape[1] - 1, 1)

    def choose(self, error: Singles) -> None:
        """Choose the rows that count most for each class, given the errors [C, N]."""
        num_heavy = min(HEAVY_ROWS, error.shape[1])
        weight = np.abs(error)
        weight *= self._share
        self._heavy = np.argpartition(weight, -num_heavy, axis=1)[:, -num_heavy:]  # [C, K]
        self._rows = self._all[self._heavy]  # [C, K, R + 1]
        features = self._rows[:, :, :-1]
        self._products = (features @ features.transpose(0, 2, 1)).astype(np.float64)

    def weigh(self, error: Singles, lam: float) -> None:
        """Take the rows' weights from the errors [C, N] at another point."""
        heavy, classes = self._heavy, np.arange(len(error))
        part = np.abs(error[classes[:, None], heavy])
        own = (part * (1 - part) * self._share[heavy]).astype(np.float64)
        wrong = -error[self._y, np.arange(len(self._y))] * self._share
        # Errors of other classes are positive: what all of them sum to.
        total = error @ self._share + 2 * np.bincount(self._y, wrong, len(classes))
        rest = (total - own.sum(axis=1)).clip(min=0.0)
        features, bias = 1 / (rest * self._mean_square + lam), 1 / (rest + 1e-2 * lam)
        inner = self._products * features[:, None, None] + bias[:, None, None]
        inner[:, *np.diag_indices(heavy.shape[1])] += 1.0 / own.clip(min=np.finfo(np.float32).tiny)
        self._inner = np.linalg.inv(inner).astype(np.float32)
        self._base = np.repeat(features[:, None], self._all.shape[1], axis=1).astype(np.float32)
        self._base[:, -1] = bias  # it has no penalty, but the estimate must have an inverse

    def __call__(self, gradient: Singles) -> Singles:
        """The blocks' inverse times a gradient [R + 1, C]."""
        turned = gradient.T * self._base
        heavy = self._inner @ (self._rows @ turned[:, :, None])
        turned -= self._base * (self._rows.transpose(0, 2, 1) @ heavy)[:, :, 0]
        return np.asarray(turned.T)

"""Preconditioned L-BFGS for multinomial logistic regression with an L2 penalty.

Minimizes F(A) = L(W, b) + lam / 2 * |W|^2 over A = [W; b], the bias unpenalized.

L-BFGS builds on a first estimate of the inverse Hessian, that of `curvature`. With it, L-BFGS needs
tens of passes where features are so correlated that plain L-BFGS needs hundreds. The last step and
its change of gradient give its scale.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from featcache.display import progress
from featcache.heads.features import Doubles, Floats
from featcache.heads.solvers.curvature import InverseHessian, ShiftedInverses
from featcache.heads.solvers.softmax_loss import SoftmaxLoss

MEMORY = 20
MAX_ITERATIONS = 3000
# Under another penalty a scaled pair whose product is below this is mostly rounding.
LEAST_PRODUCT = 1e-4
# Steps at which the class part G of the estimate is measured anew, as long as steps still gain this
# part of the objective: a new estimate takes as long as some passes over few rows.
REFRESH, WORTH_REFRESH = frozenset({8, 40}), 1e-4
# The estimated distance to the optimum, relative to the objective, at which a solver stops; of few
# rows, which are in double precision, digits cost little.
TOLERANCE, EXACTER = 1e-7, 0.01
# Relative differences of the objective below this are rounding: of a sum, and of single precision.
NOISE, ROUNDING = 1e-9, 1e-7
# Steps without gain after which the limit of precision is reached.
MAX_STALLED = 5


class Pairs(NamedTuple):
    """Steps, and the gradient's changes along them without the penalty's part, [M, D + 1, C]."""

    steps: Floats
    changes: Floats


@dataclass(frozen=True)
class Solution:
    """Where the solver ended.

    Attributes:
        point: Weight and, last, bias: [D + 1, C].
        objective: F there.
        gap: Estimated distance of F to its minimum.
        num_passes: Passes over the rows.
        converged: Whether the gap is within the tolerance asked for, or within `TOLERANCE`.
        pairs: What was learned of the loss's curvature; it holds for any penalty.
    """

    point: Doubles
    objective: float
    gap: float
    num_passes: int
    converged: bool
    pairs: Pairs | None = None


class Memory:
    """The last steps and the gradient's changes along them, which give the next step.

    In the compact form of Byrd, Nocedal and Schnabel 1994, "Representations of Quasi-Newton
    Matrices": the steps S and the estimate times the changes, P Y, are the rows of one matrix,
    which is read twice per step. Pairs are scaled so that each step times its change is one.

    Args:
        estimate: P.
        lam: Penalty. Its part of a change is known exactly, so what was learned under one penalty
            is useful under the next.
        gradient: Where the search begins [D + 1, C].
        pairs: What is known already.
        dtype: What the pairs are kept in.
    """

    def __init__(
        self,
        estimate: InverseHessian,
        lam: float,
        gradient: Doubles,
        pairs: Pairs | None,
        dtype: type[np.floating[Any]],
    ) -> None:
        self._estimate, self._lam = estimate, lam
        self._gradient = gradient
        self._turned: Doubles = estimate(gradient[None])[0]
        self._changes = np.empty((MEMORY, gradient.size), dtype)
        self._rows = np.empty((MEMORY, 2, gradient.size), dtype)  # S and P Y
        self._order: list[int] = []
        self._step_change = np.zeros((MEMORY, MEMORY))
        self._change_turned = np.zeros((MEMORY, MEMORY))
        if pairs is not None:
            self._recall(pairs)

    def _recall(self, pairs: Pairs) -> None:
        steps, changes = pairs.steps, pairs.changes.copy()
        changes[:, :-1] += np.float32(self._lam) * steps[:, :-1]
        products = np.einsum("mdc,mdc->m", steps, changes, dtype=np.float64)
        kept = products > LEAST_PRODUCT
        scale, num = 1 / np.sqrt(products[kept])[:, None], int(kept.sum())
        self._rows[:num, 0] = steps[kept].reshape(num, self._gradient.size) * scale
        self._changes[:num] = changes[kept].reshape(num, self._gradient.size) * scale
        self._order = list(range(num))
        self.refresh()

    def refresh(self) -> None:
        """Apply the estimate anew, after it changed."""
        self._turned, num = self._estimate(self._gradient[None])[0], len(self._order)
        if not num:
            return
        changes, rows = self._changes[:num], self._rows[:num]
        shape = self._gradient.shape
        rows[:, 1] = self._estimate(changes.reshape(num, *shape)).reshape(num, -1)
        self._step_change[:num, :num] = rows[:, 0] @ changes.T
        self._change_turned[:num, :num] = rows[:, 1] @ changes.T

    def add(self, step: Doubles, gradient: Doubles) -> None:
        """Go to the end of a step, and remember it if the gradient grew along it."""
        change, turned = gradient - self._gradient, self._estimate(gradient[None])[0]
        product = float(np.vdot(step, change))
        if product > 0:
            scale, num = 1 / np.sqrt(product), len(self._order)
            slot = num if num < MEMORY else self._order.pop(0)
            self._order.append(slot)
            self._rows[slot, 0] = scale * step.ravel()
            self._rows[slot, 1] = scale * (turned - self._turned).ravel()
            self._changes[slot] = scale * change.ravel()
            num = len(self._order)
            dots = (self._rows[:num].reshape(2 * num, -1) @ self._changes[slot]).reshape(-1, 2)
            self._step_change[:num, slot] = dots[:, 0]
            self._change_turned[:num, slot] = self._change_turned[slot, :num] = dots[:, 1]
        self._gradient, self._turned = gradient, turned

    def forget(self) -> bool:
        """Start again from the estimate; whether there was anything to forget."""
        remembered = bool(self._order)
        self._order = []
        return remembered

    def pairs(self) -> Pairs:
        """The remembered pairs, without the penalty."""
        shape = (-1, *self._gradient.shape)
        steps = self._rows[self._order, 0].reshape(shape)
        changes = self._changes[self._order].reshape(shape)
        changes[:, :-1] -= np.asarray(self._lam, steps.dtype) * steps[:, :-1]
        return Pairs(steps, changes)

    def direction(self) -> Doubles:
        """The quasi-Newton step: the inverse Hessian's estimate times the gradient."""
        order = np.array(self._order, np.int64)
        if not len(order):
            return self._turned
        rows = self._rows[: len(order)].reshape(2 * len(order), -1)
        dots = (rows @ self._gradient.ravel().astype(rows.dtype)).reshape(-1, 2)[order]
        later = np.triu(self._step_change[np.ix_(order, order)])
        between = self._change_turned[np.ix_(order, order)]
        scale = 1 / between[-1, -1]
        first = np.linalg.solve(later, dots[:, 0])
        second = np.linalg.solve(later.T, first - scale * (dots[:, 1] - between @ first))
        parts = np.empty((len(order), 2), rows.dtype)
        parts[order, 0], parts[order, 1] = second, -scale * first
        step = scale * self._turned
        step += (parts.ravel() @ rows).reshape(step.shape)
        return np.asarray(step)


def minimize(
    loss: SoftmaxLoss,
    lam: float,
    features: ShiftedInverses,
    start: Doubles | None = None,
    pairs: Pairs | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Solution:
    """Find the minimum of F.

    Args:
        loss: The rows' loss.
        lam: Penalty, above zero.
        features: Of the rows or of a sample, for speed alone.
        start: Where to begin, [D + 1, C]; the class frequencies unless given.
        pairs: What an earlier solution learned of the same rows, for speed alone.
        tolerance: Stop when the gap, estimated as half the Newton decrement, is below this part
            of the objective.
        max_iterations: Give up after this many steps, with `converged` False.
    """
    point = start_point(loss) if start is None else start
    evaluations = loss.num_evaluations
    tolerance *= EXACTER if loss.exact else 1.0
    end = _descend(loss, lam, features, (point, pairs), tolerance, max_iterations)
    if not end.converged and not loss.exact:
        # Where the loss is nearly zero, float32 is too coarse: continue in float64. The last pairs
        # are rounding errors.
        loss.exact = True
        left = max_iterations - (loss.num_evaluations - evaluations)
        assert end.pairs is not None
        pairs = Pairs(*(part[:-MAX_STALLED] for part in end.pairs))
        end = _descend(loss, lam, features, (end.point, pairs), tolerance, left)
        loss.exact = False
    return dataclasses.replace(end, num_passes=loss.num_evaluations - evaluations)


def _descend(
    loss: SoftmaxLoss,
    lam: float,
    features: ShiftedInverses,
    begin: tuple[Doubles, Pairs | None],
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Descend from a point, with what is known, until the gap is small or no step gains."""
    (point, pairs), estimate = begin, InverseHessian(features, lam)
    curvature = np.empty((loss.num_classes, loss.num_classes))
    value, gradient = penalized(loss, lam, point, curvature)
    estimate.measure(curvature)
    dtype = np.float64 if loss.exact else np.float32
    memory = Memory(estimate, lam, gradient, pairs, dtype)
    best, stalled, values = Best(point, value, np.inf), 0, [value]
    steps = progress(None, "logistic", unit=" steps", late=True)
    for iteration in range(max_iterations):
        direction = memory.direction()
        decrement = float(np.vdot(gradient, direction))
        if decrement <= 0 and memory.forget():  # it ascends: what was remembered is rounding
            direction = memory.direction()
            decrement = float(np.vdot(gradient, direction))
        gained = best.update(point, value, decrement)
        stalled = 0 if gained else stalled + 1
        # The class part is of the start, and the first steps may change it.
        trusted = iteration >= (2 if pairs is None else 1) or decrement == 0
        near = trusted and gap_left(values, decrement) <= tolerance * abs(value)
        if near or stalled == MAX_STALLED:
            break
        worth = iteration in REFRESH and decrement > WORTH_REFRESH * abs(value)
        refresh = curvature if worth else None
        found = line_search(loss, lam, (point, value, decrement), direction, refresh)
        if found is None:
            if memory.forget():
                continue
            break  # any decrease left is below the features' precision
        step, (point, value, gradient) = found[0] - point, found
        memory.add(step, gradient)
        values.append(value)
        if refresh is not None:
            estimate.measure(refresh)
            memory.refresh()
        steps.update()
    steps.close()
    return best.solution(memory.pairs(), max(tolerance, TOLERANCE))


def gap_left(values: list[float], decrement: float) -> float:
    """Estimated distance of the objective to its minimum.

    Args:
        values: The objective after each step, from the start on.
        decrement: What a full step would gain twice, if the curvature were known.

    Returns:
        Half the decrement, or, if more, what further steps would gain if gains kept shrinking as
        they did from the two steps before the last two to the last two.
    """
    two = 2 if len(values) > 4 else 1
    if len(values) <= 2 * two:
        return decrement / 2
    before, last = values[-1 - 2 * two] - values[-1 - two], values[-1 - two] - values[-1]
    to_come = last * last / max(before - last, 0.01 * last) if last > 0 else 0.0
    return max(decrement / 2, to_come)


@dataclass
class Best:
    """The best point so far; at the limit of precision it is not always the last one."""

    point: Doubles
    value: float
    decrement: float

    def update(self, point: Doubles, value: float, decrement: float) -> bool:
        """Take a point that is lower, or equal up to rounding and closer to the minimum."""
        lower = value < self.value - NOISE * abs(value)
        if lower or abs(decrement) < self.decrement:
            self.point, self.value, self.decrement = point, value, abs(decrement)
            return True
        return False

    def solution(self, pairs: Pairs, tolerance: float) -> Solution:
        """The best point as the end of a search."""
        gap = self.decrement / 2
        near = gap <= tolerance * abs(self.value)
        return Solution(self.point, self.value, gap, 0, near, pairs)


def start_point(loss: SoftmaxLoss) -> Doubles:
    """Zero weights, and biases that predict the class frequencies: [D + 1, C]."""
    point = np.zeros((loss.feature_dim + 1, loss.num_classes))
    bias = np.log(loss.class_share.clip(min=1e-12))
    point[-1] = bias - bias.mean()
    return point


def penalized(
    loss: SoftmaxLoss, lam: float, point: Doubles, curvature: Doubles | None
) -> tuple[float, Doubles]:
    """F at a point, and its gradient [D + 1, C]; `curvature` as in `SoftmaxLoss.evaluate`."""
    weight = point[:-1]
    value, gradient = loss.evaluate(weight, point[-1], curvature)
    gradient[:-1] += lam * weight
    return value + lam / 2 * float(np.vdot(weight, weight)), gradient


def line_search(
    loss: SoftmaxLoss,
    lam: float,
    here: tuple[Doubles, float, float],
    direction: Doubles,
    curvature: Doubles | None,
) -> tuple[Doubles, float, Doubles] | None:
    """Shorten the step until the objective falls enough; None when it does not.

    A parabola proposes the next length, but not where the objective jumped: where rows are
    separable it is flat before, and a parabola would propose a tenth of the step time after time.
    """
    point, value, decrement = here
    length = 1.0
    for _ in range(30):
        new_point = point - length * direction
        new_value, gradient = penalized(loss, lam, new_point, curvature)
        lower = new_value <= value - 1e-4 * length * decrement
        # As in Hager and Zhang 2005: where values differ by their rounding, slopes still tell.
        alike = new_value <= value + ROUNDING * abs(value)
        if lower or (alike and -float(np.vdot(gradient, direction)) <= 0.9 * decrement):
            return new_point, new_value, gradient
        bent = new_value - value + length * decrement
        jumped = not new_value < 2 * value
        parabola = 0.0 if jumped else decrement * length**2 / (2 * bent)
        length = min(max(parabola, (0.5 if jumped else 0.1) * length), 0.5 * length)
    return None

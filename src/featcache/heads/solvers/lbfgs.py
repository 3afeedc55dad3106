"""Preconditioned L-BFGS for multinomial logistic regression with an L2 penalty.

Minimizes F(A) = L(W, b) + lam / 2 * |W|^2 over A = [W; b], the bias unpenalized.

L-BFGS builds on a first estimate of the inverse Hessian. The Hessian of L is a mean of
(diag(p) - p p^T) (x) x x^T. Replacing the mean of the product by the product of the means gives
G (x) M with G the mean of diag(p) - p p^T, [C, C], and M the features' second moment, [D, D]. In
the eigenbases of both this is diagonal, so the inverse of G (x) M + lam costs four small products.
With it, L-BFGS needs tens of passes where features are so correlated that plain L-BFGS needs
hundreds. The last step and its change of gradient give its scale. The precision of the result does
not depend on it, only the speed does.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from featcache.display import progress
from featcache.heads.features import Doubles, Floats, Singles
from featcache.heads.solvers.base import threads_for
from featcache.heads.solvers.softmax_loss import SoftmaxLoss

MEMORY = 30
MAX_ITERATIONS = 3000
# Steps at which the class part G of the preconditioner is measured anew: it changes fast at first.
REFRESH = frozenset({0, 2, 5, 10, 20, 40, 80})
# Directions of wide features that the preconditioner tells apart: finding them takes their cube.
MAX_DIRECTIONS = 768
# The estimated distance to the optimum, relative to the objective, at which a solver stops.
TOLERANCE = 3e-8
# Relative differences of the objective below this are rounding of the sum, not ascent.
NOISE = 1e-9
# Steps without gain after which the limit of precision is reached.
MAX_STALLED = 5


class Loss(Protocol):
    """A mean loss over rows."""

    def evaluate(self, weight: Doubles, bias: Doubles, curvature: Doubles | None = None) -> Any:
        """As `SoftmaxLoss.evaluate`."""


# A step, the gradient's change along it without the penalty's part, both [D + 1, C].
Pair = tuple[Floats, Floats]
# A gradient or a step [D + 1, C] in one precision or the other.
Step = TypeVar("Step", Doubles, Singles)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [R] and eigenvectors [D, R] of a matrix, such as the features' second moment.

    Where R is less than D, all other directions have the eigenvalue `rest`.
    """

    values: Doubles
    vectors: Floats
    rest: float = 0.0


def spectrum_of(matrix: Doubles) -> Spectrum:
    """Spectrum of a symmetric matrix [D, D] without negative eigenvalues but for rounding.

    A decomposition waits for all threads at each of its D steps: on a busy machine two threads took
    25 times as long as one at a width of 512, and on an idle one they save milliseconds.
    """
    with threads_for(64 * matrix.size):
        values, vectors = np.linalg.eigh(matrix)
    return Spectrum(values.clip(min=0.0), vectors)


def second_moment_spectrum(X: Floats, max_rows: int = 8192) -> Spectrum:
    """Spectrum of X^T X / N from evenly spaced rows: a sample is enough to precondition.

    Args:
        X: Centered features [N, D]; of more than `MAX_DIRECTIONS` or N columns, the directions of
            as many rows are told apart, and all others have the eigenvalue that is left.
        max_rows: Rows to look at, at least four times the width.
    """
    most = min(MAX_DIRECTIONS, len(X))
    wide = X.shape[1] > most
    step = max(1, len(X) // (most if wide else max(max_rows, 4 * X.shape[1])))
    sample = X[::step][:most] if wide else X[::step]
    if not wide:
        found = spectrum_of((sample.T @ sample).astype(np.float64) / len(sample))
        return Spectrum(found.values, found.vectors.astype(np.float32))
    found = spectrum_of((sample @ sample.T).astype(np.float64) / len(sample))
    some = found.values > 1e-6 * found.values[-1]
    values, rows = found.values[some], found.vectors[:, some]
    vectors = ((sample.T @ rows) / np.sqrt(values * len(sample))).astype(np.float32)
    square = float(np.einsum("nd,nd->", X, X, dtype=np.float64)) / len(X)
    left = (square - float(values.sum())) / max(X.shape[1] - len(values), 1)
    return Spectrum(values, vectors, max(left, 0.0))


class _Preconditioner:
    """Applies the inverse of G (x) M + lam to a gradient [D + 1, C]."""

    def __init__(self, spectrum: Spectrum, lam: float, classes: Spectrum) -> None:
        # Single precision is enough for a guess, and half as much to read.
        self._vectors = spectrum.vectors.astype(np.float32, copy=False)
        self._classes = classes.vectors
        self._rest = 1.0 / (spectrum.rest * classes.values + lam)
        inverse = 1.0 / (spectrum.values[:, None] * classes.values + lam)
        self._inverse = (inverse - self._rest).astype(np.float32)
        self._inverse_bias = 1.0 / classes.values

    def __call__(self, gradient: Floats) -> Doubles:
        turned = gradient @ self._classes
        weight = turned[:-1].astype(np.float32)
        known = self._vectors @ ((self._vectors.T @ weight) * self._inverse)
        turned[:-1] *= self._rest
        turned[:-1] += known
        turned[-1] *= self._inverse_bias
        return np.asarray(turned @ self._classes.T)


class InverseHessian:
    """The first estimate of the inverse Hessian: the preconditioner, scaled.

    Args:
        spectrum: Of the features' second moment.
        lam: Penalty.
        classes: Of the class part, if an earlier solution left it.
    """

    def __init__(self, spectrum: Spectrum, lam: float, classes: Spectrum | None) -> None:
        self._spectrum, self._lam, self._scale = spectrum, lam, 1.0
        self.classes = classes
        if classes is not None:
            self._precondition = _Preconditioner(spectrum, lam, classes)

    def measure(self, curvature: Doubles) -> None:
        """Take the class part of the preconditioner, [C, C]."""
        found = spectrum_of(curvature)
        # The all-ones direction has no curvature and no gradient: any finite value will do.
        self.classes = Spectrum(found.values.clip(min=found.values[-1] * 1e-3), found.vectors)
        self._precondition = _Preconditioner(self._spectrum, self._lam, self.classes)

    def fit(self, last: Pair | None) -> None:
        """Scale so that the last change of gradient is mapped to a step as long as the last."""
        if last is not None:
            step, change = last
            guess = self._precondition(change)
            self._scale = float(np.vdot(step, change)) / float(np.vdot(change, guess))

    def __call__(self, gradient: Doubles) -> Doubles:
        """The estimate times a gradient [D + 1, C]."""
        return self._scale * self._precondition(gradient)


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
        classes: Of the class part of the preconditioner.
    """

    point: Doubles
    objective: float
    gap: float
    num_passes: int
    converged: bool
    pairs: tuple[Pair, ...] = ()
    classes: Spectrum | None = None


class Memory:
    """The last steps and the gradient's changes along them, which give a step for a new gradient.

    The penalty's part of a change is lam times the step, known exactly; it is kept apart, so that
    what was learned under one penalty is useful under the next.
    """

    def __init__(self, lam: float, pairs: tuple[Pair, ...], length: int = MEMORY) -> None:
        self._lam = lam
        self._pairs: deque[tuple[Floats, Floats, float]] = deque(maxlen=length)
        for step, change in pairs:
            whole = change.copy()
            whole[:-1] += lam * step[:-1]
            self.add(step, whole)

    def add(self, step: Floats, change: Floats) -> None:
        """Remember a step, if the gradient grew along it."""
        product = float(np.vdot(step, change))
        if product > 0:
            self._pairs.append((step, change, 1.0 / product))

    def last(self) -> Pair | None:
        """The last step and the gradient's change along it."""
        return self._pairs[-1][:2] if self._pairs else None

    def pairs(self) -> tuple[Pair, ...]:
        """The remembered pairs, without the penalty."""
        pairs = []
        for step, change, _ in self._pairs:
            bare = change.copy()
            bare[:-1] -= self._lam * step[:-1]
            pairs.append((step, bare))
        return tuple(pairs)

    def direction(self, gradient: Step, first: Callable[[Step], Step]) -> Step:
        """The quasi-Newton step: the inverse Hessian's estimate times the gradient."""
        rest, factors = gradient.copy(), []
        for step, change, inverse in reversed(self._pairs):
            factor = inverse * float(np.vdot(step, rest))
            rest -= factor * change
            factors.append(factor)
        direction = first(rest)
        for (step, change, inverse), factor in zip(self._pairs, reversed(factors), strict=True):
            direction += step * (factor - inverse * float(np.vdot(change, direction)))
        return direction


def minimize(
    loss: SoftmaxLoss,
    lam: float,
    spectrum: Spectrum,
    start: Doubles | None = None,
    before: Solution | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Solution:
    """Find the minimum of F.

    Args:
        loss: The rows' loss.
        lam: Penalty, above zero.
        spectrum: Of the rows' second moment, for speed alone.
        start: Where to begin, [D + 1, C]; the class frequencies unless given.
        before: An earlier solution for the same rows, for speed alone.
        tolerance: Stop when the gap, estimated as half the Newton decrement, is below this part
            of the objective.
        max_iterations: Give up after this many steps, with `converged` False.
    """
    point = start_point(loss) if start is None else start
    begin = Solution(point, np.inf, np.inf, 0, False)
    if before is not None:
        begin = dataclasses.replace(before, point=point)
    evaluations = loss.num_evaluations
    end = _descend(loss, lam, spectrum, begin, tolerance, max_iterations)
    if not end.converged and not loss.exact:
        # Where the loss is nearly zero, float32 is too coarse: continue in float64. The last pairs
        # are rounding errors.
        loss.exact = True
        left = max_iterations - (loss.num_evaluations - evaluations)
        begin = dataclasses.replace(end, pairs=end.pairs[:-MAX_STALLED])
        end = _descend(loss, lam, spectrum, begin, tolerance, left)
        loss.exact = False
    return dataclasses.replace(end, num_passes=loss.num_evaluations - evaluations)


def _descend(
    loss: SoftmaxLoss,
    lam: float,
    spectrum: Spectrum,
    begin: Solution,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Descend from a solution's point and pairs until the gap is small or no step gains."""
    point, memory = begin.point, Memory(lam, begin.pairs)
    first = InverseHessian(spectrum, lam, begin.classes)
    known = begin.classes is not None
    curvature = np.empty((loss.num_classes, loss.num_classes))
    value, gradient = penalized(loss, lam, point, None if known else curvature)
    if not known:
        first.measure(curvature)
    first.fit(memory.last())
    best, stalled, values = Best(point, value, np.inf), 0, [value]
    steps = progress(None, "logistic", unit=" steps", late=True)
    for iteration in range(max_iterations):
        direction = memory.direction(gradient, first)
        decrement = float(np.vdot(gradient, direction))
        gained = best.update(point, value, decrement)
        stalled = 0 if gained else stalled + 1
        # The class part is of the start: where it was measured there, the first step may change it.
        trusted = iteration >= (1 if known else 2) or decrement == 0
        near = trusted and gap_left(values, decrement) <= tolerance * abs(value)
        if near or stalled == MAX_STALLED:
            break
        refresh = curvature if iteration in REFRESH else None
        found = line_search(loss, lam, (point, value, decrement), direction, refresh)
        if found is None:
            break  # any decrease left is below the features' precision
        new_point, new_value, new_gradient = found
        memory.add(new_point - point, new_gradient - gradient)
        point, value, gradient = new_point, new_value, new_gradient
        values.append(value)
        if refresh is not None:
            first.measure(refresh)
        first.fit(memory.last())
        steps.update()
    steps.close()
    solution = best.solution(memory.pairs(), max(tolerance, TOLERANCE))
    return dataclasses.replace(solution, classes=first.classes)


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

    def solution(self, pairs: tuple[Pair, ...], tolerance: float) -> Solution:
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
    loss: Loss, lam: float, point: Doubles, curvature: Doubles | None
) -> tuple[float, Doubles]:
    """F at a point, and its gradient [D + 1, C]; `curvature` as in `SoftmaxLoss.evaluate`."""
    weight = point[:-1]
    value, gradient = loss.evaluate(weight, point[-1], curvature)
    gradient[:-1] += lam * weight
    return value + lam / 2 * float(np.vdot(weight, weight)), gradient


def line_search(
    loss: Loss,
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
        if new_value <= value - 1e-4 * length * decrement + NOISE * abs(value):
            return new_point, new_value, gradient
        bent = new_value - value + length * decrement
        jumped = not new_value < 2 * value
        parabola = 0.0 if jumped else decrement * length**2 / (2 * bent)
        length = min(max(parabola, (0.5 if jumped else 0.1) * length), 0.5 * length)
    return None

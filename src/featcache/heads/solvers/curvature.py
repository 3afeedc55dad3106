"""The estimate of the inverse Hessian that the logistic solver starts from.

The Hessian of the loss is a mean of (diag(p) - p p^T) (x) x x^T. Replacing the mean of the product
by the product of the means gives G (x) M with G the mean of diag(p) - p p^T, [C, C], and M the
features' second moment, [D, D]. With the penalty lam, and in G's eigenbasis with values g, its
inverse is one matrix per class direction, (M + lam / g)^-1 / g. The shifts lam / g differ little
between directions and between strengths, so a few inverses serve all of them. The precision of the
result does not depend on the estimate, only the speed does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featcache.heads.features import Doubles, Floats, Singles

# Directions of the features that are told apart, by as many rows: an inverse takes the cube. Those
# of less variance than the shift matter little, so strong regularization needs few.
NUM_DIRECTIONS, PER_DIRECTION = (128, 512), 2.0
# Where every column is a direction, this many rows per column are enough.
ROWS_PER_COLUMN = 16
# Rows that the features' variance is estimated from.
VARIANCE_ROWS = 256
# Between two inverses whose shifts differ by this factor, others are interpolated.
RATIO = 10.0
# Shifts this much of the largest eigenvalue are the least that single precision can invert.
LEAST_SHIFT = 3e-6
# An inverse is used for shifts this close to its own, in powers of `RATIO`.
CLOSE = 0.15
# Matrices up to this width are inverted as a whole.
WHOLE = 96


@dataclass(frozen=True, eq=False)
class Inverses:
    """A sum of inverses (M + t)^-1, another one for every class direction.

    Attributes:
        terms: Of each inverse its shift, itself, and its part of every sum [C].
        rows: The R [n, D] of M = R^T R / n, where the inverses are those of R R^T / n + t instead.
    """

    terms: list[tuple[float, Singles, Singles]]
    rows: Singles | None

    def __call__(self, stack: Singles) -> Singles:
        """Apply to columns [D, K, C]."""
        rows, flat = self.rows, stack.reshape(len(stack), -1)
        inside = (flat if rows is None else rows @ flat).reshape(-1, *stack.shape[1:])
        total = np.zeros_like(inside)
        for shift, inverse, own in self.terms:
            scaled = inside * (own if rows is None else own / np.float32(shift))
            total += (inverse @ scaled.reshape(len(inside), -1)).reshape(inside.shape)
        if rows is None:
            return total
        # By Woodbury's identity: (R^T R / n + t)^-1 = (1 - R^T (R R^T / n + t)^-1 R / n) / t.
        outside = (rows.T @ total.reshape(len(rows), -1)).reshape(stack.shape)
        outside *= np.float32(-1 / len(rows))
        outside += stack * sum(own / np.float32(shift) for shift, _, own in self.terms)
        return outside


class ShiftedInverses:
    """(M + t)^-1 for any t > 0, M the second moment of rows.

    Inverses are computed where they are first needed, then at powers of `RATIO` from there; between
    two of them, a sum of both that is right for directions of M with much and with no variance is
    never far off.

    Args:
        X: Centered features [N, D], float32 or float64.
    """

    def __init__(self, X: Floats) -> None:
        self._X, some = X, X[:: max(1, len(X) // VARIANCE_ROWS)]
        self._variance = float(np.einsum("nd,nd->", some, some, dtype=np.float64)) / len(some)
        self._num_directions, self._anchor = 0, 0.0
        self._rows: Singles | None = None

    def sums(self, shifts: Doubles) -> Inverses:
        """The inverses for each of the shifts [C]."""
        self._tell_apart(PER_DIRECTION * self._variance / float(np.median(shifts)))
        shifts = shifts.clip(min=self._least) + self._unseen
        if not self._anchor:
            self._anchor = float(np.exp(np.log(shifts).mean()))
        place = np.log(shifts / self._anchor) / np.log(RATIO)
        low = np.where(abs(place - place.round()) < CLOSE, place.round(), np.floor(place))
        first, second = (self._anchor * RATIO ** (low + i) for i in range(2))
        part = (1 / shifts - 1 / second) / (1 / first - 1 / second)
        part[abs(place - low) < CLOSE] = 1.0
        terms = []
        for power in sorted({*low, *(low + 1)}):
            own = np.where(low == power, part, 0.0) + np.where(low + 1 == power, 1 - part, 0.0)
            if own.any():
                shift = max(self._anchor * RATIO**power, self._least)
                terms.append((shift, self._inverse(int(power), shift), own.astype(np.float32)))
        return Inverses(terms, self._rows)

    def _tell_apart(self, wanted: float) -> None:
        """Sample as many rows as `wanted` asks for, unless a sample at least as large is there."""
        (num_rows, dim), (least, most) = self._X.shape, NUM_DIRECTIONS
        num = least
        while num < min(wanted, most):
            num *= 2
        num = min(num, dim, num_rows)
        if num <= self._num_directions:
            return
        whole = num == dim
        step = max(1, num_rows // (ROWS_PER_COLUMN * dim if whole else num))
        rows: Singles = self._X[::step].astype(np.float32, copy=False)
        rows = rows if whole else rows[:num]
        self._rows, self._num_directions = None if whole else rows, num
        self._gram = (rows.T @ rows if whole else rows @ rows.T) / np.float32(len(rows))
        norm = float(np.linalg.norm(self._gram))
        self._least = LEAST_SHIFT * max(norm, 1e-30)
        self._unseen = 0.0 if whole else _shrinkage(self._gram, norm, dim)
        self._found: dict[int, Singles] = {}

    def _inverse(self, power: int, shift: float) -> Singles:
        if power not in self._found:
            shifted = self._gram.copy()
            shifted[np.diag_indices(len(shifted))] += np.float32(shift)
            factor = inverse_factor(shifted)
            self._found[power] = factor.T @ factor
        return self._found[power]


def inverse_factor(matrix: Singles) -> Singles:
    """The inverse of the Cholesky factor of a symmetric positive definite matrix, by blocks.

    Nearly all of it are products of blocks, which take a fifth of the time of LAPACK's inverse.
    """
    if len(matrix) <= WHOLE:
        return np.linalg.inv(np.linalg.cholesky(matrix))
    half = len(matrix) // 2
    first = inverse_factor(matrix[:half, :half])
    lower = matrix[half:, :half] @ first.T
    second = inverse_factor(matrix[half:, half:] - lower @ lower.T)
    factor = np.zeros_like(matrix)
    factor[:half, :half], factor[half:, half:] = first, second
    factor[half:, :half] = -(second @ lower) @ first
    return factor


def _shrinkage(gram: Singles, norm: float, dim: int) -> float:
    """What some rows' second moment lacks in directions that they do not span.

    The weight of the identity in the estimate of Ledoit and Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices".

    Args:
        gram: Of the rows, R R^T / n [n, n].
        norm: Its Frobenius norm.
        dim: Width D of a row.
    """
    num, mean = len(gram), float(np.trace(gram)) / dim
    spread = norm**2 / dim - mean**2
    lengths = num * np.diag(gram).astype(np.float64)
    noise = (float(lengths @ lengths) / num - norm**2) / (num * dim)
    return mean * float(np.clip(noise / max(spread, 1e-30), 0, 1))


class InverseHessian:
    """The estimate for one penalty, once `measure` was called.

    Args:
        features: Of the rows.
        lam: Penalty, above zero.
    """

    def __init__(self, features: ShiftedInverses, lam: float) -> None:
        self._features, self._lam = features, lam

    def measure(self, curvature: Doubles) -> None:
        """Take the class part, [C, C]."""
        values, self._vectors = np.linalg.eigh(curvature)
        # The all-ones direction has no curvature and no gradient: any value will do.
        values[0] = values[1]
        self._values = values.clip(min=values[-1] * 1e-3)
        self._inverses = self._features.sums(self._lam / self._values)

    def __call__(self, gradients: Floats) -> Doubles:
        """The estimate times gradients [K, D + 1, C], one by one."""
        turned = np.ascontiguousarray((gradients @ self._vectors).transpose(1, 0, 2))
        turned /= self._values
        turned[:-1] = self._inverses(turned[:-1].astype(np.float32))
        return np.asarray(np.ascontiguousarray(turned.transpose(1, 0, 2)) @ self._vectors.T)

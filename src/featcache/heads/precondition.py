"""Where L-BFGS starts from at every step: a first estimate of the loss's inverse Hessian.

The Hessian of L is a mean of (diag(p) - p p^T) (x) x x^T. Taking the mean of a product for the
product of the means gives G (x) M with G the mean of diag(p) - p p^T, [C, C], and M the features'
second moment, [D, D]. In the eigenbases of both this is diagonal, so that the inverse of
G (x) M + lam costs four small products. L-BFGS starts from it at every step, instead of from a
multiple of the identity; it then needs tens of passes where features are so correlated that plain
L-BFGS needs hundreds. Where few rows per class are separable, though, most rows have no curvature
left and the product of the means is no guide: there a multiple of the identity is the better start.
The last step tells which: the start that turns its change of gradient nearer to the step itself.
Precision of the result does not rest on it, only speed does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featcache.heads.softmax_loss import Doubles, Floats


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [D] and eigenvectors [D, D] of a matrix, such as the features' second moment."""

    values: Doubles
    vectors: Doubles


def second_moment_spectrum(X: Floats, max_rows: int = 8192) -> Spectrum:
    """Spectrum of X^T X / N from evenly spaced rows: a sample is enough to precondition.

    Args:
        X: Centred features [N, D].
        max_rows: Rows to look at, at least four times the width.
    """
    step = max(1, len(X) // max(max_rows, 4 * X.shape[1]))
    sample = X[::step]
    moment = (sample.T @ sample).astype(np.float64) / len(sample)
    values, vectors = np.linalg.eigh(moment)
    return Spectrum(values.clip(min=0.0), vectors)


class _Preconditioner:
    """Applies the inverse of G (x) M + lam to a gradient [D + 1, C]."""

    def __init__(self, spectrum: Spectrum, lam: float, classes: Spectrum) -> None:
        self._vectors, self._classes = spectrum.vectors, classes.vectors
        self._inverse = 1.0 / (spectrum.values[:, None] * classes.values + lam)
        self._inverse_bias = 1.0 / classes.values

    def __call__(self, gradient: Doubles) -> Doubles:
        turned = gradient @ self._classes
        turned[:-1] = self._vectors @ ((self._vectors.T @ turned[:-1]) * self._inverse)
        turned[-1] *= self._inverse_bias
        return np.asarray(turned @ self._classes.T)


class Start:
    """The inverse Hessian's first estimate: the preconditioner's or the identity, scaled."""

    def __init__(
        self, spectrum: Spectrum, lam: float, *, plain: bool, classes: Spectrum | None = None
    ) -> None:
        self._spectrum, self._lam = spectrum, lam
        self._precondition: _Preconditioner | None = None
        self._scale = 1.0
        self.plain = plain
        self.classes = classes
        if classes is not None and not plain:
            self._precondition = _Preconditioner(spectrum, lam, classes)

    def measure(self, curvature: Doubles) -> None:
        """Take the class part of the preconditioner, [C, C]."""
        values, vectors = np.linalg.eigh(curvature)
        # The all-ones direction has no curvature and no gradient: any finite value will do.
        self.classes = Spectrum(values.clip(min=values[-1] * 1e-3), vectors)
        self._precondition = _Preconditioner(self._spectrum, self._lam, self.classes)

    def fit(self, last: tuple[Doubles, Doubles] | None, *, compare: bool) -> None:
        """Choose, if asked to, and scale by the last step and its change of gradient."""
        if last is None:
            return
        step, change = last
        turned = change
        if self._precondition is not None and (compare or not self.plain):
            guess = self._precondition(change)
            if compare:
                self.plain = _cosine(step, guess) <= _cosine(step, change)
            turned = change if self.plain else guess
        self._scale = float(np.vdot(step, change)) / float(np.vdot(change, turned))

    def __call__(self, gradient: Doubles) -> Doubles:
        """The estimate times a gradient [D + 1, C]."""
        if self.plain or self._precondition is None:
            return self._scale * gradient
        return self._scale * self._precondition(gradient)


def _cosine(a: Doubles, b: Doubles) -> float:
    return float(np.vdot(a, b)) / float(np.linalg.norm(a) * np.linalg.norm(b))

"""The loss of multinomial logistic regression and its gradient, block by block.

With rows x_i of n, weights s_i that sum to one, and logits z_i = x_i W + b, the loss is

    L(W, b) = sum_i s_i (log sum_c exp z_ic - z_iy_i).

Each block of rows is read once for logits and gradient together; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.heads.features import Doubles, Floats, Ints

Block = tuple[Floats, Ints, Floats]

# A block of rows stays in the processor's cache between its two matrix products.
CHUNK_BYTES = 8 << 20


@dataclass(kw_only=True)
class SoftmaxLoss:
    """A weighted mean of cross-entropies over rows that come in blocks.

    Attributes:
        blocks: Called once per evaluation; yields features [n, D], class indices [n] and
            weights [n]. All weights together sum to one.
        feature_dim: Width D.
        num_classes: Number C of classes.
        class_share: Total weight of every class, [C].
        num_evaluations: Passes over the rows so far.
        exact: Whether to compute in float64 even where features are float32: slower, and needed
            only to distinguish losses that are nearly zero.
    """

    blocks: Callable[[], Iterator[Block]]
    feature_dim: int
    num_classes: int
    class_share: Doubles
    num_evaluations: int = 0
    exact: bool = False

    def evaluate(self, weight: Doubles, bias: Doubles, curvature: Doubles | None = None) -> Any:
        """Loss and gradient at one point.

        Args:
            weight: [D, C].
            bias: [C].
            curvature: If given, [C, C], overwritten with the mean of diag(p) - p p^T.

        Returns:
            The loss, and its gradient [D + 1, C] with that of the bias last.
        """
        self.num_evaluations += 1
        num_classes = self.num_classes
        gradient = np.zeros((num_classes, self.feature_dim + 1))
        if curvature is not None:
            curvature[:] = 0.0
        loss = 0.0
        for features, y, share in self.blocks():
            X = features.astype(np.float64) if self.exact else features
            logits = np.ascontiguousarray((X @ weight.astype(X.dtype, copy=False)).T)
            logits += bias.astype(X.dtype, copy=False)[:, None]
            error, losses = prediction_errors(logits, y)
            loss += float(share.astype(np.float64) @ losses)
            if curvature is not None:
                curvature += _class_curvature(error, y, share)
            error *= share
            gradient[:, -1] += error.sum(axis=1, dtype=np.float64)
            gradient[:, :-1] += error @ X
        return loss, np.ascontiguousarray(gradient.T)


def prediction_errors(z: Floats, y: Ints) -> tuple[Floats, Floats]:
    """Probabilities less one-hot labels [C, n], and cross-entropies [n].

    Both are as precise, relative to their size, where a row is almost surely right: what the
    other classes have left is summed, not subtracted from one. With rows last, numpy's sums over
    the classes take a tenth of the time.

    Args:
        z: Logits [C, n], which are overwritten.
        y: Class indices [n].
    """
    z -= z.max(axis=0)
    place = y, np.arange(len(y))
    own = z[place]
    np.exp(z, out=z)
    z[place] = 0
    others = z.sum(axis=0)
    total = others + np.exp(own)
    z /= total
    z[place] = -others / total
    return z, np.where(own == 0, np.log1p(others), np.log(total) - own)


def _class_curvature(error: Floats, y: Ints, share: Floats) -> Doubles:
    """The block's part of the mean of diag(p) - p p^T, [C, C]."""
    p = error.copy()
    p[y, np.arange(len(y))] += 1
    weighted = p * share
    return np.asarray(np.diag(weighted.sum(axis=1, dtype=np.float64)) - p @ weighted.T)


def loss_in_memory(X: Floats, y: Ints, share: Doubles, num_classes: int) -> SoftmaxLoss:
    """The loss over rows held in memory.

    Args:
        X: Features [N, D], float32 or float64, contiguous; arithmetic is done in this type.
        y: Class indices [N].
        share: Weights [N] that sum to one.
        num_classes: Number C of classes.
    """
    rows = max(256, CHUNK_BYTES // (X.shape[1] * X.itemsize))
    cuts = [slice(i, i + rows) for i in range(0, len(X), rows)]
    light = share.astype(X.dtype)

    def blocks() -> Iterator[Block]:
        return ((X[cut], y[cut], light[cut]) for cut in cuts)

    totals = np.bincount(y, weights=share, minlength=num_classes)
    return SoftmaxLoss(
        blocks=blocks,
        feature_dim=X.shape[1],
        num_classes=num_classes,
        class_share=totals.astype(np.float64),
        exact=X.dtype == np.float64,
    )

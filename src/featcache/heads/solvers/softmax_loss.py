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

from featcache.heads.linear import Doubles, Floats, Ints

Block = tuple[Floats, Ints, Floats]

# A block of rows stays in the processor's cache between its two matrix products.
CHUNK_BYTES = 2 << 20


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
        gradient = np.zeros((self.feature_dim + 1, self.num_classes))
        outer = np.zeros((self.num_classes, self.num_classes))
        present = np.zeros(self.num_classes)
        loss = 0.0
        for features, y, share in self.blocks():
            X = features.astype(np.float64) if self.exact else features
            p, block_loss = _probabilities(X, y, share, weight, bias)
            loss += block_loss
            if curvature is not None:
                outer += p.T @ (p * share[:, None])
            p *= share[:, None]
            gradient[-1] += p.sum(axis=0, dtype=np.float64)
            # The shares as rounded here: with other sums the gradient would never reach zero.
            present += np.bincount(y, share, self.num_classes)
            p[np.arange(len(y)), y] -= share
            gradient[:-1] += X.T @ p
        if curvature is not None:
            curvature[:] = np.diag(gradient[-1]) - outer
        gradient[-1] -= present
        return loss, gradient


def _probabilities(
    X: Floats, y: Ints, share: Floats, weight: Doubles, bias: Doubles
) -> tuple[Floats, float]:
    """Probabilities [n, C] and the block's part of the loss."""
    z = X @ weight.astype(X.dtype, copy=False)
    z += bias.astype(X.dtype, copy=False)
    z -= z.max(axis=1, keepdims=True)
    own = z[np.arange(len(y)), y]
    np.exp(z, out=z)
    total = z.sum(axis=1)
    loss = float(share.astype(np.float64) @ (np.log(total) - own))
    z /= total[:, None]
    return z, loss


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

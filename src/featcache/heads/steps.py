"""The notebook's loop on cached features: Adam or SGD on a linear layer, a batch at a time.

In numpy: a linear layer's gradient is two lines, and importing torch takes longer than the whole
training. The arithmetic is torch's own, in float32; tests hold the two together. Many settings are
trained at once as one wide layer, since their rows are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import UserError
from featcache.heads.halves import widen
from featcache.heads.linear import Floats
from featcache.heads.rows import Ints, Rows
from featcache.random_order import epoch_order, epoch_views, init_linear

Singles = NDArray[np.float32]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MOMENTUM = 0.9
DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}
# Rows are fetched for so many batches at a time.
FETCH_BATCHES = 64


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How the loop runs; `lr` and `weight_decay` have one entry per head trained together."""

    optimizer: Literal["adam", "sgd"]
    lr: Sequence[float]
    weight_decay: Sequence[float]
    batch_size: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """The state after one epoch.

    Attributes:
        weights: One [C, D] float32 per head.
        biases: One [C] float32 per head.
        losses: Mean train loss of the epoch, one per head.
        seconds: Wall time of the training pass.
    """

    weights: list[Singles]
    biases: list[Singles]
    losses: list[float]
    seconds: float


Batch = tuple[Singles, Ints, Singles | None]
# Called with the epoch's number from 0; yields its batches.
Batches = Callable[[int], Iterator[Batch]]


def batches_in_memory(
    rows: Rows, batch_size: int, seed: int, scale: tuple[Floats, Floats] | None = None
) -> Batches:
    """Batches of an epoch: every row once, in the recipe's order, in one of its views.

    Args:
        rows: Train rows.
        batch_size: Rows per batch; the last may have fewer.
        seed: Of order and views.
        scale: Mean and deviation [D] to standardise with, if wanted.

    Returns:
        For an epoch's number, its batches: features [n, D] float32, labels [n], and weights [n]
        of mean one over the split unless all rows count alike.
    """
    weights = None
    if np.ptp(rows.weights) > 0:
        weights = (rows.weights / rows.weights.mean()).astype(np.float32)
    views = rows.views

    def batches(epoch: int) -> Iterator[Batch]:
        order = epoch_order(rows.num_rows, seed, epoch)
        view = epoch_views(rows.num_rows, len(views), seed, epoch)
        for first in range(0, len(order), FETCH_BATCHES * batch_size):
            index = order[first : first + FETCH_BATCHES * batch_size]
            X = widen(views[view[index], index])
            if scale is not None:
                X = ((X - scale[0]) / scale[1]).astype(np.float32)
            for start in range(0, len(index), batch_size):
                some = slice(start, start + batch_size)
                share = None if weights is None else weights[index[some]]
                yield X[some], rows.y[index[some]], share

    return batches


def train_steps(
    batches: Batches, feature_dim: int, num_classes: int, settings: StepSettings
) -> Iterator[Epoch]:
    """Train one or several linear heads together.

    Args:
        batches: The rows, epoch by epoch.
        feature_dim: Width D.
        num_classes: Number C of classes.
        settings: How.

    Yields:
        The heads after each epoch; losses are means over rows, taken before each step.

    Raises:
        UserError: The loss is no longer finite.
    """
    layer = _Layer(feature_dim, num_classes, settings)
    for epoch in range(settings.epochs):
        start = time.perf_counter()
        total, count = np.zeros(layer.num_heads), 0
        for X, y, share in batches(epoch):
            total += layer.step(X, y, share) * len(y)
            count += len(y)
        losses = total / count
        if not np.isfinite(losses).any():
            raise UserError(
                f"the loss is not finite after epoch {epoch + 1}: give a smaller --lr, or "
                "--standardize on"
            )
        weights, biases = layer.heads()
        yield Epoch(weights, biases, losses.tolist(), time.perf_counter() - start)


class _Layer:
    """S linear layers side by side, with their optimizer: parameters are [D + 1, S * C]."""

    def __init__(self, feature_dim: int, num_classes: int, settings: StepSettings) -> None:
        self.num_heads = len(settings.lr)
        self._num_classes = num_classes
        weight, bias = init_linear(feature_dim, num_classes, settings.seed)
        self._parameters = np.tile(np.vstack([weight.T, bias]), self.num_heads)
        self._gradient = np.empty_like(self._parameters)
        self._first = np.zeros_like(self._parameters)
        self._second = np.zeros_like(self._parameters)
        self._lr = np.repeat(np.asarray(settings.lr, np.float64), num_classes)
        self._decay = np.repeat(np.asarray(settings.weight_decay, np.float32), num_classes)
        self._decays = bool(np.any(self._decay))
        self._update = self._adam if settings.optimizer == "adam" else self._sgd
        self._count = 0

    def heads(self) -> tuple[list[Singles], list[Singles]]:
        """Weights [C, D] and biases [C], one per head."""
        parts = np.split(self._parameters, self.num_heads, axis=1)
        return [np.ascontiguousarray(p[:-1].T) for p in parts], [p[-1].copy() for p in parts]

    def step(self, X: Singles, y: Ints, share: Singles | None) -> NDArray[np.float64]:
        """One step on one batch; returns each head's loss on it before the step, [S]."""
        n = len(y)
        logits = (X @ self._parameters[:-1] + self._parameters[-1]).reshape(n, self.num_heads, -1)
        logits -= logits.max(axis=2, keepdims=True)
        row = np.arange(n)
        own = logits[row, :, y]
        np.exp(logits, out=logits)
        total = logits.sum(axis=2)
        losses = np.log(total) - own
        logits /= total[:, :, None]
        logits[row, :, y] -= 1
        logits *= np.float32(1 / n) if share is None else (share / n)[:, None, None]
        flat = logits.reshape(n, -1)
        np.matmul(X.T, flat, out=self._gradient[:-1])
        flat.sum(axis=0, out=self._gradient[-1])
        if self._decays:
            self._gradient += self._decay * self._parameters
        self._count += 1
        self._update()
        counted = losses if share is None else losses * share[:, None]
        return np.asarray(counted.mean(axis=0, dtype=np.float64))

    def _adam(self) -> None:
        """Adam as torch computes it: bias-corrected, epsilon outside the root."""
        gradient, first, second = self._gradient, self._first, self._second
        first += np.float32(1 - BETA1) * (gradient - first)
        second *= np.float32(BETA2)
        second += np.float32(1 - BETA2) * gradient * gradient
        size = np.sqrt(second)
        size /= np.float32(np.sqrt(1 - BETA2**self._count))
        size += np.float32(EPSILON)
        rate = (self._lr / (1 - BETA1**self._count)).astype(np.float32)
        np.divide(first, size, out=size)
        size *= rate
        self._parameters -= size

    def _sgd(self) -> None:
        """SGD with momentum as torch computes it."""
        if self._count == 1:
            self._first[:] = self._gradient
        else:
            self._first *= np.float32(MOMENTUM)
            self._first += self._gradient
        self._parameters -= self._lr.astype(np.float32) * self._first


def train_steps_torch(
    batches: Batches, feature_dim: int, num_classes: int, settings: StepSettings
) -> Iterator[Epoch]:
    """`train_steps` with torch's own layer, loss and optimizer; one head only.

    Raises:
        UserError: Several heads were asked for, or the loss is no longer finite.
    """
    import torch

    if len(settings.lr) != 1:
        raise UserError("--sweep trains in numpy: leave --backend out")
    weight, bias = init_linear(feature_dim, num_classes, settings.seed)
    layer = torch.nn.Linear(feature_dim, num_classes)
    layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    rate, decay = settings.lr[0], settings.weight_decay[0]
    optimizer: torch.optim.Optimizer = torch.optim.Adam(
        layer.parameters(), rate, weight_decay=decay
    )
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(layer.parameters(), rate, MOMENTUM, weight_decay=decay)
    for epoch in range(settings.epochs):
        start = time.perf_counter()
        total, count = 0.0, 0
        for X, y, share in batches(epoch):
            losses: Any = torch.nn.functional.cross_entropy(
                layer(torch.from_numpy(X)), torch.from_numpy(y), reduction="none"
            )
            loss = (losses if share is None else losses * torch.from_numpy(share)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(y)
            count += len(y)
        if not np.isfinite(total):
            raise UserError(
                f"the loss is not finite after epoch {epoch + 1}: give a smaller --lr, or "
                "--standardize on"
            )
        weight, bias = (p.detach().numpy().copy() for p in layer.parameters())
        yield Epoch([weight], [bias], [total / count], time.perf_counter() - start)

"""The notebook's loop on cached features: Adam or SGD on a linear layer, a batch at a time.

numpy is the default because importing torch takes longer than the training; torch's own layer,
loss and optimizer are kept as `--backend torch`, and tests hold the two together. numpy trains many
settings at once as one wide layer, since their rows are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.features import Doubles, Ints, Singles
from featcache.heads.linear import LinearHead
from featcache.heads.solvers.base import (
    FittedHead,
    HeldOutPredictions,
    Settings,
    cross_entropy_predictions,
    standardize_choices,
    threads_for,
)
from featcache.heads.training_data import Batches, Rows, Scale, TrainRows
from featcache.random_order import init_linear
from featcache.results import EpochRecord

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MOMENTUM = 0.9
DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}
# Multiples of the default learning rate, and decays, that --sweep tries together.
SWEEP_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SWEEP_DECAYS = (1e-2, 1e-3, 1e-4, 0.0)


@dataclass(frozen=True, kw_only=True)
class SgdSettings:
    """How the loop runs; `lr` and `weight_decay` have one entry per head trained together."""

    optimizer: Literal["adam", "sgd"]
    lr: Sequence[float]
    weight_decay: Sequence[float]
    epochs: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """The state after one epoch.

    Attributes:
        weights: One [C, D] float32 per head.
        biases: One [C] float32 per head.
        losses: Mean train loss of the epoch, one per head, each batch's taken before its step.
        seconds: Wall time of the training pass.
    """

    weights: list[Singles]
    biases: list[Singles]
    losses: list[float]
    seconds: float


class Layer(Protocol):
    """Linear heads with their optimizer."""

    def step(self, X: Singles, y: Ints, share: Singles | None) -> Doubles:
        """One step on one batch; returns each head's loss on it before the step, [S]."""

    def heads(self) -> tuple[list[Singles], list[Singles]]:
        """Weights [C, D] and biases [C], one per head."""


def train_layer(layer: Layer, batches: Batches, epochs: int) -> Iterator[Epoch]:
    """Train one or several linear heads together.

    Args:
        layer: A `NumpyLayer` or a `TorchLayer`.
        batches: The rows, epoch by epoch.
        epochs: Passes over the rows.

    Yields:
        The heads after each epoch.

    Raises:
        UserError: The loss is no longer finite.
    """
    for epoch in range(epochs):
        start = time.perf_counter()
        total: Any = 0.0
        count = 0
        for X, y, share in batches(epoch):
            total = total + layer.step(X, y, share) * len(y)
            count += len(y)
        losses = total / count
        if not np.isfinite(losses).any():
            raise UserError(
                f"the loss is not finite after epoch {epoch + 1}: give a smaller --lr, or "
                "--standardize on"
            )
        weights, biases = layer.heads()
        yield Epoch(weights, biases, losses.tolist(), time.perf_counter() - start)


class NumpyLayer:
    """S linear layers side by side: parameters are [D + 1, S * C]."""

    def __init__(self, feature_dim: int, num_classes: int, settings: SgdSettings) -> None:
        self._num_heads = len(settings.lr)
        weight, bias = init_linear(feature_dim, num_classes, settings.seed)
        self._parameters = np.tile(np.vstack([weight.T, bias]), self._num_heads)
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
        parts = np.split(self._parameters, self._num_heads, axis=1)
        return [np.ascontiguousarray(p[:-1].T) for p in parts], [p[-1].copy() for p in parts]

    def step(self, X: Singles, y: Ints, share: Singles | None) -> Doubles:
        """One step on one batch; returns each head's loss on it before the step, [S]."""
        n = len(y)
        logits = (X @ self._parameters[:-1] + self._parameters[-1]).reshape(n, self._num_heads, -1)
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


class TorchLayer:
    """One linear layer with torch's own loss and optimizer."""

    def __init__(self, feature_dim: int, num_classes: int, settings: SgdSettings) -> None:
        import torch

        assert len(settings.lr) == 1, "several heads train in numpy"
        weight, bias = init_linear(feature_dim, num_classes, settings.seed)
        self._layer = torch.nn.Linear(feature_dim, num_classes)
        self._layer.load_state_dict(
            {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        )
        rate, decay = settings.lr[0], settings.weight_decay[0]
        self._optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self._layer.parameters(), rate, weight_decay=decay
        )
        if settings.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                self._layer.parameters(), rate, MOMENTUM, weight_decay=decay
            )

    def heads(self) -> tuple[list[Singles], list[Singles]]:
        """Weight [C, D] and bias [C] of the one head."""
        weight, bias = (p.detach().numpy().copy() for p in self._layer.parameters())
        return [weight], [bias]

    def step(self, X: Singles, y: Ints, share: Singles | None) -> Doubles:
        """One step on one batch; returns the loss on it before the step, [1]."""
        import torch

        losses: Any = torch.nn.functional.cross_entropy(
            self._layer(torch.from_numpy(X)), torch.from_numpy(y), reduction="none"
        )
        loss = (losses if share is None else losses * torch.from_numpy(share)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return np.array([float(loss.detach())])


@dataclass(frozen=True, kw_only=True)
class SgdSolver:
    """Adam or SGD as `train-head` uses it, with or without a sweep of rates and decays.

    Attributes:
        config: The command's settings; `solver` is adam or sgd.
        score_epoch: Gives the test accuracy of a head. It is shown after each epoch, as in the
            notebook, and not used.
    """

    config: TrainHeadConfig
    score_epoch: Callable[[LinearHead], float]
    patience: int | None = None  # all candidates train together

    @property
    def name(self) -> str:
        """Adam or sgd."""
        return self.config.solver

    @property
    def backend(self) -> str:
        """Numpy unless torch was asked for."""
        return "torch" if self.config.backend == "torch" else "numpy"

    def series(self, rows: Rows) -> list[list[Settings]]:
        """The recipe as given; with --sweep, every rate and decay, plain and standardized."""
        del rows
        config = self.config
        if not config.sweep:
            return [[self.default()]]
        base = float(self.default()["lr"])
        rates = [base] if config.lr is not None else [float(f"{base * r:.3g}") for r in SWEEP_RATES]
        decays = sorted({*SWEEP_DECAYS, config.weight_decay}, reverse=True)
        return [
            [
                {"lr": lr, "weight_decay": decay, "standardize": scaled}
                for decay in decays
                for lr in rates
            ]
            for scaled in standardize_choices(config.standardize)
        ]

    def default(self) -> Settings:
        """The notebook's settings, or the ones given; plain features unless asked otherwise."""
        lr = DEFAULT_LR[self.config.solver] if self.config.lr is None else self.config.lr
        scaled = self.config.standardize == "on"
        return {"lr": lr, "weight_decay": self.config.weight_decay, "standardize": scaled}

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> PreparedSgd:
        """All candidates are trained together when the first one predicts."""
        return PreparedSgd(self, rows, candidates)

    def train(
        self, rows: TrainRows, candidates: Sequence[Settings]
    ) -> Iterator[tuple[Epoch, list[LinearHead]]]:
        """Train candidates that agree on standardization; yields their heads after each epoch."""
        config = self.config
        settings = SgdSettings(
            optimizer="adam" if config.solver == "adam" else "sgd",
            lr=[float(c["lr"]) for c in candidates],
            weight_decay=[float(c["weight_decay"]) for c in candidates],
            epochs=config.epochs,
            seed=config.seed,
        )
        scale = None
        if candidates[0]["standardize"]:
            moments = rows.moments()
            scale = (moments.mean(), moments.deviation())
        batches = rows.batches(config.batch_size, config.seed, scale)
        kind = TorchLayer if self.backend == "torch" else NumpyLayer
        layer = kind(rows.feature_dim, rows.num_classes, settings)
        for epoch in train_layer(layer, batches, config.epochs):
            pairs = zip(epoch.weights, epoch.biases, strict=True)
            names = rows.sample.class_names
            yield epoch, [head_of(weight, bias, scale, names, self.name) for weight, bias in pairs]


def head_of(
    weight: Singles, bias: Singles, scale: Scale | None, class_names: list[str], solver: str
) -> LinearHead:
    """A trained layer as a head of raw features, standardization folded in."""
    head = LinearHead(weight=weight, bias=bias, class_names=class_names, solver=solver)
    if scale is None:
        return head
    mean, deviation = scale
    raw = weight.astype(np.float64) / deviation
    return head.replace(weight=raw, bias=bias - raw @ mean, mean=mean, scale=deviation).to_float32()


class PreparedSgd:
    """Rows for the loop; all candidates that agree on standardization train in one run."""

    def __init__(self, solver: SgdSolver, rows: TrainRows, candidates: Sequence[Settings]) -> None:
        self._solver, self._rows, self._candidates = solver, rows, candidates
        self._heads: dict[bool, list[LinearHead]] = {}

    def fit(self, settings: Settings) -> FittedHead[LinearHead]:
        """The head after the last epoch, and each epoch's loss and test accuracy."""
        epochs: list[EpochRecord] = []
        with threads_for(0):  # a batch is small whatever the number of rows
            for epoch, heads in self._solver.train(self._rows, [settings]):
                start = time.perf_counter()
                epochs.append(
                    {
                        "epoch": len(epochs) + 1,
                        "train_loss": epoch.losses[0],
                        "test_top1": self._solver.score_epoch(heads[0]),
                        "seconds": epoch.seconds,
                        "eval_seconds": time.perf_counter() - start,
                    }
                )
        return FittedHead(head=heads[0], num_passes=len(epochs), epochs=epochs)

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Predict with the head after the last epoch."""
        scaled = bool(settings["standardize"])
        alike = [c for c in self._candidates if c["standardize"] is scaled]
        if scaled not in self._heads:
            for _, heads in self._solver.train(self._rows, alike):
                self._heads[scaled] = heads
        return cross_entropy_predictions(self._heads[scaled][alike.index(settings)], held)

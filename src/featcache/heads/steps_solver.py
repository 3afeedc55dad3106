"""The notebook's loop as a solver, with or without a sweep of learning rates and decays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from featcache.config import TrainHeadConfig
from featcache.heads.linear import Floats, LinearHead
from featcache.heads.logistic import moments
from featcache.heads.logistic_solver import standardize_choices
from featcache.heads.rows import Rows
from featcache.heads.solver import Answer, Fitted, Settings, cross_entropy_answer
from featcache.heads.steps import (
    DEFAULT_LR,
    Batches,
    Epoch,
    Singles,
    StepSettings,
    batches_in_memory,
    train_steps,
    train_steps_torch,
)

Train = Callable[[Sequence[Settings]], Iterator[tuple[Epoch, list[LinearHead]]]]
# Multiples of the default learning rate, and decays, that --sweep tries together.
SWEEP_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SWEEP_DECAYS = (1e-2, 1e-3, 1e-4, 0.0)


@dataclass(frozen=True, kw_only=True)
class StepsSolver:
    """Adam or SGD on a linear layer, a batch at a time.

    Attributes:
        class_names: C names.
        config: The command's settings; `solver` is adam or sgd.
    """

    class_names: list[str]
    config: TrainHeadConfig

    @property
    def name(self) -> str:
        """Adam or sgd."""
        return self.config.solver

    @property
    def backend(self) -> str:
        """Numpy unless torch was asked for."""
        return "torch" if self.config.backend == "torch" else "numpy"

    @property
    def patience(self) -> int | None:
        """All candidates train together."""
        return None

    def series(self, rows: Rows) -> list[list[Settings]]:
        """The recipe as given; with --sweep, every rate and decay, plain and standardised."""
        del rows
        config = self.config
        if not config.sweep:
            return [[self.fallback()]]
        base = float(self.fallback()["lr"])
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

    def fallback(self) -> Settings:
        """The notebook's settings, or the ones given; plain features unless asked otherwise."""
        lr = DEFAULT_LR[self.config.solver] if self.config.lr is None else self.config.lr
        scaled = self.config.standardize == "on"
        return {"lr": lr, "weight_decay": self.config.weight_decay, "standardize": scaled}

    def prepare(self, rows: Rows, candidates: Sequence[Settings]) -> PreparedSteps:
        """Train all candidates together when the first is asked for."""
        return PreparedSteps(partial(self.epochs, rows), candidates)

    def epochs(
        self, rows: Rows, candidates: Sequence[Settings]
    ) -> Iterator[tuple[Epoch, list[LinearHead]]]:
        """Train candidates that agree on standardisation; yields them after each epoch."""
        scale = None
        if candidates[0]["standardize"]:
            features, _, weights = rows.stacked()
            scale = moments(features.astype(np.float32), weights / weights.sum())
        batches = batches_in_memory(rows, self.config.batch_size, self.config.seed, scale)
        return self.epochs_of(batches, rows.feature_dim, scale, candidates)

    def epochs_of(
        self,
        batches: Batches,
        feature_dim: int,
        scale: tuple[Floats, Floats] | None,
        candidates: Sequence[Settings],
    ) -> Iterator[tuple[Epoch, list[LinearHead]]]:
        """Train on batches from anywhere; `scale` is what they were standardised with."""
        config = self.config
        settings = StepSettings(
            optimizer="adam" if config.solver == "adam" else "sgd",
            lr=[float(c["lr"]) for c in candidates],
            weight_decay=[float(c["weight_decay"]) for c in candidates],
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
        )
        train = train_steps_torch if self.backend == "torch" else train_steps
        for epoch in train(batches, feature_dim, len(self.class_names), settings):
            pairs = zip(epoch.weights, epoch.biases, strict=True)
            yield epoch, [self._head(weight, bias, scale) for weight, bias in pairs]

    def _head(
        self, weight: Singles, bias: Singles, scale: tuple[Floats, Floats] | None
    ) -> LinearHead:
        mean, deviation = scale or (None, None)
        if mean is not None and deviation is not None:
            raw = weight.astype(np.float64) / deviation
            bias = (bias - raw @ mean).astype(np.float32)
            weight = raw.astype(np.float32)
        return LinearHead(
            weight=weight,
            bias=bias,
            mean=None if mean is None else mean.astype(np.float32),
            scale=None if deviation is None else deviation.astype(np.float32),
            class_names=self.class_names,
            solver=self.config.solver,
        )


class PreparedSteps:
    """Rows for the loop; all candidates that agree on standardisation train in one run.

    Args:
        train: Trains some candidates; yields their heads after each epoch.
        candidates: Everything that will be asked for.
    """

    def __init__(self, train: Train, candidates: Sequence[Settings]) -> None:
        self._train, self._candidates = train, candidates
        self._heads: dict[bool, list[LinearHead]] = {}

    def fit(self, settings: Settings) -> Fitted:
        """The head after the last epoch."""
        return Fitted(head=self._head_of(settings))

    def answer(self, settings: Settings, held: Rows) -> Answer:
        """Answer with the head after the last epoch."""
        return cross_entropy_answer(self._head_of(settings), held)

    def _head_of(self, settings: Settings) -> LinearHead:
        scaled = bool(settings["standardize"])
        alike = [c for c in self._candidates if c["standardize"] is scaled]
        if scaled not in self._heads:
            for _, heads in self._train(alike):
                self._heads[scaled] = heads
        return self._heads[scaled][alike.index(settings)]

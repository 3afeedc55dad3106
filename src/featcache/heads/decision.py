"""From logits to probabilities, and from probabilities to a class: what held-out rows taught."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from featcache.config import Task
from featcache.config.checks import check_positive, check_range, record_from_json
from featcache.errors import UserError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Wanted = Literal["precision", "recall"]


def softmax(logits: Floats) -> Floats:
    """Probabilities from logits, along the last axis, without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def sigmoid(logits: Floats) -> Floats:
    """Probabilities from logits, each by itself."""
    with np.errstate(over="ignore"):  # of very negative logits: the result is 0
        return np.asarray(1 / (1 + np.exp(-logits)))


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From which probability on a picture counts as one of two classes.

    Attributes:
        positive: That class's number, 0 or 1.
        probability: The threshold.
        wanted: What was asked for.
        level: How much of it.
        precision: Reached on the held-out rows.
        recall: Likewise.
    """

    positive: int
    probability: float
    wanted: Wanted
    level: float
    precision: float
    recall: float

    def __post_init__(self) -> None:
        check_range("positive", self.positive, 0, 1)
        for name in ("probability", "level", "precision", "recall"):
            check_range(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a head's logits become probabilities and a class, fitted on rows it had not learned from.

    Attributes:
        temperature: What logits are divided by before the softmax.
        threshold: For two classes, if one was asked for; without one, the likeliest class wins.
        task: What an image has: one class, any of several labels, or a number.
        label_thresholds: With several labels, the probability from which each is predicted.
        fitted_on: The rows that decided, in words.
    """

    temperature: float = 1.0
    threshold: Threshold | None = None
    fitted_on: str = "nothing"
    task: Task = "multiclass"
    label_thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        if (self.task == "multilabel") != (self.label_thresholds is not None):
            raise UserError(f"label thresholds do not go with the task {self.task}")
        for threshold in self.label_thresholds or ():
            check_range("label_thresholds", threshold, 0, 1)

    def probabilities(self, logits: Floats) -> Floats:
        """Calibrated probabilities, along the last axis; of several labels each by itself.

        What predicts a number has no probabilities: its outputs are returned as they are.
        """
        if self.task == "regression":
            return logits
        scaled = logits if self.temperature == 1 else logits / self.temperature
        return sigmoid(scaled) if self.task == "multilabel" else softmax(scaled)

    def classes(self, probabilities: Floats) -> Ints:
        """The class of each row of calibrated probabilities [N, C]."""
        if self.threshold is None:
            return np.asarray(probabilities.argmax(axis=1), np.int64)
        positive = self.threshold.positive
        reached = probabilities[:, positive] >= self.threshold.probability
        return np.where(reached, positive, 1 - positive).astype(np.int64)

    def predict(self, logits: Floats) -> NDArray[Any]:
        """What rows of logits [N, C] mean.

        Returns:
            Classes [N] int64; with several labels, whether a row has each, [N, C] bool; of a
            number, float [N].
        """
        if self.task == "regression":
            return np.asarray(logits[:, 0])
        if self.label_thresholds is not None:
            return np.asarray(self.probabilities(logits) >= np.array(self.label_thresholds))
        return self.classes(logits if self.threshold is None else self.probabilities(logits))

    def to_json(self) -> dict[str, Any]:
        """As in a head file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Rebuild from what `to_json` returned.

        Raises:
            ValueError: A field is unknown, has another type, or is out of range.
        """
        return record_from_json(cls, value)


PLAIN = Decision()
"""Nothing fitted: softmax, and the likeliest class."""

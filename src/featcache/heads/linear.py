"""The linear head, and what every head knows of probabilities and of other classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.config import JsonObject, Task
from featcache.config.checks import check_range, record_from_json
from featcache.display import Facts
from featcache.errors import UserError, listed
from featcache.heads.features import (
    Doubles,
    Floats,
    Ints,
    Singles,
    checked_features,
    row_blocks,
    widen,
)

if TYPE_CHECKING:
    from torch import nn

Wanted = Literal["precision", "recall"]

# Weight zero and this bias: a class without train rows is never predicted.
ABSENT_BIAS = -1e4
# The range of temperatures.
TEMPERATURES = (1e-2, 1e2)


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
    """The probability from which an image counts as the positive one of two classes.

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
        fitted_on: The rows that decided, in words.
        task: What an image has: one class, any of several labels, or a number.
        label_thresholds: With several labels, the probability from which each is predicted.
    """

    temperature: float = 1.0
    threshold: Threshold | None = None
    fitted_on: str = "nothing"
    task: Task = "multiclass"
    label_thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, *TEMPERATURES)
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

    def has_labels(self, probabilities: Floats) -> NDArray[np.bool_]:
        """With several labels, which of them rows of probabilities [..., C] are given."""
        assert self.label_thresholds is not None
        return np.asarray(probabilities >= np.array(self.label_thresholds))

    def predict(self, logits: Floats) -> NDArray[Any]:
        """What rows of logits [N, C] mean.

        Returns:
            Classes [N] int64; with several labels, whether a row has each, [N, C] bool; of a
            number, float [N].
        """
        if self.task == "regression":
            return np.asarray(logits[:, 0])
        if self.label_thresholds is not None:
            return self.has_labels(self.probabilities(logits))
        return self.classes(logits if self.threshold is None else self.probabilities(logits))

    def to_json(self) -> JsonObject:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownRows:
    """What tells images of the known classes from others, by conformal p-values.

    An image is strange if no class is likely, or if its features are far from those of all train
    images. Both are ranked among held-out train rows, Fisher's method joins the two ranks, and the
    joint score is ranked again: of images like the held-out ones, a share of `level` has a p-value
    of at most `level`, whatever the network (Bates et al. 2023, "Testing for Outliers with
    Conformal p-values").

    Attributes:
        rows: Some train rows, scaled to length one [m, D] float16.
        confidence: Probability of the likeliest class of n held-out rows, ascending.
        distance: Their distance to the nearest of `rows`: one less the cosine, ascending.
        strangeness: Their joint scores, ascending.
    """

    rows: NDArray[np.float16]
    confidence: Singles
    distance: Singles
    strangeness: Singles

    def __post_init__(self) -> None:
        ranked = (self.confidence, self.distance, self.strangeness)
        if self.rows.ndim != 2 or len({a.shape for a in ranked}) > 1 or ranked[0].ndim != 1:
            raise UserError("known rows need rows [m, D] and three columns of equal length")
        if not all((a[1:] >= a[:-1]).all() for a in ranked):
            raise UserError("the columns of known rows are not ascending")

    @classmethod
    def ranking(cls, rows: NDArray[np.float16], confidence: Floats, distance: Floats) -> KnownRows:
        """Rank held-out rows.

        Args:
            rows: Train rows, scaled to length one [m, D].
            confidence: Of held-out rows [n], in any order.
            distance: Of the same rows to train rows without them [n].
        """
        ranks = cls(
            rows=rows,
            confidence=np.sort(confidence).astype(np.float32),
            distance=np.sort(distance).astype(np.float32),
            strangeness=np.zeros(len(confidence), np.float32),
        )
        # A held-out row counts itself, as `p_values` counts the row that is asked about.
        strangeness = ranks._joint(confidence.astype(np.float32), distance.astype(np.float32), 0)
        return dataclasses.replace(ranks, strangeness=np.sort(strangeness).astype(np.float32))

    @cached_property
    def _bank(self) -> Singles:
        return widen(self.rows)

    def p_values(self, features: Floats, confidence: Floats) -> Doubles:
        """How usual rows are among held-out ones [N]: low for other classes.

        Args:
            features: [N, D].
            confidence: The probability of each row's likeliest class [N].
        """
        distance = nearest_distance(self._bank, features)
        joint = self._joint(confidence.astype(np.float32), distance, 1).astype(np.float32)
        stranger = len(self.strangeness) - np.searchsorted(self.strangeness, joint, side="left")
        return np.asarray((1 + stranger) / (len(self.strangeness) + 1))

    def _joint(self, confidence: Singles, distance: Singles, own: int) -> Doubles:
        less_sure = np.searchsorted(self.confidence, confidence, side="right")
        farther = len(self.distance) - np.searchsorted(self.distance, distance, side="left")
        total, farthest = np.log(len(self.distance) + own), max(float(self.distance[-1]), 1e-6)
        # Beyond the farthest held-out row ranks say no more: there the term grows with distance.
        beyond = total * np.maximum(distance / farthest - 1, 0)
        return np.asarray(2 * total - np.log(own + less_sure) - np.log(own + farther) + beyond)


def unit_rows(features: Floats) -> NDArray[np.float16]:
    """Features [N, D] scaled to length one; zeros stay zeros."""
    return _of_unit_length(widen(features)).astype(np.float16)


def _of_unit_length(features: Floats) -> Floats:
    length = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    return np.asarray(features / np.where(length > 0, length, 1))


def nearest_distance(bank: Singles, features: Floats) -> Singles:
    """One less the largest cosine between each of features [N, D] and unit rows [m, D]."""
    found = np.empty(len(features), np.float32)
    for cut, block in row_blocks(features, 1024):
        found[cut] = 1 - (_of_unit_length(block) @ bank.T).max(axis=1)
    return found


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BaseHead(Facts):
    """What every head has beside the arrays that it predicts with.

    Attributes:
        class_names: C names; class c of every prediction is `class_names[c]`.
        solver: What fitted it.
        chosen: The settings it was fitted with, and how they were chosen.
        scores: What it scored, by name.
        provenance: Which backbone, preprocessing and dataset the features came from.
        decision: How logits become probabilities and a class.
        known: Tells images of other classes, if rows were held out.
    """

    class_names: list[str]
    solver: str
    chosen: JsonObject = field(default_factory=dict)
    scores: JsonObject = field(default_factory=dict)
    provenance: JsonObject = field(default_factory=dict)
    decision: Decision = PLAIN
    known: KnownRows | None = None

    @property
    def feature_dim(self) -> int:
        """Width D of the features it takes."""
        raise NotImplementedError

    def decision_function(self, X: ArrayLike) -> Floats:
        """Logits [N, C] of features [N, D].

        Raises:
            UserError: The features have another width.
        """
        raise NotImplementedError

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Probabilities [N, C] of features [N, D]; of a number, the number [N, 1]."""
        return self.decision.probabilities(self.decision_function(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """What features [N, D] are predicted to have, as `Decision.predict` gives it."""
        return self.decision.predict(self.decision_function(X))

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """As in scikit-learn: accuracy (of several labels, that all are right), or R squared.

        Args:
            X: Features [N, D].
            y: The truth, as `predict` returns it.
        """
        from sklearn.metrics import accuracy_score, r2_score

        score = r2_score if self.decision.task == "regression" else accuracy_score
        return float(score(y, self.predict(X)))

    def replace(self, **fields: Any) -> Self:
        """A copy with other attributes."""
        return dataclasses.replace(self, **fields)

    def _facts(self) -> dict[str, object]:
        scores = self.scores.items()
        named = [f"{name} {value:.3f}" for name, value in scores if isinstance(value, float)]
        return {
            "solver": self.solver,
            "classes": f"{len(self.class_names)} ({listed(self.class_names, 5)})",
            "features": f"{self.feature_dim}-d, from {self.provenance.get('cache', 'memory')}",
            "scores": ", ".join(named) or "none",
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LinearHead(BaseHead):
    """Logits are `X @ weight.T + bias` of raw features; standardization is already folded in.

    Attributes:
        weight: [C, D] float32 or float64.
        bias: [C], like `weight`.
        mean: Mean of the features that the solver saw, [D], when it standardized them.
        scale: Their standard deviation, likewise. `weight` and `bias` need neither.
    """

    weight: Floats
    bias: Floats
    mean: Floats | None = None
    scale: Floats | None = None
    solver: str = "logistic"

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise UserError(
                f"a head needs weight [C, D] and bias [C], not {self.weight.shape} and "
                f"{self.bias.shape}"
            )
        if len(self.class_names) != len(self.weight):
            raise UserError(f"{len(self.class_names)} class names for {len(self.weight)} outputs")

    @property
    def feature_dim(self) -> int:  # noqa: D102 - as for every head
        return int(self.weight.shape[1])

    @property
    def num_params(self) -> int:
        """Trainable parameters: C * D + C."""
        return int(self.weight.size + self.bias.size)

    def decision_function(self, X: ArrayLike) -> Floats:  # noqa: D102
        features = checked_features(X, self.feature_dim)
        dtype = np.result_type(self.weight.dtype, np.float32)
        logits = np.empty((len(features), len(self.bias)), dtype)
        for rows, block in row_blocks(features):
            logits[rows] = block @ self.weight.T
        return np.asarray(logits + self.bias)

    def to_linear(self) -> nn.Linear:
        """The same head as an `nn.Linear`, bit for bit."""
        import torch

        # Made without storage: random initial values would use up the caller's random numbers.
        dtype = getattr(torch, str(self.weight.dtype))
        empty = torch.nn.Linear(self.feature_dim, len(self.bias), device="meta", dtype=dtype)
        layer = empty.to_empty(device="cpu")
        layer.load_state_dict(
            {
                "weight": torch.from_numpy(np.array(self.weight)),
                "bias": torch.from_numpy(np.array(self.bias)),
            }
        )
        return layer

    @classmethod
    def from_linear(cls, layer: nn.Linear, class_names: list[str], **fields: Any) -> Self:
        """The same head as a given `nn.Linear`, bit for bit.

        Args:
            layer: With or without a bias.
            class_names: One per output.
            **fields: Other attributes, such as `provenance`.
        """
        weight = layer.weight.detach().cpu().numpy().copy()
        bias = None if layer.bias is None else layer.bias.detach().cpu().numpy().copy()
        if bias is None:
            bias = np.zeros(len(weight), weight.dtype)
        return cls(weight=weight, bias=bias, class_names=class_names, **fields)

    def to_float32(self) -> Self:
        """The head in the precision that is saved and scored."""
        arrays = {name: getattr(self, name) for name in ("weight", "bias", "mean", "scale")}
        return self.replace(
            **{name: None if a is None else a.astype(np.float32) for name, a in arrays.items()}
        )

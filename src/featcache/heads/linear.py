"""The linear head, which a head file holds and which scores features; and features as float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.config import JsonObject
from featcache.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Floats = NDArray[np.floating[Any]]
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK_ROWS = 8192
# Weight zero and this bias: a class without train rows is never predicted.
ABSENT_BIAS = -1e4
# `widen` moves bits and multiplies, without branches. numpy converts float16 one by one, with
# branches that zeros among other values make unpredictable: a whole streamed run then takes 20 to
# 30 % more processor time.
_EXPONENT = np.uint16(0x7C00)
# The sign, and a half's exponent and fraction moved up to where a single has the end of its own.
_BITS = np.array(0x8FFFE000, np.uint32).view(np.int32)
_FRACTION_BITS = 23 - 10
# Exponents count from 15 in halves and from 127 in singles; also right for values below 2**-14.
_BIAS = np.float32(2.0 ** (127 - 15))
_CHUNK = 1 << 16  # values that stay in a core's cache between the steps


def softmax(logits: Floats) -> Floats:
    """Probabilities from logits, along the last axis, without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def row_blocks(X: Floats, num_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, Floats]]:
    """Cut [N, D] rows of any float type into blocks of float32 (float64 stays as it is)."""
    for start in range(0, len(X), num_rows):
        rows = slice(start, min(start + num_rows, len(X)))
        block = X[rows]
        yield rows, block if block.dtype == np.float64 else widen(block)


def all_finite(halves: NDArray[np.float16]) -> bool:
    """Whether no value is infinite or not a number."""
    return bool(((halves.view(np.uint16) & _EXPONENT) != _EXPONENT).all())


def widen(features: NDArray[np.floating[Any]], out: Singles | None = None) -> Singles:
    """Features as float32, the same values.

    Args:
        features: [n, D] of any float type.
        out: [n, D] to write to.

    Returns:
        `out` if given; `features` itself where it is float32 already; a new array otherwise.
    """
    if features.dtype != np.float16 or not all_finite(features):
        if out is None:
            return features.astype(np.float32, copy=False)
        np.copyto(out, features, casting="same_kind")
        return out
    found = np.empty(features.shape, np.float32) if out is None else out
    step = max(1, _CHUNK // max(1, features.shape[1]))
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        bits = found[rows].view(np.int32)
        np.copyto(bits, features[rows].view(np.int16))  # keeps the sign in the highest bit
        bits <<= _FRACTION_BITS
        bits &= _BITS
        found[rows] *= _BIAS
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearHead:
    """Logits are `X @ weight.T + bias` of raw features; standardization is already folded in.

    Attributes:
        weight: [C, D] float32 or float64.
        bias: [C], like `weight`.
        class_names: C names; class c of every prediction is `class_names[c]`.
        mean: Mean of the features that the solver saw, [D], when it standardized them.
        scale: Their standard deviation, likewise. `weight` and `bias` need neither.
        solver: What fitted it.
        chosen: The settings it was fitted with, and how they were chosen.
        scores: What it scored, by name.
        provenance: Which backbone, preprocessing and dataset the features came from.
    """

    weight: Floats
    bias: Floats
    class_names: list[str]
    mean: Floats | None = None
    scale: Floats | None = None
    solver: str = "logistic"
    chosen: JsonObject = field(default_factory=dict)
    scores: JsonObject = field(default_factory=dict)
    provenance: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise UserError(
                f"a head needs weight [C, D] and bias [C], not {self.weight.shape} and "
                f"{self.bias.shape}"
            )
        if len(self.class_names) != len(self.weight):
            raise UserError(f"{len(self.class_names)} class names for {len(self.weight)} outputs")

    @property
    def feature_dim(self) -> int:
        """Width D of the features it takes."""
        return int(self.weight.shape[1])

    @property
    def num_params(self) -> int:
        """Trainable parameters: C * D + C."""
        return int(self.weight.size + self.bias.size)

    def decision_function(self, X: ArrayLike) -> Floats:
        """Logits [N, C] of features [N, D].

        Raises:
            UserError: The features have another width.
        """
        features = checked_features(X, self.feature_dim)
        dtype = np.result_type(self.weight.dtype, np.float32)
        logits = np.empty((len(features), len(self.bias)), dtype)
        for rows, block in row_blocks(features):
            logits[rows] = block @ self.weight.T
        return np.asarray(logits + self.bias)

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Probabilities [N, C] of features [N, D]."""
        return softmax(self.decision_function(X))

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Class indices [N] of features [N, D]."""
        return np.asarray(self.decision_function(X).argmax(axis=1), np.int64)

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Top-1 accuracy on features [N, D] with class indices [N]."""
        from featcache.results.metrics import top1

        return top1(y, self.predict(X))

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

    def replace(self, **fields: Any) -> Self:
        """A copy with other attributes."""
        return dataclasses.replace(self, **fields)

    def to_float32(self) -> Self:
        """The head in the precision that is saved and scored."""
        arrays = {name: getattr(self, name) for name in ("weight", "bias", "mean", "scale")}
        return self.replace(
            **{name: None if a is None else a.astype(np.float32) for name, a in arrays.items()}
        )


def checked_features(X: ArrayLike, feature_dim: int) -> Floats:
    """`X` as an array of floats [N, feature_dim].

    Raises:
        UserError: It has another shape.
    """
    features = np.asarray(X)
    if features.dtype.kind != "f":
        features = features.astype(np.float64)
    if features.ndim != 2 or features.shape[1] != feature_dim:
        raise UserError(
            f"features of shape {features.shape} do not fit a head for [N, {feature_dim}]: "
            "extract them with the backbone that the head was trained on"
        )
    return features

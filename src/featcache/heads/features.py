"""Features as arrays: their types, in blocks, and as float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import UserError

Floats = NDArray[np.floating[Any]]
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK_ROWS = 8192
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

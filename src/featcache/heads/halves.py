"""float16 to float32, exactly, several times as fast as numpy on features of a ReLU network.

numpy widens halves one by one, with branches that zeros among other values make unpredictable: 6 ns
a value where half of them are zero. Moving the bits and multiplying has no branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]

EXPONENT = np.uint16(0x7C00)
# The sign, and a half's exponent and fraction moved up to where a single has the end of its own.
_BITS = np.array(0x8FFFE000, np.uint32).view(np.int32)
_FRACTION_BITS = 23 - 10
# Exponents count from 15 in halves and from 127 in singles; also right for values below 2**-14.
_BIAS = np.float32(2.0 ** (127 - 15))
_CHUNK = 1 << 16  # values that stay in a core's cache between the steps


def all_finite(halves: NDArray[np.float16]) -> bool:
    """Whether no value is infinite or not a number."""
    return bool(((halves.view(np.uint16) & EXPONENT) != EXPONENT).all())


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

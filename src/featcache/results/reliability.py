"""Whether probabilities can be believed: calibration error and reliability diagram."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from featcache.config.checks import check_range
from featcache.errors import UserError

NUM_BINS = 15
"""Of equal width, as in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Probabilities of the predicted classes against how often these are right.

    Attributes:
        ece: Expected calibration error: the mean over rows of the difference between mean
            probability and share of right predictions in the row's bin.
        counts: Rows in each of 15 bins of equal width from 0 to 1.
        confidence: Mean probability of each bin's rows; None in an empty bin.
        top1: Share of each bin's rows that are right, likewise.
    """

    ece: float
    counts: list[int]
    confidence: list[float | None]
    top1: list[float | None]

    def __post_init__(self) -> None:
        check_range("ece", self.ece, 0, 1)
        for name in ("counts", "confidence", "top1"):
            values = getattr(self, name)
            if len(values) != NUM_BINS:
                raise UserError(f"{name} has {len(values)} bins, not {NUM_BINS}")
            for value, count in zip(values, self.counts, strict=False):
                check_range(name, value, 0, math.inf if name == "counts" else 1)
                if count and value is None:
                    raise UserError(f"{name} lacks the value of a bin that has rows")


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What the temperature did, measured on the test split.

    Attributes:
        temperature: What logits are divided by.
        fitted_on: The rows that it was fitted on, in words.
        before: With a temperature of one.
        after: With this one.
    """

    temperature: float
    fitted_on: str
    before: Reliability
    after: Reliability


def reliability(correct: ArrayLike, confidence: ArrayLike) -> Reliability:
    """Compare probabilities with outcomes.

    Args:
        correct: Whether each prediction is right [N] bool.
        confidence: The probability that it was given [N].
    """
    right, given = np.asarray(correct, np.float64), np.asarray(confidence, np.float64)
    bins = np.clip(np.ceil(given * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    rights, sums = (np.bincount(bins, values, NUM_BINS) for values in (right, given))

    def means(totals: np.ndarray) -> list[float | None]:
        return [round(float(t / n), 6) if n else None for t, n in zip(totals, counts, strict=True)]

    return Reliability(
        ece=float(np.abs(rights - sums).sum() / max(len(given), 1)),
        counts=counts.tolist(),
        confidence=means(sums),
        top1=means(rights),
    )

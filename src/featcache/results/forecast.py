"""How accurate a mode would be with more train images than there are: learning curves extrapolated.

The error with n images is taken to be a + b n^-c, a power law with an offset (Hestness et al.,
arXiv:1712.00409). Few sizes do not determine three numbers, so none is picked: every offset and
exponent of a grid counts by its likelihood, and the interval is that of their mixture. It covers
what single draws vary by, so it is about a new run scored on the same test images.
scripts/curve_coverage.py checks how often it holds where the answer is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.results.learning_curve import CurveMode, CurvePoint

LEVEL = 0.8
"""Coverage that the intervals aim at."""
MIN_SIZES = 3
"""As many as the curve has parameters."""
FACTORS = (2**0.5, 2.0, 2**1.5, 4.0)
"""Multiples of the largest measured size; beyond the last one, nothing is said."""
EXPONENTS = np.linspace(0.05, 1.5, 30)
OFFSETS = np.linspace(0.0, 1.0, 40, endpoint=False)
"""As shares of the least measured error."""
OFFSET_POWER = 2.0
"""A share counts by (1 - share) to this power, since few curves end close to the last error."""
WIDENING = 1.15
"""With it, intervals held about four times out of five or more often on every curve of
scripts/curve_coverage.py; without it, on one of three datasets a little less often."""
PRIOR_RUNS = 2.0
"""The variance of draws is shrunk toward a binomial share's, which weighs as this many draws."""
NUM_SAMPLES = 10_000

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The top-1 accuracy that a mode would have with `num_train` images, and its 80% interval."""

    mode: CurveMode
    num_train: int
    top1: float
    interval: tuple[float, float]


def forecasts(points: Sequence[CurvePoint]) -> list[Forecast]:
    """Extrapolate each mode up to four times its largest size.

    Args:
        points: From `curve_points`.

    Returns:
        By mode, then by size; nothing for a mode measured at fewer than three sizes.
    """
    modes: tuple[CurveMode, ...] = ("cached", "finetune")
    found = []
    for mode in modes:
        sides = [(p.num_train, p.scores(mode), p.num_test) for p in points]
        known = [(n, list(s.top1_by_seed.values()), m) for n, s, m in sides if s is not None]
        if len({n for n, _, _ in known}) < MIN_SIZES:
            continue
        targets = [round(known[-1][0] * factor) for factor in FACTORS]
        ends = extrapolate([n for n, _, _ in known], [t for _, t, _ in known], known[0][2], targets)
        found += [
            Forecast(mode=mode, num_train=n, top1=top1, interval=(low, high))
            for n, (top1, low, high) in zip(targets, ends, strict=True)
        ]
    return found


def extrapolate(
    num_train: Sequence[int],
    top1: Sequence[Sequence[float]],
    num_test: int,
    targets: Sequence[int],
) -> list[tuple[float, float, float]]:
    """Fit the curve to measured accuracies and read it at other sizes.

    Args:
        num_train: Train images of each size, [K].
        top1: For each size the accuracy of every draw.
        num_test: Test images that scored them.
        targets: Sizes to predict.

    Returns:
        For each target the median of the curves, and the ends of the interval of a new draw.
    """
    errors = [1.0 - np.asarray(draws, np.float64) for draws in top1]
    means = np.array([draws.mean() for draws in errors])
    binomial = _binomial(means, num_test)
    excess = _excess(errors, binomial)
    variances = excess * binomial / np.array([len(draws) for draws in errors])
    random = np.random.default_rng(0)
    offset, slope, exponent = _curves(np.array(num_train, np.float64), means, variances, random)
    deviation = random.standard_normal(NUM_SAMPLES)
    found = []
    for target in targets:
        curve = offset + slope * target**-exponent
        middle = np.median(curve)
        noise = np.sqrt(excess * _binomial(middle, num_test))
        ends = np.quantile(curve + noise * deviation, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
        ends = middle + WIDENING * (ends - middle)
        top, low, high = np.clip(1 - np.array([middle, *ends]), 0, 1)
        found.append((float(top), float(low), float(high)))
    return found


def _curves(
    sizes: Doubles, means: Doubles, variances: Doubles, random: np.random.Generator
) -> tuple[Doubles, Doubles, Doubles]:
    """Curves as likely as the measured errors make them.

    Args:
        sizes: Train images, [K].
        means: Mean errors, [K].
        variances: Of these means, [K].
        random: Draws the curves.

    Returns:
        Offset, slope and exponent of each, [NUM_SAMPLES].
    """
    # Axes: offset, exponent, size. For each offset and exponent, the best slope and its variance
    # are known in closed form.
    offsets = OFFSETS[:, None] * means.min()
    decay = sizes ** -EXPONENTS[:, None]
    precision = (decay**2 / variances).sum(axis=1)
    slope = ((decay / variances) * (means - offsets[..., None])).sum(axis=2) / precision
    slope = np.maximum(slope, 0.0)
    misfit = (means - offsets[..., None] - slope[..., None] * decay) ** 2 / variances
    log_weight = OFFSET_POWER * np.log1p(-OFFSETS)[:, None] - misfit.sum(axis=2) / 2
    weight = np.exp(log_weight - log_weight.max())
    drawn = random.choice(weight.size, NUM_SAMPLES, p=weight.ravel() / weight.sum())
    i, j = np.unravel_index(drawn, weight.shape)
    spread = random.standard_normal(NUM_SAMPLES) / np.sqrt(precision[j])
    return offsets[i, 0], slope[i, j] + spread, EXPONENTS[j]


def _binomial(share: Doubles | np.floating[Any], num_test: int) -> Doubles:
    """The variance of a share among test images; that of half an image at least."""
    floor = 0.5 / num_test
    return np.asarray(np.maximum(share * (1 - share), floor) / num_test)


def _excess(errors: Sequence[Doubles], binomial: Doubles) -> float:
    """How many times the binomial variance draws vary by."""
    squares = sum(
        float(((draws - draws.mean()) ** 2).sum() / variance)
        for draws, variance in zip(errors, binomial, strict=True)
    )
    return (squares + PRIOR_RUNS) / (sum(len(draws) - 1 for draws in errors) + PRIOR_RUNS)

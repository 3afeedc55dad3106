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
"""As shares of the least measured error. Small ones count more, as few curves end just there."""
PRIOR_RUNS = 2.0
"""The variance of draws is pulled to that of a binomial share, as strongly as so many would."""
NUM_SAMPLES = 10_000

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The top-1 accuracy that a mode would have with `num_train` images, and its 80 % interval."""

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
    sizes = np.array(num_train, np.float64)
    # Axes: offset, exponent, size. The best b of each curve and its variance are known in closed
    # form.
    offsets = OFFSETS[:, None] * means.min()
    decay = sizes ** -EXPONENTS[:, None]
    precision = (decay**2 / variances).sum(axis=1)
    slope = ((decay / variances) * (means - offsets[..., None])).sum(axis=2) / precision
    slope = np.maximum(slope, 0.0)
    misfit = (means - offsets[..., None] - slope[..., None] * decay) ** 2 / variances
    log_weight = np.log1p(-OFFSETS)[:, None] - misfit.sum(axis=2) / 2
    weight = np.exp(log_weight - log_weight.max()).ravel()
    random = np.random.default_rng(0)
    drawn = random.choice(weight.size, NUM_SAMPLES, p=weight / weight.sum())
    deviation = random.standard_normal((2, NUM_SAMPLES))
    exponent = np.broadcast_to(EXPONENTS, slope.shape).ravel()[drawn]
    start = np.broadcast_to(offsets, slope.shape).ravel()[drawn]
    sampled = slope.ravel()[drawn]
    sampled += deviation[0] / np.sqrt(np.broadcast_to(precision, slope.shape).ravel()[drawn])
    found = []
    for target in targets:
        curve = start + sampled * target**-exponent
        noise = np.sqrt(excess * _binomial(np.median(curve), num_test))
        ends = np.quantile(curve + noise * deviation[1], [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
        middle, low, high = np.clip(1 - np.array([np.median(curve), *ends]), 0, 1).tolist()
        found.append((middle, low, high))
    return found


def _binomial(share: Doubles | np.float64, num_test: int) -> Doubles:
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

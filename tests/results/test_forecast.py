"""Learning curves extrapolated: known curves, how the interval behaves, when nothing is said."""

from __future__ import annotations

import numpy as np
import pytest

from featcache.results.curve_advice import curve_advice
from featcache.results.forecast import FACTORS, extrapolate, forecasts
from featcache.results.learning_curve import CurvePoint, curve_points
from featcache.results.plots import curve_lines, x_range, y_range
from run_helpers import cell, pair

SIZES = [50, 100, 200, 500]


def power_law(sizes: list[int], offset: float = 0.1, scale: float = 2.0, c: float = 0.5) -> list:
    return [1 - offset - scale * n**-c for n in sizes]


def test_a_power_law_is_found_again() -> None:
    top1 = power_law([*SIZES, 1000, 2000])
    found = extrapolate(SIZES, [[each] * 3 for each in top1[:4]], 100_000, [1000, 2000])
    for (middle, low, high), right in zip(found, top1[4:], strict=True):
        assert low < right < high
        assert middle == pytest.approx(right, abs=0.01)
        assert high - low < 0.02


def test_the_interval_widens_with_distance_and_with_fewer_test_images() -> None:
    top1 = [[each] for each in power_law(SIZES)]
    widths = [high - low for _, low, high in extrapolate(SIZES, top1, 500, [600, 1000, 2000])]
    assert widths == sorted(widths)
    [(_, low, high)] = extrapolate(SIZES, top1, 5000, [2000])
    assert high - low < widths[-1]


def test_the_interval_holds_four_times_out_of_five() -> None:
    """Draws from a known curve, with the noise of 400 test images; a fifth of a known seed."""
    random = np.random.default_rng(0)
    share = power_law([*SIZES, 2000])
    hits = 0
    for _ in range(200):
        drawn = random.binomial(400, share, (2, 5)) / 400
        [(_, low, high)] = extrapolate(SIZES, [*drawn[:, :4].T], 400, [2000])
        hits += bool(low <= random.binomial(400, share[4]) / 400 <= high)
    assert 0.8 <= hits / 200 <= 0.97


def test_accuracies_stay_between_zero_and_one() -> None:
    for top1 in ([[1.0], [1.0], [1.0]], [[0.0], [0.0], [0.0]], [[0.9], [0.5], [0.3]]):
        [(middle, low, high)] = extrapolate([5, 20, 80], top1, 50, [320])
        assert 0 <= low <= middle <= high <= 1


def three_sizes() -> list[CurvePoint]:
    cells = [*pair("5", 50, 200, 100), *pair("20", 200, 300, 300), *pair("all", 2000, 350, 450)]
    return curve_points(cells)


def test_nothing_is_said_beyond_four_times_the_largest_size() -> None:
    found = forecasts(three_sizes())
    assert [f.num_train for f in found if f.mode == "cached"] == [2828, 4000, 5657, 8000]
    assert max(FACTORS) == 4
    assert [f.mode for f in found] == ["cached"] * 4 + ["finetune"] * 4
    assert found == forecasts(three_sizes())  # two calls agree


def test_nothing_is_said_of_a_mode_with_two_sizes() -> None:
    cells = [*pair("5", 50, 200, 100), cell("cached", "20", 200, 300), *pair("all", 2000, 350, 450)]
    assert {f.mode for f in forecasts(curve_points(cells))} == {"cached"}
    two = curve_points([*pair("5", 50, 200, 100), *pair("all", 2000, 350, 450)])
    assert forecasts(two) == []
    assert len(curve_advice(two)) == 3


def test_the_advice_names_the_interval() -> None:
    ends = {f.mode: f for f in forecasts(three_sizes())}
    head, tune = (ends[mode].interval for mode in ("cached", "finetune"))
    assert curve_advice(three_sizes())[-1] == (
        "If the curves go on as measured, four times the data gives the cached head about "
        f"{ends['cached'].top1:.2f} with 8,000 images (80% interval {head[0]:.2f} to "
        f"{head[1]:.2f}) and fine-tuning about {ends['finetune'].top1:.2f} with 8,000 images (80% "
        f"interval {tune[0]:.2f} to {tune[1]:.2f})."
    )


def test_the_chart_has_room_for_it() -> None:
    lines = curve_lines(three_sizes())
    assert [len(line.forecast) for line in lines] == [4, 4]
    assert x_range(lines)[1] > 8000
    assert y_range(lines)[1] > max(high for line in lines for *_, high in line.forecast)

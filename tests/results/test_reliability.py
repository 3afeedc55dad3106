"""The calibration error, by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from featcache.config.checks import record_from_json
from featcache.results.reliability import Reliability, reliability


def test_the_error_by_hand() -> None:
    found = reliability([True, False, True, True], [0.95, 0.95, 0.55, 0.5])
    # Two rows of 0.95, half of them right; one of 0.55 and one of 0.5, in bins of their own.
    assert found.ece == pytest.approx((2 * 0.45 + 0.45 + 0.5) / 4)
    assert found.counts == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2]
    assert found.confidence[-1] == pytest.approx(0.95)
    assert (found.top1[-1], found.top1[8], found.top1[0]) == (0.5, 1.0, None)


def test_true_probabilities_have_no_error() -> None:
    random = np.random.default_rng(0)
    given = random.uniform(0.2, 1, size=100_000)
    assert reliability(random.uniform(size=len(given)) < given, given).ece < 0.01
    assert reliability([], []).ece == 0.0


def test_ends_of_bins_belong_to_the_bin_below() -> None:
    assert reliability([True] * 3, [0, 1 / 15, 1]).counts == [2, *[0] * 13, 1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", [1] * 14, "counts has 14 bins, not 15"),
        ("ece", 1.5, "ece 1.5 is out of range"),
        ("top1", [2.0] * 15, "top1 2.0 is out of range"),
        ("top1", [None] * 15, "top1 lacks the value of a bin that has rows"),
    ],
)
def test_junk_is_refused(name: str, value: object, message: str) -> None:
    values = dataclasses.asdict(reliability([True], [0.95]))
    assert record_from_json(Reliability, json.loads(json.dumps(values)))
    with pytest.raises(ValueError, match=message):
        record_from_json(Reliability, {**values, name: value})

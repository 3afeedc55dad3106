"""Scores without the test images that train has too."""

from __future__ import annotations

import numpy as np
import pytest

from featcache.results.leaks import leak_lines, without_leaks


def test_leaked_images_are_left_out_of_the_score() -> None:
    found = without_leaks([0, 1, 2, 0, 1], [0, 1, 0, 0, 0], np.array([1, 1, 0, 0, 0], bool))
    assert found is not None
    assert found == {
        "num_leaked": 2,
        "num_test": 3,
        "test_top1": pytest.approx(1 / 3),
        "test_interval": pytest.approx((0.0615, 0.7923), abs=1e-4),
    }
    assert leak_lines({"without_leaks": found}) == [
        "without the 2 test images that are also in train: test accuracy 0.333 (95 % interval "
        "0.061 to 0.792) on 3 images"
    ]


def test_without_leaks_nothing_is_said() -> None:
    assert without_leaks([0, 1], [0, 1], np.zeros(2, bool)) is None
    assert leak_lines({"without_leaks": None}) == leak_lines({}) == []


def test_a_test_split_of_nothing_but_leaks_has_no_score() -> None:
    found = without_leaks([0, 1], [0, 1], np.ones(2, bool))
    assert leak_lines({"without_leaks": found}) == [
        "all 2 test images are also in train: the accuracy is no test"
    ]

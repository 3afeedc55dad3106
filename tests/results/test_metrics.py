"""The metrics, with numbers a person can check."""

import math

import numpy as np
import pytest

from featcache.results import metrics
from featcache.results.metrics import without_leaks
from featcache.results.tables import leak_lines


def test_top1_counts_right_rows():
    assert metrics.top1([0, 1, 2, 2], [0, 1, 2, 0]) == 0.75
    assert math.isnan(metrics.top1([], []))
    with pytest.raises(ValueError, match="do not match"):
        metrics.top1([0, 1], [0])


def test_topk_counts_rows_among_the_k_highest():
    scores = [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]
    assert metrics.topk([0, 1, 2], scores, k=1) == pytest.approx(1 / 3)
    assert metrics.topk([0, 1, 2], scores, k=2) == pytest.approx(2 / 3)
    assert metrics.topk([0, 1, 2], scores, k=3) == 1.0


def test_topk_gives_nothing_for_ties():
    assert metrics.topk([0, 1], np.zeros((2, 4)), k=2) == 0.0


def test_confusion_has_the_true_class_by_row():
    table = metrics.confusion([0, 0, 1], [0, 1, 1], 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert table.dtype == np.int64
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 2"):
        metrics.confusion([3], [0], 3)
    with pytest.raises(ValueError, match="predictions must lie"):
        metrics.confusion([0], [-1], 3)


def test_balanced_weighs_classes_alike_and_skips_empty_ones():
    labels, predicted = [0, 0, 0, 1], [0, 0, 0, 0]
    assert metrics.top1(labels, predicted) == 0.75
    assert metrics.balanced(labels, predicted, 3) == 0.5
    recalls = metrics.per_class(labels, predicted, 3)
    assert recalls[:2] == [1.0, 0.0]
    assert math.isnan(recalls[2])


def test_the_baseline_and_imbalance():
    assert metrics.majority([2, 2, 0, 2]) == 0.75
    assert math.isnan(metrics.majority([]))
    assert metrics.imbalanced([0] * 6 + [3] * 3)  # 6 rows against 4.5 on average
    assert not metrics.imbalanced([0] * 5 + [3] * 4)
    assert not metrics.imbalanced([])


def test_recalls_of_many_classes_need_no_table_of_pairs():
    recalls = metrics.per_class([0, 10**7], [0, 1], 10**7 + 1)
    assert (recalls[0], recalls[-1]) == (1.0, 0.0)


def test_wilson_interval_known_values():
    # 8 of 10 at 95 %: the textbook interval is 0.490 to 0.943.
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.wilson_interval(0, 10)[0] == 0.0
    assert metrics.wilson_interval(10, 10)[1] == 1.0
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="impossible"):
        metrics.wilson_interval(11, 10)


def test_wilson_interval_narrows_with_rows_and_level():
    wide, narrow = metrics.wilson_interval(50, 100), metrics.wilson_interval(500, 1000)
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    low = metrics.wilson_interval(50, 100, level=0.5)
    assert low[1] - low[0] < wide[1] - wide[0]


def test_mcnemar_exact():
    # 1 row against 9: two-sided binomial p = 2 * (1 + 10) / 1024.
    a = np.array([True] + [False] * 9 + [True] * 5)
    b = np.array([False] + [True] * 9 + [True] * 5)
    assert metrics.mcnemar(a, b) == pytest.approx(22 / 1024)
    assert metrics.mcnemar(a, a) == 1.0
    assert metrics.mcnemar([True, False], [False, True]) == 1.0


def test_mcnemar_approximation_joins_the_exact_test():
    def p_value(only_a, only_b):
        a = np.r_[np.ones(only_a, bool), np.zeros(only_b, bool)]
        return metrics.mcnemar(a, ~a)

    assert p_value(471, 531) == pytest.approx(p_value(470, 530), rel=0.02)
    assert p_value(400, 700) < 1e-15


def test_how_many_rows_would_decide() -> None:
    # By hand: (1.95996 √0.28 + 0.84162 √(0.28 - 0.04²))² / 0.04² = 1371.2
    assert metrics.samples_to_decide(60, 80, 500) == 1372
    assert metrics.samples_to_decide(80, 60, 500) == metrics.samples_to_decide(60, 80, 500)
    assert metrics.samples_to_decide(60, 80, 500, significance=0.01) > metrics.samples_to_decide(
        60, 80, 500
    )
    assert metrics.samples_to_decide(5, 5, 500) is None
    assert metrics.samples_to_decide(0, 0, 500) is None


def test_that_many_rows_do_decide_four_times_out_of_five() -> None:
    num = metrics.samples_to_decide(60, 80, 500)
    assert num is not None
    random = np.random.default_rng(0)
    decided = 0
    for _ in range(300):
        kind = random.choice(3, num, p=[0.12, 0.16, 0.72])
        decided += metrics.mcnemar(kind == 0, kind == 1) < 0.05
    assert 0.74 <= decided / 300 <= 0.86


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
        "without the 2 test images that are also in train: test accuracy 0.333 (95% interval "
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

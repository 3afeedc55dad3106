"""Learning curves: pairing, tests that do not count an image twice, crossings, the sentences."""

from __future__ import annotations

import numpy as np
import pytest

from curve_helpers import NUM_TEST, cell, pair
from featcache.curve import (
    crossing,
    curve_advice,
    curve_cells,
    curve_header,
    curve_points,
    curve_text,
    points_from_json,
    points_json,
)
from featcache.curve.points import holm
from featcache.errors import UserError
from featcache.metrics import mcnemar


def test_points_are_ordered_and_average_over_the_seeds_that_both_modes_have() -> None:
    cells = [*pair("all", 2000, 300, 400), *pair("5", 50, 200, 100), *pair("5", 50, 250, 150, 1)]
    cells.append(cell("cached", "5", 50, 500, seed=2))  # its fine-tune was left out
    few, every = curve_points(cells)
    assert (few.size, few.num_train, every.size) == ("5", 50, "all")
    assert few.cached.top1 == pytest.approx(225 / NUM_TEST)
    assert few.cached.top1_by_seed == {0: 0.4, 1: 0.5}
    assert few.difference == pytest.approx(-0.2)
    assert few.cached.interval[0] < 0.45 < few.cached.interval[1]
    assert (few.verdict, every.verdict) == ("cached", "finetune")


def test_one_seed_is_mcnemar_and_more_seeds_do_not_count_an_image_twice() -> None:
    # 12 images only the fine-tune gets right, 3 only the head.
    head = cell("cached", "all", 10, 103, first_right=0)
    tune = cell("finetune", "all", 10, 112, first_right=3)
    alone = curve_points([head, tune])[0].p_value
    assert alone == pytest.approx(mcnemar(tune.correct, head.correct))
    again = [
        cell("cached", "all", 10, 103, seed=1),
        cell("finetune", "all", 10, 112, seed=1, first_right=3),
    ]
    assert curve_points([head, tune, *again])[0].p_value == pytest.approx(alone)


def test_seeds_that_disagree_leave_it_undecided_however_small_p_is() -> None:
    cells = [*pair("all", 100, 100, 400, 0), *pair("all", 100, 150, 140, 1)]
    point = curve_points(cells)[0]
    assert point.p_value < 0.001
    assert point.verdict == "undecided"


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_costs() -> None:
    point = curve_points(pair("all", 2000, 300, 400))[0]
    assert point.seconds_per_point == pytest.approx(114 / 20)  # 114 s more for 20 points
    assert point.pays_after_trials == 1  # 5.5 s once against 119.5 s saved each time
    dear = [cell("cached", "all", 9, 300, cost=600.0, trial=0.5), pair("all", 9, 300, 400)[1]]
    assert curve_points(dear)[0].pays_after_trials == 6  # 599.5 / 119.5, rounded up
    never = [cell("cached", "all", 9, 300, cost=200.0, trial=150.0), dear[1]]
    assert curve_points(never)[0].pays_after_trials is None
    assert curve_points(never)[0].seconds_per_point is None  # the fine-tune costs less


CLEAR = [*pair("5", 50, 200, 100), *pair("20", 200, 300, 300), *pair("all", 2000, 350, 450)]
REVERSED = [*pair("5", 50, 100, 200), *pair("all", 2000, 450, 350)]
HEAD_WINS = [*pair("5", 50, 200, 100), *pair("all", 2000, 450, 350)]
UNDECIDED = [*pair("5", 50, 200, 203), *pair("all", 2000, 400, 398)]
LEVEL = [*pair("5", 50, 200, 100), *pair("all", 2000, 400, 402)]
REPEATED = [*pair("5", 50, 200, 100), *pair("20", 200, 100, 300), *pair("all", 999, 450, 350)]


def test_crossing_kinds() -> None:
    found = {n: crossing(curve_points(c)) for n, c in
             {"clear": CLEAR, "reversed": REVERSED, "head": HEAD_WINS, "open": UNDECIDED,
              "level": LEVEL, "repeated": REPEATED}.items()}  # fmt: skip
    assert {name: one.kind for name, one in found.items()} == {
        "clear": "crosses", "reversed": "crosses", "head": "none", "open": "undecided",
        "level": "level", "repeated": "repeated",
    }  # fmt: skip
    assert (found["clear"].before, found["clear"].after) == ("5", "all")
    assert found["clear"].num_train == 200  # level there
    assert found["reversed"].num_train == 316  # halfway between 50 and 2,000 on the log axis
    assert found["clear"].leader == "finetune"


def test_sentences_where_the_curves_cross() -> None:
    assert curve_advice(curve_points(CLEAR)) == [
        "More accurate: the cached head with 5 per class, fine-tuning with all 2,000 images, "
        "beyond chance on the same 500 test images (p < 0.001, corrected for 3 sizes); with 20 per "
        "class the figures do not decide.",
        "The curves cross between 5 per class and all 2,000 images, near 200 images in all: with "
        "fewer, pick the cached head; with more, pick fine-tuning when 20.0 points are worth 114 s "
        "more.",
        "With all 2,000 images, a first cached head takes 6.0 s (5.5 s of it extraction), every "
        "further one 0.500 s, a fine-tune 120 s: the cache has paid for itself with the first "
        "head, and each point that fine-tuning gains costs 5.7 s.",
    ]


def test_sentences_where_the_order_is_reversed() -> None:
    said = curve_advice(curve_points(REVERSED))
    assert said[0].startswith(
        "More accurate: the cached head with all 2,000 images, fine-tuning with 5 per class, "
    )
    assert said[1].endswith(
        "with fewer, pick fine-tuning; with more, pick the cached head: 20.0 points better and "
        "114 s less."
    )
    assert "each point" not in said[2]


def test_sentences_where_one_mode_leads_throughout() -> None:
    said = curve_advice(curve_points(HEAD_WINS))
    assert said[0].startswith(
        "More accurate: the cached head with 5 per class and all 2,000 images"
    )
    assert said[1] == (
        "The curves do not cross within the data: the cached head stays ahead of fine-tuning up to "
        "all 2,000 images, so pick the cached head: 20.0 points better and 114 s less."
    )


def test_sentences_where_nothing_is_decided() -> None:
    said = curve_advice(curve_points(UNDECIDED))
    assert said[0] == (
        "Accuracy does not decide: with 5 per class and all 2,000 images, no difference is beyond "
        "chance on the same 500 test images."
    )
    assert said[1] == (
        "Whether the curves cross, these figures do not say: pick the cached head, which costs "
        "114 s less; more test images or seeds could decide."
    )


def test_sentences_where_a_lead_is_lost_or_changes_twice() -> None:
    assert curve_advice(curve_points(LEVEL))[1] == (
        "The curves do not cross beyond chance within the data, but the cached head loses its lead "
        "with all 2,000 images: pick the cached head, which costs 114 s less; more test images or "
        "seeds could decide."
    )
    ahead = [*pair("5", 50, 100, 200), *pair("all", 2000, 400, 402)]
    assert curve_advice(curve_points(ahead))[1] == (
        "The curves do not cross within the data: fine-tuning is ahead with all 2,000 images too, "
        "by 0.4 points, but that may be chance: pick the cached head, which costs 114 s less; more "
        "test images or seeds could decide."
    )
    assert curve_advice(curve_points(REPEATED))[1].startswith("The lead changes more than once")


def test_no_sentences_without_a_size_in_both_modes() -> None:
    points = curve_points([cell("cached", "5", 50, 100)])
    assert curve_advice(points) == []
    assert points[0].verdict == "unmeasured"
    assert curve_cells(points)[0][2:6] == ("–", "–", "–", "not measured")
    assert curve_cells(curve_points(pair("5", 50, 200, 200)))[0][3] == "0.0"


def test_table_and_json_hold_the_same() -> None:
    points = curve_points(CLEAR)
    cells = curve_cells(points)
    assert cells[2] == (
        "all (2,000)", "0.700 [0.658, 0.739]", "0.900 [0.871, 0.923]", "+20.0", "< 0.001",
        "fine-tuning", "6.0 s", "120 s", "5.7 s", "1 head",
    )  # fmt: skip
    assert cells[0][3] == "−20.0"
    assert len(cells[0]) == len(curve_header())
    assert len(curve_text(points).splitlines()) == 2 + 3
    assert points_from_json(points_json(points)) == points


@pytest.mark.parametrize(
    ("field", "value"),
    [("verdict", "best"), ("cached", {"top1": 1}), ("p_value", float("nan")), ("num_train", "x")],
)
def test_damaged_points_are_refused(field: str, value: object) -> None:
    values = points_json(curve_points(CLEAR))
    values[1][field] = value
    with pytest.raises(UserError, match="not the points of a learning curve"):
        points_from_json(values)


def test_correct_is_a_bool_per_image() -> None:
    assert cell("cached", "5", 5, 3).correct.dtype == np.bool_

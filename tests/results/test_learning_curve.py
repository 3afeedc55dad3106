"""Learning curves: pairing, tests that do not count an image twice, crossings, the sentences."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from featcache.errors import UserError
from featcache.results.curve_advice import crossing, curve_advice
from featcache.results.curve_json import curve_from_json, curve_to_json
from featcache.results.learning_curve import CurveRun, curve_points, holm
from featcache.results.metrics import mcnemar
from featcache.results.tables import CURVE_HEADER, curve_cells, curve_header, curve_text
from run_helpers import NUM_TEST, cell, pair


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
    assert curve_advice(curve_points(CLEAR))[:3] == [
        "With all 2,000 images, fine-tuning is more accurate: 0.900 against 0.700 for the cached "
        "head on the same 500 test images, a significant difference (p < 0.001, corrected for 3 "
        "sizes); with fewer, the cached head leads significantly (5 per class) and there is no "
        "clear winner (20 per class).",
        "The curves cross between 5 per class and all 2,000 images, at about 200 images in total: "
        "with fewer, pick the cached head; with more, pick fine-tuning if 20.0 percentage points "
        "are worth 114 s more.",
        "With all 2,000 images, a first cached head takes 6.0 s (5.5 s of it extraction), every "
        "further experiment 0.500 s, a fine-tune 2.0 minutes each time: the cache pays for itself "
        "with the first head, and each percentage point that fine-tuning gains costs 5.7 s.",
    ]


def test_sentences_where_the_order_is_reversed() -> None:
    said = curve_advice(curve_points(REVERSED))
    assert said[0] == (
        "With all 2,000 images, the cached head is more accurate: 0.900 against 0.700 for "
        "fine-tuning on the same 500 test images, a significant difference (p < 0.001, corrected "
        "for 2 sizes);"
        " with fewer, fine-tuning leads significantly (5 per class)."
    )
    assert said[1].endswith(
        "with fewer, pick fine-tuning; with more, pick the cached head: 20.0 percentage points "
        "better and 114 s less."
    )
    assert "each point" not in said[2]


def test_sentences_where_one_mode_leads_throughout() -> None:
    said = curve_advice(curve_points(HEAD_WINS))
    assert said[0].startswith("With all 2,000 images, the cached head is more accurate")
    assert said[0].endswith("; with fewer, the cached head leads significantly (5 per class).")
    assert said[1] == (
        "The curves do not cross within the data: the cached head stays ahead of fine-tuning up to "
        "all 2,000 images, so pick the cached head: 20.0 percentage points better and 114 s less."
    )


def test_sentences_where_nothing_is_decided() -> None:
    said = curve_advice(curve_points(UNDECIDED))
    assert said[0] == (
        "With all 2,000 images, there is no clear winner on accuracy: the cached head has 0.800 "
        "and fine-tuning 0.796 on the same 500 test images, which may be chance (p = 0.5, "
        "corrected for 2 sizes); with fewer, there is no clear winner (5 per class)."
    )
    assert said[1] == (
        "These results do not show whether the curves cross: pick the cached head, which costs "
        "114 s less; about 1,900 more test images would settle it with a probability of 80%, if "
        "the modes differ as much as here."
    )


def test_sentences_where_a_lead_is_lost_or_changes_twice() -> None:
    assert curve_advice(curve_points(LEVEL))[1] == (
        "The curves do not cross significantly within the data, but the cached head loses its lead "
        "with all 2,000 images: pick the cached head, which costs 114 s less; about 1,900 more "
        "test images would settle it with a probability of 80%, if the modes differ as much as "
        "here."
    )
    ahead = [*pair("5", 50, 100, 200), *pair("all", 2000, 400, 402)]
    assert curve_advice(curve_points(ahead))[1] == (
        "The curves do not cross within the data: fine-tuning is ahead with all 2,000 images too, "
        "by 0.4 percentage points, but that may be chance: pick the cached head, which costs 114 s "
        "less; about 1,900 more test images would settle it with a probability of 80%, if the "
        "modes differ as much as here."
    )
    assert curve_advice(curve_points(REPEATED))[1].startswith("The lead changes more than once")


def test_the_first_sentence_says_when_the_largest_size_was_not_measured() -> None:
    cells = [*pair("5", 50, 200, 100), cell("cached", "all", 2000, 450)]
    said = curve_advice(curve_points(cells))
    assert said[0] == (
        "Fine-tuning with all 2,000 images was not measured. With 5 per class, the cached head is "
        "more accurate: 0.400 against 0.200 for fine-tuning on the same 500 test images, a "
        "significant difference (p < 0.001)."
    )
    assert said[1] == (
        "One size does not show whether the curves cross: pick the cached head: 20.0 percentage "
        "points better and 114 s less."
    )


def test_a_tie_and_draws_that_disagree() -> None:
    assert (
        "both modes have 0.600 on the same"
        in curve_advice(curve_points(pair("all", 9, 300, 300)))[0]
    )
    cells = [*pair("all", 100, 100, 400, 0), *pair("all", 100, 150, 140, 1)]
    assert curve_advice(curve_points(cells))[0] == (
        "With all 100 images, there is no clear winner on accuracy: fine-tuning has 0.540 and the "
        "cached head 0.250 on the same 500 test images, but not with every seed (p < 0.001)."
    )


LABELS = np.repeat([0, 1, 2], [335, 100, 65])
"""Always answering 0 is right for 0.670."""


def skewed(mode: str, size: str, num_train: int, *rights: int) -> CurveRun:
    """So many images of each class right."""
    predicted = (LABELS + 1) % 3
    for label, num in enumerate(rights):
        rows = np.flatnonzero(label == LABELS)[:num]
        predicted[rows] = label
    cost = 6.0 if mode == "cached" else 120.0
    return CurveRun(
        mode=mode, size=size, num_train=num_train, seed=0, labels=LABELS, predicted=predicted,
        cost_seconds=cost, trial_seconds=cost,
    )  # fmt: skip


def test_more_accurate_is_never_said_of_what_does_not_beat_the_baseline() -> None:
    few = [skewed("cached", "5", 15, 100, 80, 50), skewed("finetune", "5", 15, 200, 80, 50)]
    points = curve_points(few)
    assert points[0].p_value < 0.001
    assert (points[0].verdict, points[0].baseline_top1) == ("undecided", 0.67)
    said = curve_advice(points)
    assert said[0] == (
        "With 5 per class, neither mode beats always answering the most frequent class (0.670): "
        "fine-tuning has 0.660 and the cached head 0.460 on the same 500 test images (balanced "
        "accuracy 0.722 and 0.623)."
    )
    assert "pick neither yet" in said[1]
    cells = curve_cells(points)
    assert cells[0][1].endswith(", balanced 0.623")
    assert cells[0][5] == "neither"
    assert cells[-1][:3] == ("most frequent class", "0.670", "0.670")
    every = [skewed("cached", "all", 900, 300, 80, 50), skewed("finetune", "all", 900, 330, 95, 60)]
    assert curve_advice(curve_points([*few, *every]))[0].endswith(
        "; with fewer, neither beats always answering the most frequent class (5 per class)."
    )
    assert (
        "a significant difference (p < 0.001, corrected for 2 sizes) (balanced accuracy"
        in (curve_advice(curve_points([*few, *every]))[0])
    )


def test_balanced_accuracy_that_says_the_opposite_leaves_it_undecided() -> None:
    cells = [skewed("cached", "all", 900, 270, 90, 60), skewed("finetune", "all", 900, 335, 80, 50)]
    points = curve_points(cells)
    assert points[0].p_value < 0.001
    assert (points[0].verdict, points[0].useful) == ("undecided", True)
    assert curve_advice(points)[0] == (
        "With all 900 images, there is no clear winner on accuracy: fine-tuning has 0.930 and the "
        "cached head 0.840 on the same 500 test images (p < 0.001), but the cached head leads by "
        "balanced accuracy, where rare classes count as much as common ones (balanced accuracy "
        "0.856 and 0.876; always answering the most frequent class: 0.670)."
    )


def test_points_of_an_earlier_version_have_no_baseline() -> None:
    values = curve_to_json(curve_points(CLEAR))
    for value in values:
        del value["baseline_top1"], value["imbalanced"]
        del value["cached"]["balanced_top1"], value["finetune"]["balanced_top1"]
    points = curve_from_json(values)
    assert [p.verdict for p in points] == [p.verdict for p in curve_points(CLEAR)]
    assert len(curve_cells(points)) == 3
    assert curve_advice(points) == curve_advice(curve_points(CLEAR))


def test_no_sentences_without_a_size_in_both_modes() -> None:
    points = curve_points([cell("cached", "5", 50, 100)])
    assert curve_advice(points) == []
    assert points[0].verdict == "unmeasured"
    assert curve_cells(points)[0][2:6] == ("–", "–", "–", "not measured")
    assert curve_cells(curve_points(pair("5", 50, 200, 200)))[0][3] == "0.0"


def test_money_is_named_if_the_price_is_known() -> None:
    said = curve_advice(curve_points(HEAD_WINS), price_per_hour=30)
    assert said[2].endswith(
        "the cache pays for itself with the first head. At 30 an hour that is 0.05 for the first "
        "head, 0.0042 for every further one, and 1 for each fine-tune."
    )


def chosen(seed: int, features: str, **held_out: float) -> CurveRun:
    """A cached head that chose between all stages of two networks."""
    run = cell("cached", "all", 2000, 300, seed=seed, cost=6.0)
    names = {"plain": "all stages", "adapted": "all stages, adapted BatchNorm"}
    held = {names[name]: top1 for name, top1 in held_out.items()}
    return dataclasses.replace(run, features=names[features], held_out=held)


def test_what_the_head_learned_from_and_why_is_said() -> None:
    tunes = [cell("finetune", "all", 2000, 400, seed=seed) for seed in range(3)]
    heads = [
        chosen(0, "adapted", plain=0.60, adapted=0.70),
        chosen(1, "adapted", plain=0.62, adapted=0.66),
        chosen(2, "plain", plain=0.64, adapted=0.62),
    ]
    points = curve_points([*heads, *tunes])
    assert points[0].cached.features == {"all stages, adapted BatchNorm": 2, "all stages": 1}
    assert curve_advice(points)[3] == (
        "With all 2,000 images, the cached head uses all stages, adapted BatchNorm with 2 of 3 "
        "seeds, chosen by accuracy on held-out train images: 0.660, against all stages 0.620."
    )
    assert curve_cells(points)[0][-1] == "all stages, adapted BatchNorm 0.660; all stages 0.620"
    assert curve_header(points)[-1] == "head's features (held-out accuracy)"
    assert len(curve_cells(points)[1]) == len(curve_header(points))
    assert max(map(len, curve_text(points).splitlines())) <= 100
    assert curve_from_json(json.loads(json.dumps(curve_to_json(points)))) == points


def shifted(runs: list[CurveRun], head: int, tune: int) -> list[CurveRun]:
    """The same runs, so many of 200 shifted images right."""
    right = {"cached": np.arange(200) < head, "finetune": np.arange(200) >= 200 - tune}
    return [dataclasses.replace(run, shifted_correct=right[run.mode]) for run in runs]


def test_the_second_test_set_is_shown_beside_the_first() -> None:
    points = curve_points(shifted(pair("all", 2000, 350, 450), 130, 80))
    assert points[0].verdict == "finetune"
    assert curve_advice(points)[3] == (
        "On the second, shifted test set (200 images), the cached head has 0.650 (−5.0 percentage "
        "points) and fine-tuning 0.400 (−50.0): the cached head is significantly more accurate "
        "there (p < 0.001), unlike on the first test set."
    )
    level = curve_points(shifted(pair("all", 2000, 350, 450), 100, 100))
    assert curve_advice(level)[3].endswith("(−40.0): there is no clear winner there (p = 1).")
    assert curve_header(points)[-2:] == ("cached head, shifted", "fine-tune, shifted")
    assert curve_cells(points)[0][-2:] == ("0.650", "0.400")
    assert curve_from_json(json.loads(json.dumps(curve_to_json(points)))) == points
    assert "shifted" not in " ".join(curve_header(curve_points(CLEAR)))


def test_more_test_images_are_advised_for_chance_alone() -> None:
    cells = [*pair("all", 100, 100, 400, 0), *pair("all", 100, 150, 140, 1)]
    assert curve_advice(curve_points(cells))[1].endswith(
        "more test images or seeds could settle it."
    )
    assert curve_advice(curve_points(pair("all", 9, 300, 300)))[1].endswith(
        "more test images or seeds could settle it."
    )


def test_table_and_json_hold_the_same() -> None:
    points = curve_points(CLEAR)
    cells = curve_cells(points)
    assert cells[2] == (
        "all (2,000)", "0.700 [0.658, 0.739]", "0.900 [0.871, 0.923]", "+20.0", "< 0.001",
        "fine-tuning", "6.0 s", "120 s", "5.7 s", "1 head",
    )  # fmt: skip
    assert cells[0][3] == "−20.0"
    assert len(cells[0]) == len(CURVE_HEADER)
    assert cells[-1] == ("most frequent class", "0.100", "0.100", *"–" * 7)
    assert curve_from_json(curve_to_json(points)) == points


def test_the_table_fits_a_terminal() -> None:
    points = curve_points(CLEAR)
    lines = curve_text(points).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines.count("") == 1
    first, second = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert len(first) == len(second) == 2 + 3 + 1
    assert (first[0] + second[0]).split("  ")[0] == "train images"
    assert all(name in first[0] + second[0] for name in CURVE_HEADER)
    assert first[4].split("  ")[0] == second[4].split("  ")[0] == "all (2,000)"


@pytest.mark.parametrize(
    ("field", "value"),
    [("verdict", "best"), ("cached", {"top1": 1}), ("p_value", float("nan")), ("num_train", "x")],
)
def test_damaged_points_are_refused(field: str, value: object) -> None:
    values = curve_to_json(curve_points(CLEAR))
    values[1][field] = value
    with pytest.raises(UserError, match="not the points of a learning curve"):
        curve_from_json(values)


def test_correct_is_a_bool_per_image() -> None:
    assert cell("cached", "5", 5, 3).correct.dtype == np.bool_

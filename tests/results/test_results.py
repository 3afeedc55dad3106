"""Run files, tables, advice and plots, on figures that a person can check."""

import dataclasses
import json
import re

import pytest

from featcache.errors import StorageError, UserError
from featcache.results import Predictions, Row, RunReport, benchmark_rows
from featcache.results.advice import advice, best_of, speedups
from featcache.results.plots import (
    as_svg,
    draw,
    lines_of,
    plot_accuracy_against_seconds,
    seconds_tick,
)
from featcache.results.runs import break_even
from featcache.results.tables import (
    markdown_table,
    seconds_text,
    table_cells,
    text_table,
    times_text,
)

LOOP, CACHED = "head only (network in the loop)", "head only (cached features)"
TUNE, SLOW_TUNE = "full fine-tune (lr 1e-3)", "full fine-tune (lr 1e-4)"


def make_row(mode, approach, top1, total, *, extract=0.0, points=None):
    """Three epochs; everything but extraction is spent in equal epochs."""
    epoch = (total - extract) / 3
    return Row(
        mode=mode,
        approach=approach,
        trainable_params=11_181_642 if approach == "finetune" else 5_130,
        test_top1=top1,
        test_interval=(top1 - 0.04, top1 + 0.04),
        num_test=500,
        seconds_total=total,
        seconds_per_epoch=epoch,
        images_per_s=2000 / epoch,
        extract_seconds=extract,
        num_epochs=3,
        points=points or tuple((extract + epoch * k, top1 - 0.1 + k / 30) for k in (1, 2, 3)),
    )


def four_rows(head=0.64, tune=0.59, slow_tune=0.664, cached_total=6.3, tune_total=48.0):
    return [
        make_row(LOOP, "loop", head, 18.0),
        make_row(CACHED, "cached", head, cached_total, extract=6.0),
        make_row(TUNE, "finetune", tune, tune_total),
        make_row(SLOW_TUNE, "finetune", slow_tune, tune_total),
    ]


def make_report(**changes):
    values = {
        "command": "finetune",
        "trainable_params": 20,
        "test_top1": 0.75,
        "test_interval": (0.3, 0.95),
        "seconds_total": 10.0,
        "epochs": [
            {"epoch": 1, "train_loss": 2.0, "test_top1": 0.5, "seconds": 3.0, "eval_seconds": 1.0},
            {"epoch": 2, "train_loss": 1.0, "test_top1": 0.75, "seconds": 3.0, "eval_seconds": 1.0},
        ],
        "scored_on": "test",
        "chosen_on": "nothing",
        "config": {"lr": 0.001},
        "provenance": {},
        "environment": {},
        "more": {"num_train": 30, "num_test": 4},
        "class_names": ["cat", "dog"],
        "test": Predictions(
            ids=["a", "b", "c", "d"],
            labels=[0, 0, 1, 1],
            predicted=[0, 1, 1, 1],
            confidence=[0.9, 0.6, 0.8, 0.7],
        ),
    }
    return RunReport(**{**values, **changes})


class TestRunReport:
    def test_survives_its_file(self, tmp_path):
        report = make_report()
        report.save(tmp_path / "run.json")
        assert RunReport.load(tmp_path / "run.json") == report

    def test_stdout_json_has_no_predictions(self):
        values = json.loads(json.dumps(make_report().to_json()))
        assert "test" not in values
        assert "class_names" not in values
        assert values["num_train"] == 30
        assert values["test_interval"] == [0.3, 0.95]

    def test_predictions_know_which_are_right(self):
        assert make_report().test.correct() == [True, False, True, True]

    def test_columns_of_different_lengths_are_refused(self):
        with pytest.raises(UserError, match="different lengths"):
            Predictions(ids=["a"], labels=[], predicted=[0], confidence=[1.0])

    @pytest.mark.parametrize("missing", ["test_top1", "epochs", "test_interval"])
    def test_a_missing_field_is_named(self, missing):
        values = make_report().to_json()
        del values[missing]
        with pytest.raises(UserError, match=missing):
            RunReport.from_dict(values)

    @pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, "null", "{}"])
    def test_other_files_are_refused(self, tmp_path, text):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(UserError):
            RunReport.load(path)

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.json: No such file"):
            RunReport.load(tmp_path / "none.json")

    def test_infinite_scores_are_refused(self):
        with pytest.raises(UserError, match="finite"):
            RunReport.from_dict({**make_report().to_json(), "test_top1": float("nan")})


class TestRows:
    def test_a_row_adds_extraction_and_keeps_the_training_pass_apart(self):
        [row] = benchmark_rows([(CACHED, "cached", make_report(), 5.0)])
        assert row.seconds_total == 15.0
        assert row.seconds_per_epoch == 3.0  # the training pass, without its second of scoring
        assert row.images_per_s == 10.0  # 30 images in 3 s
        assert row.later_seconds == 10.0

    def test_points_count_set_up_first_then_each_epoch_with_its_scoring(self):
        [row] = benchmark_rows([(CACHED, "cached", make_report(), 5.0)])
        # 10 s in all, 8 of them in epochs: 2 s of set-up follow 5 s of extraction.
        assert row.points == ((5 + 2 + 4, 0.5), (5 + 2 + 8, 0.75))

    def test_a_run_without_epochs_has_one_point(self):
        [row] = benchmark_rows([(CACHED, "cached", make_report(epochs=[]), 5.0)])
        assert row.points == ((15.0, 0.75),)

    def test_a_row_knows_the_baseline(self):
        # Three of four are cats; the dog and one cat are found.
        test = Predictions(
            ids=list("abcd"), labels=[0, 0, 0, 1], predicted=[0, 1, 1, 1], confidence=[0.5] * 4
        )
        [row] = benchmark_rows([(CACHED, "cached", make_report(test=test), 0.0)])
        assert (row.baseline_top1, row.imbalanced) == (0.75, True)
        assert row.balanced_top1 == pytest.approx((1 / 3 + 1) / 2)
        [row] = benchmark_rows([(CACHED, "cached", make_report(test=None), 0.0)])
        assert (row.baseline_top1, row.balanced_top1, row.imbalanced) == (None, None, False)


class TestTables:
    def test_text_table(self):
        lines = text_table(four_rows()).splitlines()
        assert lines[0].split("  ")[0] == "mode"
        assert len({len(line) for line in lines[1:]}) == 1
        assert "0.640 [0.60, 0.68]" in lines[3]
        # Per epoch, extraction, total, against 48 s of the slowest.
        assert " ".join(lines[3].split()[-7:]) == "0.100 s 6.0 s 6.3 s 7.6×"
        assert " ".join(lines[2].split()[-6:]) == "6.0 s none 18.0 s 2.7×"
        assert "11,181,642" in lines[4]
        assert lines[4].endswith("1.0×")

    def test_markdown_table_has_equal_columns(self):
        lines = markdown_table(four_rows()).splitlines()
        assert {line.count("|") for line in lines} == {8}
        assert lines[3].startswith(f"| {CACHED} | 5,130 | 0.640 [0.60, 0.68] | 0.100 s | 6.0 s |")

    def test_the_baseline_is_a_row_and_balanced_accuracy_stands_beside_top1(self):
        rows = [
            dataclasses.replace(row, baseline_top1=0.669, balanced_top1=0.5, imbalanced=True)
            for row in four_rows()
        ]
        lines = text_table(rows).splitlines()
        assert len(lines) == 2 + 4 + 1
        assert "0.640 [0.60, 0.68], balanced 0.500" in lines[3]
        assert lines[-1].split("  ")[0] == "always answering the most frequent class"
        assert lines[-1].split()[-6:] == ["0", "0.669", *"––––"]
        assert "balanced" not in text_table([dataclasses.replace(rows[0], imbalanced=False)])

    def test_test_splits_of_different_size_have_baselines_of_their_own(self):
        one, two = (
            dataclasses.replace(row, num_test=num, baseline_top1=top1)
            for row, num, top1 in zip(four_rows(), (500, 1000), (0.1, 0.2), strict=False)
        )
        assert [line.split("  ")[0] for line in text_table([one, two]).splitlines()[-2:]] == [
            "always answering the most frequent class of 500 test images",
            "always answering the most frequent class of 1,000 test images",
        ]

    def test_a_bar_in_a_name_does_not_break_markdown(self):
        row = dataclasses.replace(four_rows()[0], mode="a|b")
        assert "| a\\|b |" in markdown_table([row])

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.0004, "0.4 ms"),
            (0.0421, "0.042 s"),
            (6.15, "6.2 s"),
            (305.2, "305 s"),
            (7560, "2.1 h"),
        ],
    )
    def test_seconds_for_people(self, seconds, text):
        assert seconds_text(seconds) == text

    @pytest.mark.parametrize(
        ("ratio", "text"), [(0.836, "0.84×"), (3.14, "3.1×"), (12.6, "13×"), (1234, "1,200×")]
    )
    def test_ratios_for_people(self, ratio, text):
        assert times_text(ratio) == text

    def test_speedups(self):
        ratios = speedups(four_rows())
        assert set(ratios) == {LOOP, TUNE, SLOW_TUNE}
        assert ratios[LOOP]["total"] == pytest.approx(18 / 6.3)
        assert ratios[LOOP]["epoch"] == pytest.approx(6 / 0.1)
        assert ratios[LOOP]["next_run"] == pytest.approx(18 / 0.3)
        assert speedups(four_rows()[2:]) == {}

    def test_speedups_leave_out_heads_without_epochs(self):
        head = dataclasses.replace(four_rows()[1], mode="default", num_epochs=0)
        assert speedups([head, *four_rows()]) == speedups(four_rows())


class TestBreakEven:
    def test_counts_whole_repetitions(self):
        # 10 s once, then 1 s instead of 5: after 2 repetitions 12 > 10, after 3, 13 < 15.
        assert break_even(10, 1, 5) == 3

    def test_equality_counts_as_paid(self):
        assert break_even(8, 1, 5) == 2

    def test_at_once(self):
        assert break_even(0.5, 0.1, 5) == 1
        assert break_even(-3, 0.1, 5) == 1

    def test_never(self):
        assert break_even(10, 5, 5) is None
        assert break_even(10, float("nan"), 5) is None


class TestAdvice:
    def test_clear_for_fine_tuning(self):
        assert advice(four_rows(slow_tune=0.72), {SLOW_TUNE: 0.0002}) == [
            "Faster: the cached head, 6.3 s with its extraction, 2.9× as fast as head only "
            "(network in the loop) and 7.6× as fast as full fine-tune (lr 1e-4); each further run "
            "on the cache takes 0.300 s.",
            "More accurate: full fine-tune (lr 1e-4), 0.720 against 0.640 for the cached head on "
            "the same 500 test images; the difference is statistically significant (p < 0.001, "
            "corrected for 2 fine-tunes).",
            "Pick fine-tuning here if 8.0 percentage points of accuracy are worth 41.7 s more; "
            "pick the cached head for a quick answer and for trying many settings.",
        ]

    def test_clear_for_the_cached_head(self):
        rows = four_rows(slow_tune=0.55, tune=0.57)
        assert advice(rows, {TUNE: 0.01, SLOW_TUNE: 1e-6})[1:] == [
            "More accurate: the cached head, 0.640 against 0.570 for full fine-tune (lr 1e-3) on "
            "the same 500 test images; the difference is statistically significant (p = 0.01).",
            "Pick the cached head here: 7.0 percentage points better and 41.7 s faster; this run "
            "did not try other learning rates, more epochs or more data for fine-tuning.",
        ]

    def test_reversed_fine_tuning_faster_and_better(self):
        rows = four_rows(slow_tune=0.72, tune_total=5.0)
        assert advice(rows, {SLOW_TUNE: 0.001}) == [
            "Faster: full fine-tune (lr 1e-4), 5.0 s, 1.3× as fast as the cached head, whose "
            "extraction took 6.0 s; each further run on the cache takes 0.300 s.",
            "More accurate: full fine-tune (lr 1e-4), 0.720 against 0.640 for the cached head on "
            "the same 500 test images; the difference is statistically significant (p = 0.002, "
            "corrected for 2 fine-tunes).",
            "Pick fine-tuning here: 8.0 percentage points better and 1.3 s faster; the cache pays "
            "off only if you try many heads.",
        ]

    def test_reversed_the_head_slower_but_better(self):
        rows = four_rows(slow_tune=0.55, tune=0.5, tune_total=5.0)
        assert advice(rows, {SLOW_TUNE: 0.001})[2] == (
            "Pick the cached head here: 9.0 percentage points better and worth its 1.3 s more; "
            "this run did not try other learning rates, more epochs or more data for fine-tuning."
        )

    def test_undecided(self):
        assert advice(four_rows(), {TUNE: 0.001, SLOW_TUNE: 0.3})[1:] == [
            "No clear winner on accuracy: full fine-tune (lr 1e-4) has 0.664 against 0.640 for the "
            "cached head on the same 500 test images, which may be chance (p = 0.6, corrected for "
            "2 fine-tunes).",
            "Pick the cached head here: it takes less time, and nothing here shows that "
            "fine-tuning is better; more test images, train images or learning rates could.",
        ]

    def test_undecided_and_fine_tuning_faster(self):
        assert advice(four_rows(tune_total=5.0), {SLOW_TUNE: 0.3})[2] == (
            "Pick by time here: a single fine-tune is 1.3 s faster, but the cached head wins as "
            "soon as you try several heads."
        )

    def test_a_tie(self):
        assert advice(four_rows(slow_tune=0.64), {SLOW_TUNE: 1.0})[1] == (
            "No clear winner on accuracy: full fine-tune (lr 1e-4) and the cached head both have "
            "0.640 on the same 500 test images."
        )

    def test_trying_two_rates_makes_a_difference_less_sure(self):
        # p = 0.03 alone would be beyond chance; as the better of two fine-tunes it is 0.06.
        assert "may be chance (p = 0.06" in advice(four_rows(), {SLOW_TUNE: 0.03})[1]
        assert (
            "statistically significant (p = 0.03)"
            in advice([row for row in four_rows() if row.mode != TUNE], {SLOW_TUNE: 0.03})[1]
        )

    def test_the_best_of_each_side_is_compared(self):
        # Digits: the notebook's three epochs at 0.822, train-head's default at 0.981.
        rows = four_rows(head=0.822, slow_tune=0.994, tune=0.97)
        default = make_row("default head", "cached", 0.981, 6.6, extract=6.0)
        rows.append(dataclasses.replace(default, test_interval=(0.96, 0.991)))
        assert best_of(rows, "cached").mode == "default head"
        said = advice(rows, {SLOW_TUNE: 0.18, CACHED: 1e-9})
        assert said[1] == (
            "No clear winner on accuracy: full fine-tune (lr 1e-4) has 0.994 against 0.981 for "
            "default head on the same 500 test images, which may be chance (p = 0.36, corrected "
            "for 2 fine-tunes)."
        )
        assert said[2].startswith("Pick the cached head here: it takes less time")
        assert "17." not in " ".join(said)

    def test_equally_good_heads_are_ranked_by_time(self):
        rows = [make_row("slow", "cached", 0.9, 9.0), make_row("fast", "cached", 0.9, 8.0)]
        assert best_of(rows, "cached").mode == "fast"
        assert best_of(rows, "finetune") is None

    def test_more_accurate_is_never_said_of_what_does_not_beat_the_baseline(self):
        rows = [
            dataclasses.replace(row, baseline_top1=0.669, imbalanced=True, balanced_top1=balanced)
            for row, balanced in zip(
                four_rows(head=0.3, slow_tune=0.66), (0.4, 0.4, 0.4, 0.55), strict=True
            )
        ]
        said = advice(rows, {SLOW_TUNE: 1e-9})
        assert said[1] == (
            "No clear winner on accuracy: full fine-tune (lr 1e-4) has 0.660 against 0.300 for the "
            "cached head on the same 500 test images (balanced accuracy 0.550 and 0.400), and "
            "neither beats always answering the most frequent class (0.669)."
        )
        assert said[2].startswith("Pick neither yet")
        above = [*rows[:3], dataclasses.replace(rows[3], test_top1=0.69)]
        assert advice(above, {SLOW_TUNE: 1e-9})[1].startswith("More accurate: full fine-tune")

    def test_balanced_accuracy_that_says_the_opposite_leaves_it_undecided(self):
        rows = [
            dataclasses.replace(row, baseline_top1=0.5, imbalanced=True, balanced_top1=balanced)
            for row, balanced in zip(four_rows(slow_tune=0.75), (0.7, 0.7, 0.6, 0.612), strict=True)
        ]
        said = advice(rows, {SLOW_TUNE: 1e-6})
        assert said[1].endswith(
            "(p < 0.001, corrected for 2 fine-tunes), but by balanced accuracy, where rare classes "
            "count as much as common ones, the cached head leads, 0.700 against 0.612."
        )
        assert said[2].startswith(
            "Pick full fine-tune (lr 1e-4) if every image matters equally, the cached head if "
            "every class does;"
        )
        agreed = [dataclasses.replace(row, balanced_top1=row.test_top1) for row in rows]
        assert advice(agreed, {SLOW_TUNE: 1e-6})[1].startswith(
            "More accurate: full fine-tune (lr 1e-4), 0.750 against 0.640 for the cached head on "
            "the same 500 test images (balanced accuracy 0.750 and 0.640; always answering the "
            "most frequent class: 0.500); the difference"
        )

    def test_without_a_paired_test_the_intervals_decide(self):
        assert "may be chance (the 95% intervals overlap)" in advice(four_rows())[1]
        assert (
            "statistically significant (the 95% intervals do not overlap)"
            in advice(four_rows(slow_tune=0.75))[1]
        )

    def test_without_a_fine_tune_only_speed_is_compared(self):
        assert advice(four_rows()[:2]) == [
            "Faster: the cached head, 6.3 s with its extraction, 2.9× as fast as head only "
            "(network in the loop); each further run on the cache takes 0.300 s."
        ]

    def test_without_a_cached_head_there_is_nothing_to_say(self):
        assert advice(four_rows()[2:]) == []


def test_no_speed_up_without_the_time_of_extraction():
    rows = [dataclasses.replace(four_rows()[1], extraction_known=False), four_rows()[2]]
    cells = table_cells(rows)
    assert cells[0][4:] == ("not known", "6.3 s + extraction", "–")
    assert cells[1][4:] == ("none", "48.0 s", "1.0×")


class TestPlot:
    def test_draws_every_mode(self, tmp_path):
        path = tmp_path / "plot.png"
        plot_accuracy_against_seconds(four_rows(), path, "title")
        from PIL import Image

        with Image.open(path) as picture:
            assert picture.size == (1600, 1000)
            # Every mode's colour is in the picture, so no line was lost.
            colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
        for color in ("#0072b2", "#d55e00", "#009e73", "#b8578a"):
            assert tuple(bytes.fromhex(color[1:])) in colors

    @pytest.mark.parametrize("rows", [[], four_rows()[1:2]])
    def test_draws_few_modes(self, tmp_path, rows):
        plot_accuracy_against_seconds(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        "points", [[(0.0, 0.0)], [(5e-324, 1.0), (1e10, 0.0)], [(1.0, 0.5)] * 2]
    )
    def test_draws_the_ends_of_what_is_allowed(self, tmp_path, points):
        row = make_row(TUNE, "finetune", points[-1][1], 1.0, points=tuple(points))
        plot_accuracy_against_seconds([row], tmp_path / "plot.png")

    def test_the_interval_is_that_of_the_kept_epoch(self):
        row = make_row(TUNE, "finetune", 0.6, 3.0, points=((1.0, 0.5), (2.0, 0.6), (3.0, 0.4)))
        (line,) = lines_of([row])
        assert line.bars == [None, row.test_interval, None]

    def test_a_name_is_no_formula_and_no_setting_of_the_user_counts(self, tmp_path):
        import matplotlib

        row = make_row("a $\\frac{$ b", "finetune", 0.6, 3.0)
        with matplotlib.rc_context({"text.usetex": True}):
            plot_accuracy_against_seconds([row], tmp_path / "plot.png", title="$\\frac{$")

    def test_a_drawing_is_the_same_each_time_and_its_ids_are_its_own(self):
        def drawn(salt):
            lines = lines_of(four_rows())
            return as_svg(lambda: draw(lines, (360, 330), "seconds", seconds_tick), salt)

        assert drawn("a") == drawn("a")
        view, body = drawn("a")
        assert view == "0 0 360 330"
        ids = set(re.findall('id="([^"]*)"', body))
        assert ids.isdisjoint(re.findall('id="([^"]*)"', drawn("b")[1]))
        assert set(re.findall(r'(?:url\(|href=")#(\w+)', body)) == ids
        assert re.search('#[0-9a-f]{6}[;"]', body) is None  # every colour is the page's

    def test_says_where_it_could_not_write(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot write"):
            plot_accuracy_against_seconds(four_rows(), tmp_path / "file" / "plot.png")

"""Scores beyond accuracy: the overview of all runs, and one run's classes and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from featcache.html_report.charts import Chart, make_chart
from featcache.html_report.compared_runs import ComparedRun, target_names
from featcache.html_report.report_files import Run
from featcache.results.metrics import wilson_interval
from featcache.results.plots import Line, draw_unit
from featcache.results.reliability import CalibrationReport, Reliability
from featcache.results.runs import RunReport
from featcache.results.scores import Interval, TwoClassCurves
from featcache.results.tables import (
    CLASS_HEADER,
    DASH,
    HEADER,
    class_cells,
    or_dash,
    score_text,
    seconds_text,
    table_cells,
    with_interval,
)
from featcache.results.targets import MultilabelScores, RegressionScores

OVERVIEW = {"macro F1": "macro_f1", "AUROC": "auroc", "log loss": "log_loss"}
SCORES = OVERVIEW | {"weighted F1": "weighted_f1", "average precision": "average_precision"}
"""Columns and the scores that they show."""
MAX_CLASS_ROWS = 1000
LABELS_TITLE, NUMBERS_TITLE = "Several labels per image", "A number per image"
LABELS_HEADER = [
    *("mode", "mean average precision", "macro F1", "micro F1", "all labels right", "total time"),
]
LABEL_HEADER = ["label", "average precision", "precision", "recall", "F1", "test images"]
NUMBERS_HEADER = [
    *("mode", "R squared", "mean absolute error", "root mean squared error"),
    *("error of the median", "total time"),
]


class TargetTable(NamedTuple):
    """A table of runs, and for each run a table of its labels."""

    title: str
    header: list[str]
    rows: list[list[str]]
    by_label: dict[str, list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """What one run's details show.

    Attributes:
        num_classes: Number of all classes.
        header: Of the table of classes.
        rows: Its body; of very many classes, the first.
        intervals_from: How the intervals of the overview were made.
        calibration: What was measured of the probabilities, if anything was.
        rejections: Level, share called unknown and accuracy on the rest, of `predict --reject`.
        charts: Reliability, and the curves of two classes, by name.
    """

    num_classes: int
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    intervals_from: str
    calibration: CalibrationReport | None
    rejections: Sequence[Sequence[str]]
    charts: dict[str, Chart]


class Overview(NamedTuple):
    """The table of all runs, and by title what is folded below it: times, scores in full."""

    header: list[str]
    rows: list[list[str]]
    folded: dict[str, tuple[list[str], list[list[str]]]]


def overview(compared: Sequence[ComparedRun]) -> Overview:
    """All runs: accuracy, scores over classes, calibration error, time; a baseline comes last."""
    cells = table_cells([run.row for run in compared])
    scores = [run.report.scores if run.report else None for run in compared]
    short = [
        [or_dash(getattr(found, name, None)) for name in OVERVIEW.values()] for found in scores
    ]
    errors = [
        or_dash(run.report.calibration.after.ece if run.report and run.report.calibration else None)
        for run in compared
    ]
    middle = [[*found, error] for found, error in zip(short, errors, strict=True)]
    middle += [[DASH] * (len(OVERVIEW) + 1)] * (len(cells) - len(compared))
    rows = [[cell[0], cell[2], *m, *cell[-2:]] for cell, m in zip(cells, middle, strict=True)]
    mode, params, accuracy, *times = HEADER
    header = [mode, accuracy, *OVERVIEW, "calibration error", *times[-2:]]
    kept = [c for c in range(len(header)) if any(row[c] != DASH for row in rows)]
    folded = {
        "Parameters and times": (
            [mode, params, *times[:-2]],
            [[cell[0], cell[1], *cell[3:-2]] for cell in cells],
        )
    }
    full = [
        [run.name, *(score_text(name, getattr(found, name), found) for name in SCORES.values())]
        for run, found in zip(compared, scores, strict=True)
        if found is not None
    ]
    if full:
        folded["Scores over classes"] = ([mode, *SCORES], full)
    return Overview([header[c] for c in kept], [[row[c] for c in kept] for row in rows], folded)


def target_tables(runs: Sequence[Run]) -> list[TargetTable]:
    """Tables of runs on images with several labels, and of runs on images with a number."""
    labels = TargetTable(LABELS_TITLE, LABELS_HEADER, [], {})
    numbers = TargetTable(NUMBERS_TITLE, NUMBERS_HEADER, [], {})
    for name, run in zip(target_names(runs), runs, strict=True):
        scores = run.report.target_scores
        seconds = seconds_text(run.report.seconds_total)
        if isinstance(scores, MultilabelScores):
            labels.rows.append([name, *_labels_cells(scores), seconds])
            labels.by_label[name] = _label_rows(scores)
        elif isinstance(scores, RegressionScores):
            numbers.rows.append([name, *_number_cells(scores), seconds])
    return [table for table in (labels, numbers) if table.rows]


def _labels_cells(scores: MultilabelScores) -> list[str]:
    others = (scores.macro_f1, scores.micro_f1, scores.exact_match)
    main = with_interval(scores.mean_average_precision, scores.interval)
    return [main, *(f"{value:.3f}" for value in others)]


def _label_rows(scores: MultilabelScores) -> list[list[str]]:
    return [
        [
            label,
            or_dash(found.average_precision),
            *(f"{value:.3f}" for value in (found.precision, found.recall, found.f1)),
            f"{found.support:,}",
        ]
        for label, found in list(scores.per_label.items())[:MAX_CLASS_ROWS]
    ]


def _number_cells(scores: RegressionScores) -> list[str]:
    low, high = scores.mae_interval
    return [
        with_interval(scores.r2, scores.r2_interval),
        f"{scores.mae:.4g} [{low:.4g}, {high:.4g}]",
        f"{scores.rmse:.4g}",
        f"{scores.baseline_mae:.4g}",
    ]


def run_scores(report: RunReport | None, salt: str) -> RunScores | None:
    """One run's classes and charts; None for reports without scores.

    Args:
        report: The run's.
        salt: A different one for each run of a page.
    """
    if report is None or report.scores is None:
        return None
    charts = {}
    if report.calibration is not None:
        charts["reliability"] = _reliability(report.calibration, f"{salt}-reliability")
    if report.scores.curves is not None:
        charts |= _curves(report.scores.curves, salt)
    return RunScores(
        num_classes=len(report.scores.classes),
        header=CLASS_HEADER,
        rows=class_cells(report.scores)[:MAX_CLASS_ROWS],
        intervals_from=report.scores.intervals_from,
        calibration=report.calibration,
        rejections=[
            [f"{row['level']:g}", f"{row['unknown']:.1%}", or_dash(row.get("answered_top1"))]
            for row in report.more.get("rejections") or ()
        ],
        charts=charts,
    )


def _reliability(calibration: CalibrationReport, salt: str) -> Chart:
    measured = {"calibrated": calibration.after}
    if calibration.temperature != 1:
        measured["temperature 1"] = calibration.before
    lines = [
        Line(name=name, style=style, points=points, bars=bars)
        for style, (name, found) in enumerate(measured.items())
        for points, bars in [_bins(found)]
    ]
    cells = [
        [name, f"{x:.3f}", f"{y:.3f}", f"{n:,}"]
        for name, found in measured.items()
        for x, y, n in zip(found.confidence, found.top1, found.counts, strict=True)
        if x is not None and y is not None
    ]
    return make_chart(
        lines,
        lambda size: draw_unit(
            lines, size, "mean probability of the predicted class", "share correct", diagonal=True
        ),
        header=["probabilities", "mean probability", "share correct", "test images"],
        rows=cells,
        salt=salt,
    )


def _bins(found: Reliability) -> tuple[list[tuple[float, float]], list[Interval | None]]:
    """A point and an interval for each bin that has rows."""
    points, bars = [], list[Interval | None]()
    for x, y, count in zip(found.confidence, found.top1, found.counts, strict=True):
        if x is not None and y is not None:
            points.append((x, y))
            bars.append(wilson_interval(round(y * count), count))
    return points, bars


def _curves(curves: TwoClassCurves, salt: str) -> dict[str, Chart]:
    charts = {}
    for name, found, x, y in (
        ("ROC curve", curves.roc, "false-positive rate", "true-positive rate"),
        ("precision-recall curve", curves.precision_recall, "recall", "precision"),
    ):
        points = [(a, b) for _, a, b in found]
        lines = [Line(name=curves.positive, style=0, points=points, bars=[None] * len(points))]
        charts[name] = make_chart(
            lines,
            lambda size, lines=lines, x=x, y=y: draw_unit(  # type: ignore[misc]
                lines, size, x, y, diagonal=x != "recall"
            ),
            header=["threshold", x, y],
            rows=[[f"{value:.3f}" for value in point] for point in found],
            salt=f"{salt}-{name.split()[0]}",
        )
    return charts

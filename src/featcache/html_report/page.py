"""From what was read to the page's sections; the templates hold their words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featcache.config import ReportConfig
from featcache.html_report.audits import audit_values
from featcache.html_report.charts import Chart, make_chart
from featcache.html_report.compared_runs import (
    ComparedRun,
    compared_advice,
    compared_runs,
    ranked,
)
from featcache.html_report.feature_map import feature_map
from featcache.html_report.mistakes import (
    group_by_predictions,
    load_test_split,
    mistakes_of,
    recall_table,
)
from featcache.html_report.provenance import dataset_text, provenance_of
from featcache.html_report.report_files import ReportFiles, Summary
from featcache.html_report.scores import LABEL_HEADER, overview, run_scores, target_tables
from featcache.results import Row
from featcache.results.curve_advice import curve_advice
from featcache.results.learning_curve import CurvePoint, CurveRun, curve_points
from featcache.results.plots import (
    Line,
    curve_lines,
    draw,
    lines_of,
    seconds_tick,
)
from featcache.results.tables import (
    curve_cells,
    curve_header,
    leak_lines,
    seconds_text,
)

if TYPE_CHECKING:
    from featcache.data import ImageSplit

MAX_DETAILED = 6


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, and what the macro `layout` of templates/sections.jinja shows below it."""

    title: str
    layout: str
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole page; its advice is the first section too, if there is any."""

    title: str
    subtitle: str
    advice: list[str]
    sections: list[Section]


def make_page(files: ReportFiles, config: ReportConfig) -> Page:
    """Decide what the page shows.

    Raises:
        UserError: The dataset named for images is not that of the runs.
    """
    compared = compared_runs(files)
    curves = [*files.comparisons, *_unfinished_comparisons(files)]
    advice = [line for curve in curves for line in curve.advice]
    if not curves:
        advice = compared_advice(compared, files)
    sections = []
    if advice:
        sections.append(Section(title="Summary", layout="summary", values={"advice": advice}))
    for number, curve in enumerate(curves):
        unfinished = number >= len(files.comparisons)
        title = "Learning curve so far" if unfinished else "Learning curve"
        if unfinished or len(curves) > 1:
            title += f": {curve.path.parent.name}"
        values = {
            "chart": _curve_chart(curve.points, salt=f"curve-{number}"),
            "notes": curve.notes,
            "unfinished": unfinished,
        }
        sections.append(Section(title=title, layout="learning_curve", values=values))
    sections += _comparison_sections(compared, files, has_curve=bool(curves))
    sections += _target_sections(files)
    best_first = ranked(compared)
    split = load_test_split(config, best_first)
    sections += _map_sections(best_first, files, config, split)
    sections += _mistakes_sections(best_first, split)
    sections += _audit_sections(files, config)
    provenance = {"provenance": provenance_of(compared, files)}
    title = "Where the numbers come from"
    sections.append(Section(title=title, layout="provenance", values=provenance))
    return Page(
        title=config.title or _title(compared, files),
        subtitle=_subtitle(compared, files),
        advice=advice,
        sections=sections,
    )


def _unfinished_comparisons(files: ReportFiles) -> list[Summary]:
    """Comparisons that have not written their own reports yet, put together from their runs."""
    finished = {comparison.path.parent / "runs" for comparison in files.comparisons}
    runs = [r for r in files.runs if "cell" in r.report.more and r.path.parent not in finished]
    comparisons = []
    for folder in sorted({run.path.parent for run in runs}):
        points = curve_points(
            CurveRun.from_report(run.report) for run in runs if run.path.parent == folder
        )
        path, advice = folder.parent / "compare.json", curve_advice(points)
        comparisons.append(Summary(path=path, points=points, advice=advice))
    return comparisons


def _curve_chart(points: Sequence[CurvePoint], salt: str) -> Chart | None:
    if not points:
        return None
    lines, label = curve_lines(points), "training images (log scale)"
    return make_chart(
        lines,
        lambda size: draw(lines, size, label, lambda number: f"{number:,.0f}"),
        header=curve_header(points),
        rows=curve_cells(points),
        salt=salt,
    )


def _comparison_sections(
    compared: Sequence[ComparedRun], files: ReportFiles, *, has_curve: bool
) -> list[Section]:
    """The table of all runs, and their accuracy over time if any run has points."""
    if not compared:
        return []
    groups = group_by_predictions(ranked(compared))
    table = {
        "table": overview(compared),
        "recall": recall_table([group[0] for group in groups[:MAX_DETAILED]]) if groups else None,
        "has_curve": has_curve,
        "extraction_known": all(run.row.extraction_known for run in compared),
        "notes": [note for benchmark in files.benchmarks for note in benchmark.notes]
        + [
            f"{run.name}: {line}."
            for run in compared
            for line in leak_lines(run.report.more if run.report else {})
        ],
    }
    sections = [Section(title="Overview", layout="comparison", values=table)]
    rows = [run.row for run in ranked(compared) if run.row.extraction_known]
    lines = lines_of(rows)
    if lines:
        values = {
            "chart": _seconds_chart(rows, lines),
            "best": max(lines, key=lambda line: line.points[-1][1]),
            "num_rows": len(rows),
            "num_left_out": len(compared) - len(rows),
        }
        sections.append(Section(title="Accuracy over time", layout="seconds", values=values))
    return sections


def _seconds_chart(rows: Sequence[Row], lines: Sequence[Line]) -> Chart:
    cells = [
        [row.mode, str(number), seconds_text(seconds), f"{top1:.3f}"]
        for row in rows
        for number, (seconds, top1) in enumerate(row.points, start=1)
    ]
    return make_chart(
        lines,
        lambda size: draw(lines, size, "seconds (log scale)", seconds_tick),
        header=["mode", "point", "seconds", "test accuracy"],
        rows=cells,
        salt="seconds",
    )


def _target_sections(files: ReportFiles) -> list[Section]:
    """Runs on several labels and on numbers."""
    return [
        Section(
            title=table.title,
            layout="targets",
            values={"table": table, "label_header": LABEL_HEADER},
        )
        for table in target_tables(files.target_runs)
    ]


def _map_sections(
    compared: Sequence[ComparedRun],
    files: ReportFiles,
    config: ReportConfig,
    split: ImageSplit | None,
) -> list[Section]:
    """The test images by their features, or why they are not shown."""
    drawn, notes = feature_map(compared, files.target_runs, config, split)
    values = {"map": drawn, "notes": notes}
    if drawn is None and not notes:
        return []
    return [Section(title="Feature map", layout="feature_map", values=values)]


def _mistakes_sections(compared: Sequence[ComparedRun], split: ImageSplit | None) -> list[Section]:
    """Scores by class, confusions and wrong images of the first few runs, one at a time."""
    groups = group_by_predictions(compared)
    if not groups:
        return []
    shown, left = groups[:MAX_DETAILED], groups[MAX_DETAILED:]
    modes = [
        {
            "title": group[0].name,
            "mistakes": mistakes_of(group, split),
            "has_images": split is not None,
            "scores": run_scores(group[0].report, f"scores-{number}"),
        }
        for number, group in enumerate(shown)
    ]
    values = {"modes": modes, "left": [group[0].name for group in left[:20]]}
    return [Section(title="Mistakes", layout="modes", values=values)]


def _audit_sections(files: ReportFiles, config: ReportConfig) -> list[Section]:
    return [
        Section(title=audit.title, layout="audit", values=audit_values(audit, config))
        for audit in files.audits
    ]


def _title(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    if compared or files.summaries:
        return f"{_dataset_name(compared, files)}: frozen backbone vs. fine-tuning"
    if files.audits and not files.target_runs:
        return f"{_dataset_name(compared, files)}: audit"
    return ", ".join(table.title.lower() for table in target_tables(files.target_runs)).capitalize()


def _dataset_name(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    names = [summary.dataset for summary in files.summaries]
    recorded = [run.dataset for run in compared] + [audit.dataset for audit in files.audits]
    names += [str(dataset.get("name", "")) for dataset in recorded]
    names = list(dict.fromkeys(name[:80] for name in names if name))
    return ", ".join(names[:3]) or "featcache"


def _subtitle(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    report = next((run.report for run in compared if run.report), None)
    parts = [f"{files.num_files} report file{'s' if files.num_files != 1 else ''}"]
    if report is not None:
        parts.append(f"{int(report.more['num_test']):,} test images")
        parts.append(dataset_text(report.provenance))
    return " · ".join(parts)

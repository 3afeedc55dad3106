"""From what was read to the page's sections; the templates hold their words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featcache.config import ReportConfig
from featcache.html_report.charts import Chart, make_chart
from featcache.html_report.compared_runs import (
    ComparedRun,
    compared_advice,
    compared_runs,
    ranked,
)
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
from featcache.results.tables import HEADER, curve_cells, curve_header, seconds_text, table_cells

MAX_DETAILED = 6


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, and what the macro `layout` of templates/sections.jinja shows below it."""

    title: str
    layout: str
    values: Mapping[str, object]
    level: int = 2


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
    header, rows = overview(compared)
    if rows:
        scores = {"header": header, "rows": rows}
        sections.append(Section(title="Scores over classes", layout="scores", values=scores))
    for table in target_tables(files.target_runs):
        shown = {"table": table, "label_header": LABEL_HEADER}
        sections.append(Section(title=table.title, layout="targets", values=shown))
    sections += _mistakes_sections(ranked(compared), config)
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
    table = {
        "header": HEADER,
        "rows": table_cells([run.row for run in compared]),
        "has_curve": has_curve,
        "extraction_known": all(run.row.extraction_known for run in compared),
        "notes": [note for benchmark in files.benchmarks for note in benchmark.notes],
    }
    sections = [Section(title="Side-by-side comparison", layout="comparison", values=table)]
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


def _mistakes_sections(compared: Sequence[ComparedRun], config: ReportConfig) -> list[Section]:
    """Recall by class, then confusions and wrong images of the first few runs."""
    split = load_test_split(config, compared)
    groups = group_by_predictions(compared)
    if not groups:
        return []
    shown, left = groups[:MAX_DETAILED], groups[MAX_DETAILED:]
    header, rows = recall_table([group[0] for group in shown])
    names = [group[0].name for group in left[:20]]
    recall = {"header": header, "rows": rows}
    return [
        Section(title="Recall by class", layout="recall", values=recall),
        Section(title="Mistakes", layout="left_out", values={"shown": len(shown), "left": names}),
        *(
            Section(
                title=group[0].name,
                layout="mistakes",
                values={
                    "mistakes": mistakes_of(group, split),
                    "has_images": split is not None,
                    "scores": run_scores(group[0].report, f"scores-{number}"),
                },
                level=3,
            )
            for number, group in enumerate(shown)
        ),
    ]


def _title(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    if compared or files.summaries:
        return f"{_dataset_name(compared, files)}: frozen backbone vs. fine-tuning"
    return ", ".join(table.title.lower() for table in target_tables(files.target_runs)).capitalize()


def _dataset_name(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    names = [summary.dataset for summary in files.summaries]
    names += [str(run.dataset.get("name", "")) for run in compared]
    names = list(dict.fromkeys(name[:80] for name in names if name))
    return ", ".join(names[:3]) or "featcache"


def _subtitle(compared: Sequence[ComparedRun], files: ReportFiles) -> str:
    report = next((run.report for run in compared if run.report), None)
    parts = [f"{files.num_files} report file{'s' if files.num_files != 1 else ''}"]
    if report is not None:
        parts.append(f"{int(report.more['num_test']):,} test images")
        parts.append(dataset_text(report.provenance))
    return " · ".join(parts)

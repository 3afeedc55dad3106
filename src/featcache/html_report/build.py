"""From what was read to the page's sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from featcache.config import ReportConfig
from featcache.html_report.details import detail_sections, test_split
from featcache.html_report.doc import Chart, Drawing, Form, Page, Section, Table, Words, notes
from featcache.html_report.modes import Mode, make_modes, mode_advice, ranked
from featcache.html_report.provenance import dataset_text, provenance_blocks
from featcache.html_report.read import Found
from featcache.results import (
    CURVE_HEADER,
    CurvePoint,
    CurveRun,
    ModeScores,
    curve_advice,
    curve_cells,
    curve_points,
)
from featcache.results.plots import Line, as_svg, draw, lines_of, seconds_tick, sign
from featcache.results.tables import HEADER, seconds_text, table_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES: dict[Form, tuple[int, int]] = {"wide": (760, 400), "narrow": (360, 330)}


def build_page(found: Found, config: ReportConfig) -> tuple[Page, list[str]]:
    """Make the page.

    Returns:
        The page, and the sentences of advice on it.

    Raises:
        UserError: The dataset named for pictures is not that of the runs.
    """
    modes = make_modes(found)
    curves = learning_curves(found)
    split = test_split(config, modes)
    advice = [line for _, _, lines, _ in curves for line in lines]
    if not curves:
        advice = mode_advice(modes, found)
    sections = []
    if advice:
        sections.append(Section(title="In short", blocks=[Words(lines=advice, style="lead")]))
    for title, points, _, remarks in curves:
        sections.append(_curve_section(title, points, remarks, salt=f"curve-{len(sections)}"))
    if modes:
        sections.append(_table_section(modes, found, has_curve=bool(curves)))
    sections += _seconds_sections(modes)
    sections += detail_sections(ranked(modes), split)
    sections.append(
        Section(title="Where the numbers come from", blocks=provenance_blocks(modes, found))
    )
    title = config.title or f"{_dataset_name(modes, found)}: frozen backbone or fine-tuning"
    return Page(title=title, subtitle=_subtitle(modes, found), sections=sections), advice


Curve = tuple[str, list[CurvePoint], list[str], list[str]]


def learning_curves(found: Found) -> list[Curve]:
    """Title, points, advice and notes of every comparison, finished or not.

    Runs of a comparison that has not written its own report yet are put together here.
    """
    curves: list[Curve] = []
    several = len(found.comparisons) > 1
    for comparison in found.comparisons:
        where = f": {comparison.path.parent.name}" if several else ""
        values = comparison.values
        curves.append(
            (f"Learning curve{where}", comparison.points, values["advice"], values["notes"])
        )
    finished = {comparison.path.parent / "runs" for comparison in found.comparisons}
    open_ = [(p, r) for p, r in found.runs if "cell" in r.more and p.parent not in finished]
    for folder in sorted({path.parent for path, _ in open_}):
        points = curve_points(CurveRun.from_report(r) for p, r in open_ if p.parent == folder)
        note = "This comparison is not finished: run the same compare command to resume it."
        title = f"Learning curve so far: {folder.parent.name}"
        curves.append((title, points, curve_advice(points), [note]))
    return curves


def _curve_section(
    title: str, points: Sequence[CurvePoint], remarks: Sequence[str], salt: str
) -> Section:
    text = (
        "Both modes learn from the same images and are scored on the same test images. The p value "
        "is that of a paired test on them, each image counted once, corrected for the number of "
        "sizes (Holm); a mode is called more accurate where it is below 0.05, every draw agrees, "
        "the mode beats always answering the most frequent class, and balanced accuracy does not "
        "say the opposite. Times are from labelled images to a classifier, scoring left out."
    )
    chart = [_curve_chart(points, salt)] if points else []
    return Section(title=title, blocks=[*chart, Words(lines=[text]), *notes(*remarks)])


def _curve_chart(points: Sequence[CurvePoint], salt: str) -> Chart:
    """The learning curve with intervals, and a dot per draw of train images."""
    sides = {
        "cached head": (0, 0.985, [(p.num_train, p.cached) for p in points]),
        "full fine-tune": (2, 1.015, [(p.num_train, p.finetune) for p in points]),
    }
    lines = [
        _curve_line(name, style, shift, [(x, side) for x, side in values if side is not None])
        for name, (style, shift, values) in sides.items()
    ]
    table = Table(caption="Learning curve", header=CURVE_HEADER, rows=curve_cells(points))
    return _chart(
        [line for line in lines if line.points],
        caption="Test accuracy at growing numbers of train images: mean over draws of train images "
        "(dots) with its 95 % interval over test images.",
        alt=f"Learning curves of cached head and fine-tuning over {len(points)} sizes of the train "
        "set. The numbers follow as a table.",
        x_label="train images (log scale)",
        x_text=lambda number: f"{number:,.0f}",
        table=table,
        salt=salt,
    )


def _curve_line(
    name: str, style: int, shift: float, values: Sequence[tuple[int, ModeScores]]
) -> Line:
    dots = [
        (float(x), top1)
        for x, side in values
        if len(side.top1_by_seed) > 1
        for top1 in side.top1_by_seed.values()
    ]
    return Line(
        name=name,
        style=style,
        points=[(float(x), side.top1) for x, side in values],
        bars=[side.interval for _, side in values],
        dots=dots,
        shift=shift,
    )


def _chart(
    lines: Sequence[Line],
    *,
    caption: str,
    alt: str,
    x_label: str,
    x_text: Callable[[float], str],
    table: Table,
    salt: str,
) -> Chart:
    """Draw a chart for wide and narrow screens."""

    def drawing(form: Form, make: Callable[[], Figure], number: int = 0) -> Drawing:
        view, body = as_svg(make, f"{salt}-{form}-{number}")
        return Drawing(form=form, view=view, body=body)

    return Chart(
        caption=caption,
        alt=alt,
        legend=[(drawing("sign", partial(sign, n.style), n.style), n.name) for n in lines],
        drawings=[drawing(f, partial(draw, lines, s, x_label, x_text)) for f, s in SIZES.items()],
        table=table,
    )


def _table_section(modes: Sequence[Mode], found: Found, *, has_curve: bool) -> Section:
    rows = table_cells([mode.row for mode in modes])
    caption = "Accuracy with its 95 % interval; speed-up against the slowest mode's total time"
    remarks = []
    if has_curve:
        remarks.append("Of the comparison: its runs with most train images, first draw.")
    if not all(mode.row.extraction_known for mode in modes):
        remarks.append(
            "Where the extraction is not known, no file tells what it took, so there is no speed-up"
            " either."
        )
    remarks += [note for bench in found.benchmarks for note in bench.values["notes"]]
    return Section(
        title="The modes side by side",
        blocks=[Table(caption=caption, header=HEADER, rows=rows), *notes(*remarks)],
    )


def _seconds_sections(modes: Sequence[Mode]) -> list[Section]:
    """Test accuracy against wall seconds since each mode began, if any mode has points."""
    rows = [mode.row for mode in ranked(modes) if mode.row.extraction_known]
    lines = lines_of(rows)
    if not lines:
        return []
    cells = [
        [row.mode, str(number), seconds_text(seconds), f"{top1:.3f}"]
        for row in rows
        for number, (seconds, top1) in enumerate(row.points, start=1)
    ]
    best = max(lines, key=lambda line: line.points[-1][1])
    chart = _chart(
        lines,
        caption="Test accuracy against wall seconds since each mode began, reading, extraction and "
        "scoring included; one sign per epoch, the kept one with its 95 % interval; dashed before "
        "a cached head's first score while features are extracted.",
        alt=f"Lines of test accuracy over seconds for {len(lines)} modes; the highest end is "
        f"{best.points[-1][1]:.3f}, {best.name}. The numbers follow as a table.",
        x_label="seconds (log scale)",
        x_text=seconds_tick,
        table=Table(
            caption="Test accuracy against seconds",
            header=["mode", "point", "seconds", "test accuracy"],
            rows=cells,
        ),
        salt="seconds",
    )
    remarks = []
    if len(lines) < len(rows):
        remarks.append(f"Drawn are the first {len(lines)} of {len(rows)} modes; the table has all.")
    if len(rows) < len(modes):
        remarks.append("Cached heads whose extraction is not known are left out.")
    return [Section(title="Accuracy against seconds", blocks=[chart, *notes(*remarks)])]


def _dataset_name(modes: Sequence[Mode], found: Found) -> str:
    tables = [c.values for c in found.comparisons] + [b.values for b in found.benchmarks]
    names = [str(values.get("dataset", "")) for values in tables]
    for mode in modes:
        dataset = mode.report.provenance.get("dataset") if mode.report else None
        if isinstance(dataset, dict):
            names.append(str(dataset.get("name", "")))
    names = list(dict.fromkeys(name[:80] for name in names if name))
    return ", ".join(names[:3]) or "featcache"


def _subtitle(modes: Sequence[Mode], found: Found) -> str:
    described = next((mode.report for mode in modes if mode.report), None)
    parts = [f"{found.num_files} report file{'s' if found.num_files != 1 else ''}"]
    if described is not None:
        parts.append(f"{int(described.more['num_test']):,} test images")
        parts.append(dataset_text(described.provenance))
    return " · ".join(parts)

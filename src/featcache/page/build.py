"""From what was read to the page's sections."""

from __future__ import annotations

from collections.abc import Sequence

from featcache.config import ReportConfig
from featcache.curve import Point, cell_of, curve_advice, curve_points
from featcache.data import ImageSplit
from featcache.page.doc import Block, Bullets, Page, Section, Table, Text
from featcache.page.figures import curve_figure, seconds_figure
from featcache.page.modes import Mode, make_modes, mode_advice
from featcache.page.provenance import dataset_text, provenance_blocks
from featcache.page.read import Found
from featcache.page.scores import confusion_blocks, per_class_table, predictions_of
from featcache.page.thumbnails import test_split, wrong_blocks
from featcache.report.tables import HEADER, table_cells

MAX_DETAILED = 6


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
        sections.append(Section(title="In short", blocks=[Bullets(items=advice, lead=True)]))
    for title, points, _, notes in curves:
        sections.append(_curve_section(title, points, notes))
    if modes:
        sections.append(_table_section(modes, found, has_curve=bool(curves)))
    figure = seconds_figure(modes)
    if figure is not None:
        sections.append(Section(title="Accuracy against seconds", blocks=[figure]))
    sections += _detail_sections(modes, split)
    sections.append(
        Section(title="Where the numbers come from", blocks=provenance_blocks(modes, found))
    )
    title = config.title or f"{_dataset_name(modes, found)}: frozen backbone or fine-tuning"
    return Page(title=title, subtitle=_subtitle(modes, found), sections=sections), advice


Curve = tuple[str, list[Point], list[str], list[str]]


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
        points = curve_points(cell_of(r) for p, r in open_ if p.parent == folder)
        note = "This comparison is not finished: the same compare command goes on."
        title = f"Learning curve so far: {folder.parent.name}"
        curves.append((title, points, curve_advice(points), [note]))
    return curves


def _curve_section(title: str, points: Sequence[Point], notes: Sequence[str]) -> Section:
    blocks: list[Block] = [curve_figure(points)] if points else []
    blocks.append(
        Text(
            text="Both modes learn from the same images and are scored on the same test images. "
            "The p value is that of a paired test on them, each image counted once, corrected for "
            "the number of sizes (Holm); a mode is called more accurate where it is below 0.05, "
            "every draw agrees, the mode beats always answering the most frequent class, and "
            "balanced accuracy does not say the opposite. Times are from labelled images to a "
            "classifier, scoring left out."
        )
    )
    blocks += [Text(text=note, note=True) for note in notes]
    return Section(title=title, blocks=blocks)


def _table_section(modes: Sequence[Mode], found: Found, *, has_curve: bool) -> Section:
    rows = table_cells([mode.row for mode in modes])
    caption = "Accuracy with its 95 % interval; speed-up against the slowest mode's total time"
    blocks: list[Block] = [Table(caption=caption, header=HEADER, rows=rows)]
    if has_curve:
        blocks.append(
            Text(text="Of the comparison: its runs with most train images, first draw.", note=True)
        )
    unknown = [mode.name for mode in modes if not mode.known_extraction]
    if unknown:
        blocks.append(
            Text(
                text="Without extraction, whose time these files do not tell: "
                f"{'; '.join(unknown)}.",
                note=True,
            )
        )
    blocks += [Text(text=n, note=True) for b in found.benchmarks for n in b.values["notes"]]
    return Section(title="The modes side by side", blocks=blocks)


def _detail_sections(modes: Sequence[Mode], split: ImageSplit | None) -> list[Section]:
    """Per-class scores, then confusions and wrong images by mode."""
    detailed = [mode for mode in modes if predictions_of(mode)]
    if not detailed:
        return []
    shown, left = detailed[:MAX_DETAILED], detailed[MAX_DETAILED:]
    table = per_class_table(shown)
    sections = [Section(title="Scores by class", blocks=[table])] if table else []
    intro: list[Block] = []
    if left:
        names = "; ".join(mode.name for mode in left[:20])
        intro.append(
            Text(text=f"Only {MAX_DETAILED} modes are shown in detail, not: {names}.", note=True)
        )
    sections.append(Section(title="Mistakes", blocks=intro))
    for mode in shown:
        blocks = [*confusion_blocks(mode), *wrong_blocks(mode, split)]
        sections.append(Section(title=mode.name, blocks=blocks, level=3))
    return sections


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

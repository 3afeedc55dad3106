"""The page's figures: accuracy against seconds, and the learning curve."""

from __future__ import annotations

from collections.abc import Sequence

from featcache.curve import Point, Side, curve_cells, curve_header
from featcache.page.doc import Figure, Series, Table
from featcache.page.modes import ORDER, Mode
from featcache.report.run import Approach
from featcache.report.tables import seconds_text

# Styles by kind of mode, the first free one each; further ones share what is left.
STYLES: dict[Approach, tuple[int, ...]] = {
    "cached": (0, 4, 6),
    "loop": (1, 5, 6),
    "finetune": (2, 3, 5, 4, 6),
}


def seconds_figure(modes: Sequence[Mode]) -> Figure | None:
    """Test accuracy against wall seconds since each mode began."""
    used = dict.fromkeys(ORDER, 0)
    series, rows = [], []
    for mode in modes:
        row = mode.row
        points = [(s, t) for s, t in row.points if s > 0]
        if not points:
            continue
        styles = STYLES[row.approach]
        style = styles[used[row.approach] % len(styles)]
        used[row.approach] += 1
        lead_in = row.extract_seconds > 0
        series.append(Series(name=row.mode, style=style, points=points, lead_in=lead_in))
        for number, (seconds, top1) in enumerate(points, start=1):
            rows.append([row.mode, str(number), seconds_text(seconds), f"{top1:.3f}"])
    if not series:
        return None
    best = max(series, key=lambda line: line.points[-1][1])
    return Figure(
        caption="Test accuracy against wall seconds since each mode began, reading, extraction and "
        "scoring included; one sign per epoch, dashed before a cached head's first score while "
        "features are extracted.",
        alt=f"Lines of test accuracy over seconds for {len(series)} modes; the highest end is "
        f"{best.points[-1][1]:.3f}, {best.name}. The numbers follow as a table.",
        series=series,
        x_label="seconds (log scale)",
        y_label="test accuracy (top-1)",
        x_text=tick_seconds,
        table=Table(
            caption="Test accuracy against seconds",
            header=["mode", "point", "seconds", "test accuracy"],
            rows=rows,
        ),
    )


def tick_seconds(seconds: float) -> str:
    """A tick of the axis: "0.5 s", "20 s", "5,000 s"."""
    return f"{seconds:,.10g} s"


def curve_figure(points: Sequence[Point]) -> Figure:
    """The learning curve with intervals, and a dot per draw of train images."""
    sides = {
        "cached head": (0, -3.0, [(p.num_train, p.cached) for p in points]),
        "full fine-tune": (2, 3.0, [(p.num_train, p.finetune) for p in points]),
    }
    series = [
        _curve_series(name, style, shift, [(x, side) for x, side in values if side is not None])
        for name, (style, shift, values) in sides.items()
    ]
    return Figure(
        caption="Test accuracy at growing numbers of train images: mean over draws of train images "
        "(dots) with its 95 % interval over test images.",
        alt=f"Learning curves of cached head and fine-tuning over {len(points)} sizes of the train "
        "set. The numbers follow as a table.",
        series=series,
        x_label="train images (log scale)",
        y_label="test accuracy (top-1)",
        x_text=lambda number: f"{number:,.0f}",
        table=Table(caption="Learning curve", header=curve_header(), rows=curve_cells(points)),
    )


def _curve_series(
    name: str, style: int, shift: float, values: Sequence[tuple[int, Side]]
) -> Series:
    dots = [
        (float(x), top1)
        for x, side in values
        if len(side.top1_by_seed) > 1
        for top1 in side.top1_by_seed.values()
    ]
    return Series(
        name=name,
        style=style,
        points=[(float(x), side.top1) for x, side in values],
        bars=[side.interval for _, side in values],
        dots=dots,
        shift=shift,
    )

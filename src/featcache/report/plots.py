"""Accuracy against seconds, one line per mode."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.report.labels import label_lines
from featcache.report.run import Row
from featcache.report.tables import seconds_text
from featcache.runtime import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with every common colour blindness; the cached head, which
# the picture is about, takes the strongest pair of colour and marker.
STYLES = {
    "cached": (("#D55E00", "o"),),
    "loop": (("#0072B2", "s"),),
    "finetune": (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")),
}
INK, GREY = "#222222", "#8a8a8a"


def plot_accuracy_against_seconds(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Draw test top-1 against wall seconds since each mode began, one point per epoch.

    Seconds are on a logarithmic axis. The cached mode's line starts, at the bottom, with the
    stretch that its extraction took. Every line is named beside its end where
    there is room, and at the right edge otherwise.

    Args:
        rows: The comparison's lines; rows without points are left out.
        path: The PNG file to write, 1600 × 1000 px.
        title: One line above the picture.

    Raises:
        StorageError: The file system refused.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.points]
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = dict.fromkeys(STYLES, 0)
    labels = []
    for row in drawn:
        styles = STYLES[row.approach]
        color, marker = styles[used[row.approach] % len(styles)]
        used[row.approach] += 1
        _draw_line(axes, row, color, marker)
        labels.append((row, color))
    _dress(axes, drawn, title)
    label_lines(axes, labels)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _draw_line(axes: Axes, row: Row, color: str, marker: str) -> None:
    seconds, top1 = zip(*row.points, strict=True)
    axes.plot(seconds, top1, color=color, marker=marker, lw=2, ms=7, mec="white", mew=0.8, zorder=3)


def _dress(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """Scales, grid, axis names, and the stretch of extraction."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    seconds = [s for row in rows for s, _ in row.points] or [1.0]
    top1 = [t for row in rows for _, t in row.points] or [0.0, 1.0]
    room = max(0.1 * (max(top1) - min(top1)), 0.01)
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 1.8, max(seconds) * 1.12)
    axes.set_ylim(max(0.0, min(top1) - room), min(1.0, max(top1) + room))
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-4, 8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g} s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.grid(which="major", color="#e4e4e4", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=10)
    axes.set_xlabel("seconds since the mode began, reading included (log scale)", color=INK)
    axes.set_ylabel("test accuracy (top-1)", color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=12, color=INK, pad=12)
    for row in rows:
        if row.extract_seconds:
            _draw_extraction(axes, row)


def _draw_extraction(axes: Axes, row: Row) -> None:
    """A dashed lead-in to the first point: the time before anything could be scored."""
    color = STYLES["cached"][0][0]
    start, first = axes.get_xlim()[0], row.points[0]
    axes.plot([start, first[0]], [first[1]] * 2, color=color, lw=1.5, ls=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"extraction {seconds_text(row.extract_seconds)}",
        (start, first[1]),
        xytext=(6, -5),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=9,
        color=color,
    )

"""Names of lines inside a plot: beside a line's end where nothing is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.report.run import Row
from featcache.report.tables import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Where a name may stand beside its point: offset in points, horizontal and vertical alignment.
PLACES = (
    ((9, 0), "left", "center"),
    ((0, 9), "center", "bottom"),
    ((-9, 0), "right", "center"),
    ((0, -9), "center", "top"),
)
SAMPLES = 30
CLEARANCE_PX = 16
FONT_SIZE = 9.5
LINE_SPACING = 0.105
"""Height of a two-line name as a share of the axis, for those at the edge."""


def label_lines(axes: Axes, labels: Sequence[tuple[Row, str]]) -> None:
    """Name every line in its colour.

    Args:
        axes: With all lines drawn and its limits set.
        labels: Rows and their colours.
    """
    _reserve_the_edge(axes, labels)
    taken = [text.get_window_extent() for text in axes.texts]
    lines = np.concatenate([_sampled(axes, row) for row, _ in labels] or [np.empty((0, 2))])
    homeless = []
    # Those that end first have the most room around them.
    for row, color in sorted(labels, key=lambda label: label[0].points[-1][0]):
        text = _beside(axes, row, color, taken, lines)
        if text is None:
            homeless.append((row, color))
        else:
            taken.append(text.get_window_extent())
    _at_the_edge(axes, homeless)


def _sampled(axes: Axes, row: Row) -> Any:
    """Points along a row's line, in pixels, [M, 2]."""
    corners = axes.transData.transform(row.points)
    share = np.linspace(0, 1, SAMPLES)[:, None]
    pieces = [a + share * (b - a) for a, b in pairwise(corners)]
    return np.concatenate([corners, *pieces])


def _name_of(row: Row) -> str:
    seconds, top1 = row.points[-1]
    return f"{row.mode}\n{top1:.3f} after {seconds_text(seconds)}"


def _beside(
    axes: Axes, row: Row, color: str, taken: Sequence[Bbox], lines: Any
) -> Annotation | None:
    """Put the name beside the line's end, or nowhere if something is in the way everywhere."""
    inside = axes.get_window_extent()
    for offset, horizontal, vertical in PLACES:
        text = axes.annotate(
            _name_of(row),
            row.points[-1],
            xytext=offset,
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=FONT_SIZE,
            color=color,
            zorder=4,
        )
        box = text.get_window_extent()
        fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
        room = box.padded(CLEARANCE_PX)
        if fits and not any(room.overlaps(other) for other in taken) and not _hits(room, lines):
            return text
        text.remove()
    return None


def _hits(room: Bbox, lines: Any) -> bool:
    """Whether a line passes through the box."""
    across = (room.x0 < lines[:, 0]) & (lines[:, 0] < room.x1)
    return bool((across & (room.y0 < lines[:, 1]) & (lines[:, 1] < room.y1)).any())


def _reserve_the_edge(axes: Axes, labels: Sequence[tuple[Row, str]]) -> None:
    """Lay the figure out with room for every name at its edge, and keep it so.

    Otherwise a name at the edge would narrow the axes after others had found their places.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    names = _at_the_edge(axes, labels)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for name in names:
        name.remove()


def _at_the_edge(axes: Axes, labels: Sequence[tuple[Row, str]]) -> list[Annotation]:
    """Names right of the axes, moved apart, each led to its line's end by a thin stroke."""
    low, high = axes.get_ylim()
    gap = LINE_SPACING * (high - low)
    # Of two that end level, the earlier one gets the higher name, so that leaders do not cross.
    ends = sorted((row.points[-1][1], -row.points[-1][0], i) for i, (row, _) in enumerate(labels))
    place = -float("inf")
    places: dict[int, float] = {}
    for top1, _, i in ends:
        place = places[i] = max(top1, place + gap)
    overflow = max(0.0, place - high) if places else 0.0
    return [
        axes.annotate(
            _name_of(row),
            row.points[-1],
            xytext=(1.02, places[i] - overflow),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=FONT_SIZE,
            color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "alpha": 0.5, "shrinkB": 6},
            zorder=4,
        )
        for i, (row, color) in enumerate(labels)
    ]

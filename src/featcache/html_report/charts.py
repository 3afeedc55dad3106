"""Charts for wide and for narrow screens, with their numbers as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featcache.results.plots import Line, Svg, as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {"wide": (760, 400), "narrow": (360, 330)}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart drawn for wide and for narrow screens, its lines, its numbers as a table."""

    lines: Sequence[Line]
    drawings: dict[str, Svg]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def make_chart(
    lines: Sequence[Line],
    draw: Callable[[tuple[int, int]], Figure],
    *,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    salt: str,
) -> Chart:
    """Draw lines for both kinds of screens.

    Args:
        lines: For the legend.
        draw: Draws them at a size in px.
        header: Of the table.
        rows: Its body.
        salt: A different one for each chart of a page.
    """
    return Chart(
        lines=lines,
        drawings={
            screen: as_svg(lambda size=size: draw(size), f"{salt}-{screen}")  # type: ignore[misc]
            for screen, size in SIZES.items()
        },
        header=header,
        rows=rows,
    )

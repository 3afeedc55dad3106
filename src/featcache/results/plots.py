"""Charts of test accuracy: PNG files, and SVG that follows a page's style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featcache.files import write_atomically
from featcache.results.forecast import forecasts
from featcache.results.learning_curve import CurveMode, CurvePoint, ModeScores
from featcache.results.runs import Approach, Row
from featcache.results.tables import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Color, marker and dashes: distinct with any common color blindness, and in black and white.
STYLES: tuple[tuple[str, str, str | tuple[float, tuple[float, ...]]], ...] = (
    ("#d55e00", "o", "-"),
    ("#0072b2", "s", (0, (5, 2))),
    ("#009e73", "^", (0, (1.5, 1.5))),
    ("#b8578a", "D", (0, (5, 2, 1.5, 2))),
    ("#b07800", "v", (0, (8, 2))),
    ("#3a8fc4", "p", (0, (1, 2.5))),
    ("#6f4fb5", "<", (0, (3, 1, 1, 1))),
    ("#1c1f24", "X", (0, (3, 3))),
)
FIRST_STYLES: dict[Approach, int] = {"cached": 0, "loop": 1, "finetune": 2}
"""The style of the first line of each approach."""
INK, SOFT, RULE, GROUND = "#222222", "#59606b", "#d8dce2", "#ffffff"
VARIABLES = {
    **{color: f"var(--s{number})" for number, (color, _, _) in enumerate(STYLES)},
    **{INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)", GROUND: "var(--ground)"},
}
MARGINS = {"left": 64, "right": 26, "top": 10, "bottom": 46}
"""Room for ticks and labels in px of an SVG; measuring it would double the time to draw."""
SHORTEST_S = 1e-4
MAX_MARKERS = 20
"""Lines of more points are drawn without markers."""
PIXELS_PER_INCH = 72
"""So that a point of matplotlib is a pixel of an SVG."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: As in the legend.
        style: Index into `STYLES`.
        points: Pairs of x and accuracy.
        bars: The 95% interval of each point, or None.
        dots: More points, which no line connects.
        lead_in: Whether a dashed line leads from the axis to the first point.
        shift: Factor for x, so that intervals at the same x do not overlap.
        forecast: Where the line is expected to go on: x, accuracy, and the ends of its interval.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float] | None]
    dots: Sequence[tuple[float, float]] = ()
    lead_in: bool = False
    shift: float = 1.0
    forecast: Sequence[tuple[float, float, float, float]] = ()


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Accuracy over time: at most one line for each style, each style used once.

    Args:
        rows: The most important first; those without points are left out.
    """
    drawn = [row for row in rows if row.points][: len(STYLES)]
    firsts = {row.approach: i for i, row in reversed(list(enumerate(drawn)))}
    taken = {i: FIRST_STYLES[approach] for approach, i in firsts.items()}
    free = iter(style for style in range(len(STYLES)) if style not in taken.values())
    return [
        Line(
            name=row.mode,
            style=taken[i] if i in taken else next(free),
            points=row.points,
            bars=_bars(row),
            lead_in=row.extract_seconds > 0,
        )
        for i, row in enumerate(drawn)
    ]


def _bars(row: Row) -> list[tuple[float, float] | None]:
    """The interval at the epoch that was kept: the last point with the mode's accuracy."""
    kept = max((i for i, (_, top1) in enumerate(row.points) if top1 == row.test_top1), default=-1)
    return [row.test_interval if i == kept else None for i in range(len(row.points))]


LINES: dict[CurveMode, tuple[str, Approach, float]] = {
    "cached": ("cached head", "cached", 0.985),
    "tail": ("tail, cached activations", "loop", 1.0),
    "finetune": ("full fine-tune", "finetune", 1.015),
}
"""Name, style and shift of each mode's learning curve."""


def curve_lines(points: Sequence[CurvePoint]) -> list[Line]:
    """The learning curves with their intervals, a dot for each of several draws, and forecasts."""
    lines = []
    ends = forecasts(points)
    for mode, (name, style, shift) in LINES.items():
        values = [(point.num_train, side) for point in points if (side := point.scores(mode))]
        ahead = [(float(f.num_train), f.top1, *f.interval) for f in ends if f.mode == mode]
        if values:
            lines.append(_curve_line(name, FIRST_STYLES[style], shift, values, ahead))
    return lines


def _curve_line(
    name: str,
    style: int,
    shift: float,
    values: Sequence[tuple[int, ModeScores]],
    forecast: Sequence[tuple[float, float, float, float]],
) -> Line:
    return Line(
        name=name,
        style=style,
        points=[(float(x), side.top1) for x, side in values],
        bars=[side.interval for _, side in values],
        dots=[
            (float(x), top1)
            for x, side in values
            if len(side.top1_by_seed) > 1
            for top1 in side.top1_by_seed.values()
        ],
        shift=shift,
        forecast=forecast,
    )


def seconds_tick(seconds: float) -> str:
    """Label of a tick: "0.5 s", "20 s", "5,000 s"."""
    return f"{seconds:,.10g} s"


def draw(
    lines: Sequence[Line], size: tuple[int, int], x_label: str, x_text: Callable[[float], str]
) -> Figure:
    """Draw lines over a logarithmic x axis.

    Args:
        lines: An empty list gives empty axes.
        size: Width and height in px of an SVG.
        x_label: Label of the x axis.
        x_text: Makes the label of a tick of the x axis.
    """
    figure = _figure(size)
    axes = figure.subplots()
    axes.set_xscale("log")
    low, high = x_range(lines)
    axes.set_xlim(low, high)
    axes.set_ylim(*y_range(lines))
    for line in lines:
        _draw_line(axes, line)
    _dress(axes, log_ticks(low, high, most=size[0] // 85), x_text)
    axes.set_xlabel(x_label, color=INK, size=13)
    axes.set_ylabel("test accuracy (top-1)", color=INK, size=13)
    return figure


def _figure(size: tuple[int, int]) -> Figure:
    """An empty SVG figure of this size in px, with its margins."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(size[0] / PIXELS_PER_INCH, size[1] / PIXELS_PER_INCH),
        dpi=PIXELS_PER_INCH,
        facecolor="none",
    )
    figure.subplots_adjust(
        left=MARGINS["left"] / size[0],
        right=1 - MARGINS["right"] / size[0],
        bottom=MARGINS["bottom"] / size[1],
        top=1 - MARGINS["top"] / size[1],
    )
    return figure


def draw_unit(
    lines: Sequence[Line], size: tuple[int, int], x_label: str, y_label: str, *, diagonal: bool
) -> Figure:
    """Draw lines of shares over shares, both axes from 0 to 1.

    Args:
        lines: Their points and intervals.
        size: Width and height in px of an SVG.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        diagonal: Whether to draw where both are equal.
    """
    figure = _figure(size)
    axes = figure.subplots()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    if diagonal:
        axes.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=(0, (4, 3)))
    for line in lines:
        _draw_line(axes, line, markers=len(line.points) <= MAX_MARKERS)
    _dress(axes, [0, 0.2, 0.4, 0.6, 0.8, 1], lambda x: f"{x:g}")
    axes.set_xlabel(x_label, color=INK, size=13)
    axes.set_ylabel(y_label, color=INK, size=13)
    return figure


def _draw_line(axes: Axes, line: Line, *, markers: bool = True) -> None:
    color, marker, dashes = STYLES[line.style]
    x = [max(x, SHORTEST_S) * line.shift for x, _ in line.points]
    y = [top1 for _, top1 in line.points]
    for place, bar in zip(x, line.bars, strict=True):
        if bar is not None:
            axes.plot([place] * 2, bar, color=color, lw=1.3, marker="_", ms=8, alpha=0.75)
    if line.lead_in:
        axes.plot([axes.get_xlim()[0], x[0]], y[:1] * 2, color=color, lw=1.6, ls=(0, (4, 3)))
    for place, top1 in line.dots:
        axes.plot([place * line.shift], [top1], color=color, marker="o", ms=4, mew=0, alpha=0.55)
    marker = marker if markers else ""
    axes.plot(
        x, y, color=color, marker=marker, ls=dashes, lw=2.2, ms=8, mec=GROUND, mew=1, zorder=3
    )
    if line.forecast:
        _draw_forecast(axes, line, (x[-1], y[-1]))


def _draw_forecast(axes: Axes, line: Line, start: tuple[float, float]) -> None:
    """The forecast as a dotted line from the last point, inside a band for its interval."""
    color = STYLES[line.style][0]
    x = [start[0], *(place * line.shift for place, *_ in line.forecast)]
    ends = [[start[1]] * 3, *(ends for _, *ends in line.forecast)]
    middle, low, high = zip(*ends, strict=True)
    axes.plot(x, middle, color=color, ls=(0, (1, 2)), lw=2)
    axes.fill_between(x, low, high, color=color, alpha=0.14, lw=0)


def _dress(axes: Axes, x_ticks: Sequence[float], x_text: Callable[[float], str]) -> None:
    """Ticks, grid and spines."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.set_xticks(x_ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: x_text(x)))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.set_facecolor("none")
    axes.grid(which="major", color=RULE, lw=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=12.5, length=0)


def x_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits of the x axis, with some room."""
    drawn = [spot for line in lines for spot in (*line.points, *line.dots, *line.forecast)]
    values = [max(spot[0], SHORTEST_S) for spot in drawn]
    low, high = min(values, default=1.0), max(values, default=1.0)
    room = max((high / low) ** 0.06, 1.12)
    return low / room / (1.6 if any(line.lead_in for line in lines) else 1), high * room


def y_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits of the y axis, with some room, about 0 to 1 at most."""
    values = [y for line in lines for _, y in (*line.points, *line.dots)]
    values += [end for line in lines for bar in line.bars if bar for end in bar]
    values += [end for line in lines for _, *ends in line.forecast for end in ends]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.08 * (high - low), 0.01)
    return max(-0.01, low - room), min(1.01, high + room)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within the limits: 1, 2 and 5 times powers of ten, fewer if there are too many.

    If the limits are too close for three of those, ticks are equally spaced.
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 3:
        near = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [round(float(tick), 10) for tick in near if low <= tick <= high]
    return ticks[:: math.ceil(len(ticks) / most)]


def legend_svg(style: int) -> Svg:
    """A line's color, dashes and marker, as a legend shows them."""
    _, marker, dashes = STYLES[style]
    gaps = "" if isinstance(dashes, str) else " ".join(f"{2.2 * part:g}" for part in dashes[1])
    color = f"var(--s{style})"
    return Svg(
        "0 0 36 14",
        f'<path d="M0 7H36" stroke="{color}" stroke-width="2.2" stroke-dasharray="{gaps}"/>'
        f'<path d="{outline_of(marker, 8, (18, 7))}" fill="{color}" stroke="var(--ground)"/>',
    )


def outline_of(marker: str, size_px: float, center: tuple[float, float] = (0, 0)) -> str:
    """The path of a marker, for SVG."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    shape = MarkerStyle(marker)
    place = Affine2D().scale(size_px, -size_px).translate(*center)
    path = shape.get_path().transformed(shape.get_transform() + place)
    letters = {path.MOVETO: "M", path.LINETO: "L", path.CURVE4: "C", path.CLOSEPOLY: "Z"}
    return "".join(
        letters[code] + ("" if code == path.CLOSEPOLY else " ".join(f"{x:.2f}" for x in ends))
        for ends, code in path.iter_segments()
    )


@contextmanager
def plain_style(salt: str = "") -> Iterator[None]:
    """Matplotlib's defaults instead of the user's settings; reproducible SVG with real text."""
    from matplotlib import style

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}
    with style.context(["default", settings]):
        yield


class Svg(NamedTuple):
    """What an svg element needs: its viewBox and its content."""

    view: str
    body: str


def as_svg(make: Callable[[], Figure], salt: str) -> Svg:
    """A drawing to put into an HTML page, colored by the page's CSS variables.

    Args:
        make: Draws it.
        salt: A different one for each drawing of a page, so that ids are unique.
    """
    buffer = io.StringIO()
    with plain_style(salt):
        make().savefig(buffer, format="svg")
    text = buffer.getvalue()
    view = re.search(r'viewBox="([\d. ]+)"', text)
    assert view is not None
    body = text[text.index(">", view.end()) + 1 : text.rindex("</svg>")]
    body = re.sub(r"\s*<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", body, flags=re.S)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body).replace("xlink:href", "href")
    body = re.sub(r' font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", body)
    colors = re.compile("|".join(VARIABLES), re.IGNORECASE)
    return Svg(view[1], colors.sub(lambda match: VARIABLES[match[0].lower()], body).strip())


def _summary(line: Line) -> str:
    seconds, top1 = line.points[-1]
    return f"{line.name}\n{top1:.3f} after {seconds_text(seconds)}"


def plot_accuracy_against_seconds(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Draw test top-1 over wall-clock time since each mode started, one point per epoch.

    Args:
        rows: The rows of the comparison's table; those without points are left out.
        path: The PNG file to write, 1600 × 1000 px.
        title: One line above the plot.

    Raises:
        StorageError: The file system refused.
    """
    lines = lines_of(rows)
    label = "seconds since the mode started, including reading (log scale)"
    picture = io.BytesIO()
    with plain_style():
        figure = draw(lines, (720, 450), label, seconds_tick)
        figure.set_layout_engine("constrained")
        axes = figure.axes[0]
        handles = [line for line in axes.lines if line.get_zorder() == 3]
        names = [_summary(line) for line in lines]
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False)
        axes.set_title(title, loc="left", fontsize=13, color=INK, pad=12)
        figure.set_facecolor(GROUND)
        figure.savefig(picture, format="png", dpi=160)
    write_atomically(path, picture.getvalue())

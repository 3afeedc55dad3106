"""Figures as inline SVG, drawn by hand: scales, axes, lines, markers.

Colours and text styles come from the page's style sheet by class, so that they follow the reader's
light or dark mode. Lines differ in colour, marker and dash, so that they can be told apart without
colours too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from featcache.page.doc import Figure, Series

SIZES = {"wide": (760, 400), "narrow": (360, 330)}
NUM_STYLES = 7
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 14, 50


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where values lie on the drawing: x logarithmic, y linear."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Horizontal place of a value above zero."""
        low, high = (math.log(end) for end in self.x_range)
        share = (math.log(value) - low) / (high - low)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a value, counted from the top."""
        low, high = self.y_range
        return TOP + (high - value) / (high - low) * (self.height - TOP - BOTTOM)


def draw(figure: Figure, size: str) -> str:
    """One drawing of a figure for wide or narrow screens; empty without points."""
    drawn = [series for series in figure.series if series.points]
    if not drawn:
        return ""
    width, height = SIZES[size]
    frame = Frame(width=width, height=height, x_range=x_range(drawn), y_range=y_range(drawn))
    parts = [*_axes(figure, frame)]
    for series in drawn:
        parts += _line(series, frame)
    body = "\n".join(parts)
    return (
        f'<svg class="{size}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(figure.alt, quote=True)}">\n{body}\n</svg>'
    )


def x_range(drawn: Sequence[Series]) -> tuple[float, float]:
    """The horizontal axis's ends, with some room."""
    values = [x for series in drawn for x, _ in (*series.points, *series.dots) if x > 0] or [1.0]
    low, high = min(values), max(values)
    if any(series.lead_in for series in drawn):
        low /= 1.6
    room = max((high / low) ** 0.06, 1.12)
    return low / room, high * room


def y_range(drawn: Sequence[Series]) -> tuple[float, float]:
    """The vertical axis's ends, with some room, within 0 and 1."""
    values = [y for series in drawn for _, y in (*series.points, *series.dots)]
    values += [end for series in drawn for bar in series.bars for end in bar]
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.01)
    low, high = max(0.0, low - room), min(1.0, high + room)
    return (low, high) if high > low else (low - 0.01, high)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within the ends: 1, 2, 5 and their tens, fewer where they would crowd."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else [math.sqrt(low * high)]


def linear_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers within the ends, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(figure: Figure, frame: Frame) -> list[str]:
    left, right = LEFT, frame.width - RIGHT
    bottom = frame.height - BOTTOM
    parts = []
    y_ticks = linear_ticks(*frame.y_range)
    decimals = 2 if all(abs(t * 100 - round(t * 100)) < 1e-6 for t in y_ticks) else 3
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:.{decimals}f}", "end"))
    for tick in log_ticks(*frame.x_range, most=frame.width // 85):
        x = frame.x(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(_text(x, bottom + 18, figure.x_text(tick), "middle"))
    parts.append(f'<path class="axis" d="M{left} {TOP}V{bottom}H{right}"/>')
    parts.append(_text((left + right) / 2, frame.height - 8, figure.x_label, "middle", "name"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="name" text-anchor="middle" transform="translate(14 {middle:.0f}) '
        f'rotate(-90)">{escape(figure.y_label)}</text>'
    )
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{escape(text)}</text>'


def _line(series: Series, frame: Frame) -> list[str]:
    style = series.style % NUM_STYLES
    places = [(frame.x(x) + series.shift, frame.y(y)) for x, y in series.points]
    parts = []
    for (x, _), bar in zip(places, series.bars, strict=bool(series.bars)):
        low, high = frame.y(bar[0]), frame.y(bar[1])
        parts.append(
            f'<path class="bar s{style}" d="M{x:.1f} {low:.1f}V{high:.1f}'
            f'M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
        )
    if series.lead_in:
        first = places[0]
        parts.append(f'<path class="ahead s{style}" d="M{LEFT} {first[1]:.1f}H{first[0]:.1f}"/>')
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts.append(f'<path class="line s{style}" d="M{way}"/>')
    for x, y in series.dots:
        place = f'cx="{frame.x(x) + series.shift:.1f}" cy="{frame.y(y):.1f}"'
        parts.append(f'<circle class="dot s{style}" {place} r="2"/>')
    parts += [marker(style, x, y) for x, y in places]
    return parts


def marker(style: int, x: float, y: float) -> str:
    """The sign of a line's points: each style has its own shape."""
    shapes = (
        "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0 -4.5 0Z",  # circle
        "M-4 -4H4V4H-4Z",  # square
        "M0 -5.5L5 4H-5Z",  # triangle
        "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",  # diamond
        "M0 5.5L5 -4H-5Z",  # triangle, point down
        "M-1.8 -5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",  # plus
        "M0 -5.5L1.6 -1.7L5.5 -1.7L2.4 0.9L3.5 4.8L0 2.5L-3.5 4.8L-2.4 0.9L-5.5 -1.7L-1.6 -1.7Z",
    )
    return (
        f'<path class="mark s{style}" transform="translate({x:.1f} {y:.1f})" '
        f'd="{shapes[style % len(shapes)]}"/>'
    )


def legend_sign(style: int) -> str:
    """A line's colour, dash and marker, as it stands in the legend."""
    style %= NUM_STYLES
    return (
        '<svg class="sign" viewBox="0 0 34 14" aria-hidden="true">'
        f'<path class="line s{style}" d="M1 7H33"/>{marker(style, 17, 7)}</svg>'
    )

"""What a page consists of, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; a note is set apart."""

    text: str
    note: bool = False


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """Sentences one below the other; `lead` ones are set large."""

    items: Sequence[str]
    lead: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; all columns but the first `num_text` hold figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure.

    `points` are (x, y); `bars` the low and high end of each point's interval; `dots` further single
    points; `shift` moves the whole line sideways, in px, so that intervals at the same place do not
    cover each other; `lead_in` asks for a dashed stretch up to the first point.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float]] = ()
    dots: Sequence[tuple[float, float]] = ()
    shift: float = 0.0
    lead_in: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Lines over a logarithmic axis, with the same numbers as a table.

    `x_text` writes a tick of the horizontal axis; the vertical one is a share from 0 to 1.
    """

    caption: str
    alt: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    x_text: Callable[[float], str]
    table: Table


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts by true class (row) and predicted class (column)."""

    caption: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small JPEG with a line or two below it."""

    jpeg: bytes
    alt: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures side by side."""

    caption: str
    items: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class Code:
    """Commands as they are typed."""

    text: str


Block = Text | Bullets | Table | Figure | Matrix | Pictures | Code


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it; `level` is 2 or 3."""

    title: str
    blocks: Sequence[Block]
    level: int = 2


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)

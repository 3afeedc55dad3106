"""What a page consists of; the templates say how each looks in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

Form = Literal["wide", "narrow", "sign"]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Paragraphs, notes set apart from them, the page's leading sentences, or commands."""

    kind: ClassVar[str] = "words"
    lines: Sequence[str]
    style: Literal["text", "note", "lead", "code"] = "text"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; all columns but the first `num_text` hold figures."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An SVG: `form` is its CSS class, `view` its viewBox, `body` what is in it."""

    form: Form
    view: str
    body: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart drawn for wide and for narrow screens, its legend, its numbers as a table."""

    kind: ClassVar[str] = "chart"
    caption: str
    alt: str
    legend: Sequence[tuple[Drawing, str]]
    drawings: Sequence[Drawing]
    table: Table


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts by true class (row) and predicted class (column)."""

    kind: ClassVar[str] = "matrix"
    caption: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small JPEG in base64 with a line or two below it."""

    jpeg: str
    alt: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures side by side."""

    kind: ClassVar[str] = "pictures"
    caption: str
    items: Sequence[Picture]


Block = Words | Table | Chart | Matrix | Pictures


def notes(*lines: str) -> list[Block]:
    """Notes, one below the other; nothing where there are none."""
    return [Words(lines=lines, style="note")] if lines else []


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
    sections: Sequence[Section]

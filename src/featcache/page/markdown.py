"""The page as Markdown: the same words and tables; figures are their tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from featcache.page.doc import (
    Block,
    Bullets,
    Code,
    Figure,
    Matrix,
    Page,
    Pictures,
    Table,
    Text,
)

SAME = "The same with figures and pictures:"
MARKS = re.compile(rb"^%s " % SAME.encode(), re.MULTILINE)


def to_markdown(page: Page, html_name: str) -> str:
    """The whole file.

    Args:
        page: What to write.
        html_name: Name of the HTML page, for the figures.
    """
    parts = [f"# {plain(page.title)}", plain(page.subtitle)]
    parts.append(f"{SAME} {plain(html_name)}")
    for section in page.sections:
        parts.append(f"{'#' * section.level} {plain(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """A text that Markdown leaves as it is: on one line, nothing in it is markup."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", flat)


def _block(block: Block) -> str:
    match block:
        case Text():
            text = f"> {plain(block.text)}" if block.note else plain(block.text)
        case Bullets():
            text = "\n".join(f"- {plain(item)}" for item in block.items)
        case Table():
            text = _table(block)
        case Figure():
            text = f"{plain(block.caption)}\n\n{_table(block.table)}"
        case Matrix():
            text = _table(_as_table(block))
        case Pictures():
            lines = [f"- {plain('; '.join(item.lines))}" for item in block.items]
            text = f"{plain(block.caption)}\n\n" + "\n".join(lines)
        case Code():
            ticks = [len(run) for run in re.findall("`+", block.text)]
            fence = "`" * max([3, *(length + 1 for length in ticks)])
            text = f"{fence}console\n{block.text}\n{fence}"
    return text


def _as_table(matrix: Matrix) -> Table:
    rows = [
        [name, *(str(count) for count in counts)]
        for name, counts in zip(matrix.names, matrix.counts, strict=True)
    ]
    header = ["true \\ predicted", *matrix.names]
    return Table(caption=matrix.caption, header=header, rows=rows)


def _table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(plain(text) for text in cells)} |"

    marks = ["---" if i < table.num_text else "---:" for i in range(len(table.header))]
    rows = [line(table.header), f"| {' | '.join(marks)} |", *(line(row) for row in table.rows)]
    return f"{plain(table.caption)}\n\n" + "\n".join(rows)

"""The page as one HTML file without scripts or outside resources; every text is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from featcache.page.doc import (
    Block,
    Bullets,
    Code,
    Figure,
    Matrix,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from featcache.page.style import CSS
from featcache.page.svg import draw, legend_sign

# Nothing may be loaded or run, whatever slipped through.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MARKS = re.compile(re.escape(POLICY.encode()))
HOT = 0.5


def to_html(page: Page) -> str:
    """The whole file."""
    anchors = _anchors(page.sections)
    links = "\n".join(
        f'<a href="#{anchor}">{escape(section.title)}</a>'
        for section, anchor in zip(page.sections, anchors, strict=True)
        if section.level == 2
    )
    body = "\n".join(
        _section(section, anchor) for section, anchor in zip(page.sections, anchors, strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<h1>{escape(page.title)}</h1>
<p class="subtitle">{escape(page.subtitle)}</p>
<nav aria-label="Sections">
{links}
</nav>
</header>
{body}
<footer>Made by featcache. This file needs no network.</footer>
</main>
</body>
</html>
"""


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Names to link to, all different."""
    return [
        f"{re.sub(r'[^a-z0-9]+', '-', s.title.lower()).strip('-')[:40] or 'section'}-{number}"
        for number, s in enumerate(sections, start=1)
    ]


def _section(section: Section, anchor: str) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    heading = f"<h{section.level}>{escape(section.title)}</h{section.level}>"
    return f'<section id="{anchor}">\n{heading}\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Text():
            html = f"<p{' class=note' if block.note else ''}>{escape(block.text)}</p>"
        case Bullets():
            items = "\n".join(f"<li>{escape(item)}</li>" for item in block.items)
            html = f"<ul{' class=lead' if block.lead else ''}>\n{items}\n</ul>"
        case Table():
            html = _table(block)
        case Figure():
            html = _figure(block)
        case Matrix():
            html = _matrix(block)
        case Pictures():
            html = _pictures(block)
        case Code():
            html = f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>'
    return html


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{' class=num' if i >= table.num_text else ''}>{escape(text)}</{tag}>"
            for i, text in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    wordy = ' class="wordy"' if table.num_text == len(table.header) else ""
    return (
        f"{_box(table.caption)}\n<table{wordy}>\n"
        f"<thead><tr>{cells(table.header, 'th')}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _box(caption: str) -> str:
    """The start of a box that scrolls, its caption above; reachable by keyboard."""
    label = escape(caption, quote=True)
    return (
        f'<p class="caption">{escape(caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    )


def _figure(figure: Figure) -> str:
    names = "\n".join(
        f"<li>{legend_sign(series.style)}<span>{escape(series.name)}</span></li>"
        for series in figure.series
        if series.points
    )
    return (
        f'<figure>\n<ul class="legend" aria-label="Lines">\n{names}\n</ul>\n'
        f"{draw(figure, 'wide')}\n{draw(figure, 'narrow')}\n"
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"
        f"<details>\n<summary>The numbers as a table</summary>\n{_table(figure.table)}\n</details>"
    )


def _matrix(matrix: Matrix) -> str:
    """A heat map that is a table: shade is the share of the true class's images."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in matrix.names)
    rows = []
    for true, (name, counts) in enumerate(zip(matrix.names, matrix.counts, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(
            _cell(count, count / total, on_diagonal=true == predicted)
            for predicted, count in enumerate(counts)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body = "\n".join(rows)
    return (
        f'{_box(matrix.caption)}\n<table class="matrix">\n'
        f"<thead><tr><td class=none>true ↓ predicted →</td>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _cell(count: int, share: float, *, on_diagonal: bool) -> str:
    shade = 0.9 * share**0.7  # so that few confusions are visible beside many right answers
    kinds = [
        name
        for name, holds in (("right", on_diagonal), ("hot", shade > HOT), ("none", count == 0))
        if holds
    ]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<td{kind} style="--a:{shade:.2f}">{count if count else "·"}</td>'


def _pictures(pictures: Pictures) -> str:
    items = "\n".join(_picture(item) for item in pictures.items)
    return f'<p>{escape(pictures.caption)}</p>\n<ul class="pictures">\n{items}\n</ul>'


def _picture(item: Picture) -> str:
    data = base64.b64encode(item.jpeg).decode()
    lines = "<br>".join(escape(line) for line in item.lines)
    alt = escape(item.alt, quote=True)
    return f'<li><img src="data:image/jpeg;base64,{data}" alt="{alt}">{lines}</li>'

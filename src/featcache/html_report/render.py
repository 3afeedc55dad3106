"""From a page's parts to HTML and Markdown; every text is escaped unless it was made here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context, select_autoescape
from jinja2.nodes import EvalContext

from featcache.html_report.doc import Page

# What the templates write into every page, by which one is known.
HTML_MARKS = re.compile(rb"default-src 'none'; img-src data:; style-src 'unsafe-inline'")
MARKDOWN_MARKS = re.compile(rb"^The same with figures and pictures: ", re.MULTILINE)


def to_html(page: Page) -> str:
    """The page as one HTML file without scripts or outside resources."""
    return environment().get_template("page.html").render(page=page)


def to_markdown(page: Page, html_name: str) -> str:
    """The page as Markdown: the same words and tables; charts are their tables.

    Args:
        page: What to write.
        html_name: Name of the HTML page, for the charts.
    """
    template = environment().get_template("page.md")
    return template.render(page=page, html_name=html_name)


@cache
def environment() -> Environment:
    """HTML templates escape what they print for HTML, others for Markdown."""
    made = Environment(
        loader=PackageLoader("featcache.html_report"),
        autoescape=select_autoescape(["html"]),
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"fenced": fenced, "shade": shade}
    return made


@pass_eval_context
def _finalize(context: EvalContext, value: Any) -> Any:
    """What a template prints of a value: for Markdown, escaped unless marked as safe."""
    safe = context.autoescape or hasattr(value, "__html__")
    return value if safe else plain(str(value))


def plain(text: str) -> str:
    """A text that Markdown leaves as it is: on one line, nothing in it is markup."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", flat)


def fenced(text: str) -> str:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}console\n{text}\n{fence}"


def shade(count: int, row: Sequence[int]) -> float:
    """How dark a cell of a matrix is, so that few confusions show beside many right answers."""
    share = count / max(sum(row), 1)
    return 0.9 * float(share**0.7)

"""From a page to HTML and Markdown; every text is escaped unless it was made here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from featcache.html_report.page import Page
from featcache.results.plots import legend_svg

# What the templates write into every page, and 0.1.0 wrote; by it, a page may be replaced.
HTML_MARKS = re.compile(rb"default-src 'none'; img-src data:; style-src 'unsafe-inline'")
MARKDOWN_MARKS = re.compile(
    rb"^(The same with figures and pictures|With figures and images): ", re.MULTILINE
)


def to_html(page: Page) -> str:
    """The page as one HTML file without scripts or outside resources."""
    return _environment("html").get_template("page.jinja").render(page=page)


def to_markdown(page: Page, html_name: str) -> str:
    """The page as Markdown: the same words and tables; charts are their tables.

    Args:
        page: What to write.
        html_name: Name of the HTML page, for the charts.
    """
    template = _environment("markdown").get_template("page.jinja")
    return re.sub(r"\n{3,}", "\n\n", template.render(page=page, html_name=html_name))


@cache
def _environment(form: Literal["html", "markdown"]) -> Environment:
    """Templates of one format, with those that both share.

    Both escape what they print unless it is safe markup: HTML as jinja2 does; for Markdown,
    `markdown` makes it safe first.
    """
    package = "featcache.html_report"
    finalize: Callable[[Any], Any] | None = _markdown if form == "markdown" else None
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, f"templates/{form}"), PackageLoader(package)]),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "fenced": fenced,
        "flat": flat,
        "legend_svg": legend_svg,
        "shade": shade,
    }
    return environment


def _markdown(value: Any) -> Markup:
    """What a template prints of a value: escaped unless it is safe already."""
    return value if isinstance(value, Markup) else _safe(plain(str(value)))


def _safe(text: str) -> Markup:
    return Markup(text)  # noqa: S704 - callers have escaped it


def plain(text: str) -> str:
    """A text that Markdown leaves as it is: on one line, nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


def flat(markup: Markup) -> Markup:
    """Safe markup on one line, so that templates may break theirs."""
    return _safe(" ".join(markup.split()))


def fenced(text: str) -> Markup:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _safe(f"{fence}console\n{text}\n{fence}")


def shade(count: int, row: Sequence[int]) -> float:
    """How dark a cell of a matrix is, so that few confusions show beside many right answers."""
    share = count / max(sum(row), 1)
    return 0.9 * float(share**0.7)

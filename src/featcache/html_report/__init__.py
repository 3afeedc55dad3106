"""`featcache report`: one HTML page, and the same in Markdown, from the reports of runs."""

from __future__ import annotations

from typing import Any

from featcache.config import ReportConfig
from featcache.files import check_outputs, write_atomically
from featcache.html_report.build import build_page
from featcache.html_report.read import read_runs
from featcache.html_report.render import HTML_MARKS, MARKDOWN_MARKS, to_html, to_markdown

__all__ = ["summary_lines", "write_report"]


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Read reports and write the page.

    Args:
        config: The command's settings.

    Returns:
        What was written, as `--json` prints it.

    Raises:
        UserError: A file is no report, the dataset is not that of the runs, or the page would
            replace another's file.
        StorageError: The page could not be written.
    """
    markdown = config.output.with_suffix(".md")
    check_outputs({config.output: HTML_MARKS, markdown: MARKDOWN_MARKS}, config.runs)
    found = read_runs(config.runs)
    page, advice = build_page(found, config)
    # JSON and file names may hold halves of characters, which UTF-8 cannot.
    write_atomically(config.output, to_html(page).encode(errors="replace"))
    write_atomically(markdown, to_markdown(page, config.output.name).encode(errors="replace"))
    return {
        "command": "report",
        "html": str(config.output),
        "markdown": str(markdown),
        "num_files": found.num_files,
        "ignored": [str(path) for path in found.ignored],
        "sections": [section.title for section in page.sections],
        "advice": advice,
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The result for people."""
    ignored = report["ignored"]
    passed = f"; {len(ignored)} other .json files passed over" if ignored else ""
    return [
        *report["advice"],
        f"read {report['num_files']} report files{passed}",
        f"page: {report['html']}",
        f"Markdown: {report['markdown']}",
    ]

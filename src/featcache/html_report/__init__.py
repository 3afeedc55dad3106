"""`featcache report`: one HTML page, and the same in Markdown, from the reports of runs."""

from __future__ import annotations

from typing import TypedDict

from featcache.config import ReportConfig
from featcache.files import check_outputs, write_atomically
from featcache.html_report.page import make_page
from featcache.html_report.render import HTML_MARKS, MARKDOWN_MARKS, to_html, to_markdown
from featcache.html_report.report_files import read_report_files

__all__ = ["PageReport", "summary_lines", "write_report"]


class PageReport(TypedDict):
    """What `featcache report --json` prints."""

    command: str
    html: str
    markdown: str
    num_files: int
    ignored: list[str]
    sections: list[str]
    advice: list[str]


def write_report(config: ReportConfig) -> PageReport:
    """Read reports and write the page.

    Args:
        config: The command's settings.

    Returns:
        What was written, as `--json` prints it.

    Raises:
        UserError: A file is not a report, the dataset is not that of the runs, or the page would
            replace a file that this command did not write.
        StorageError: The page could not be written.
    """
    markdown = config.output.with_suffix(".md")
    check_outputs({config.output: HTML_MARKS, markdown: MARKDOWN_MARKS}, config.runs)
    files = read_report_files(config.runs)
    page = make_page(files, config)
    # JSON and file names may hold lone surrogates, which UTF-8 cannot encode.
    write_atomically(config.output, to_html(page).encode(errors="replace"))
    write_atomically(markdown, to_markdown(page, config.output.name).encode(errors="replace"))
    return {
        "command": "report",
        "html": str(config.output),
        "markdown": str(markdown),
        "num_files": files.num_files,
        "ignored": [str(path) for path in files.ignored],
        "sections": [section.title for section in page.sections],
        "advice": page.advice,
    }


def summary_lines(report: PageReport) -> list[str]:
    """The result for people."""
    num_files, skipped = report["num_files"], len(report["ignored"])
    tail = f"; skipped {skipped} other .json file{'s' if skipped > 1 else ''}" if skipped else ""
    return [
        *report["advice"],
        f"read {num_files} report file{'s' if num_files > 1 else ''}{tail}",
        f"page: {report['html']}",
        f"Markdown: {report['markdown']}",
    ]

"""Stage one: run the frozen backbone once and cache its features."""

from featcache.extract.extraction import ExtractReport, extract, summary_lines
from featcache.extract.maintenance import check, check_lines, inspect, inspect_lines

__all__ = [
    "ExtractReport",
    "check",
    "check_lines",
    "extract",
    "inspect",
    "inspect_lines",
    "summary_lines",
]

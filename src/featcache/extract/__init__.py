"""Stage one: run the frozen backbone once and cache its features."""

from featcache.extract.extraction import ExtractReport, extract, summary_lines
from featcache.extract.maintenance import (
    check,
    check_lines,
    inspect,
    inspect_lines,
    merge,
    merge_lines,
)
from featcache.extract.ranked import RankReport, extract_part, part_lines

__all__ = [
    "ExtractReport",
    "RankReport",
    "check",
    "check_lines",
    "extract",
    "extract_part",
    "inspect",
    "inspect_lines",
    "merge",
    "merge_lines",
    "part_lines",
    "summary_lines",
]

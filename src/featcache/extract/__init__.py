"""Stage one: run the frozen backbone once and cache its features."""

from featcache.extract.maintenance import check, check_lines, inspect, inspect_lines
from featcache.extract.request import cache_path, find_hit, wanted_meta
from featcache.extract.run import extract, summary_lines

__all__ = [
    "cache_path",
    "check",
    "check_lines",
    "extract",
    "find_hit",
    "inspect",
    "inspect_lines",
    "summary_lines",
    "wanted_meta",
]

"""Stage one: run the frozen backbone once and cache its features."""

from featcache.extract.request import cache_path, find_hit, wanted_meta
from featcache.extract.run import extract, summary_lines

__all__ = ["cache_path", "extract", "find_hit", "summary_lines", "wanted_meta"]

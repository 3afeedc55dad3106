"""`featcache compare`: cached head against full fine-tune at growing numbers of train images."""

from featcache.compare.comparison import compare, summary_lines

__all__ = ["compare", "summary_lines"]

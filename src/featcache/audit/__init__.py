"""`featcache audit`: what may be wrong with a cache's images, labels and splits."""

from featcache.audit.command import audit, summary_lines

__all__ = ["audit", "summary_lines"]

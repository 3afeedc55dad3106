"""The feature cache: one HDF5 file that says what it holds and proves it. docs/format.md."""

from featcache.cache.plan import SplitRows
from featcache.cache.reader import FeatureCache, FeatureSplit, read_meta
from featcache.cache.writer import CacheWriter, open_writer, part_path

__all__ = [
    "CacheWriter",
    "FeatureCache",
    "FeatureSplit",
    "SplitRows",
    "open_writer",
    "part_path",
    "read_meta",
]

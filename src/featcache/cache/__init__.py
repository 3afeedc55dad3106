"""The feature cache: one HDF5 file with metadata and checksums for all it holds. docs/format.md."""

from featcache.cache.cost import CostRecord, begin_cost, cost_of, finish_cost, spent_on
from featcache.cache.interop.dataset import FeatureDataset
from featcache.cache.layout import MARKS
from featcache.cache.lock import (
    HeldError,
    check_unlocked,
    lock_path,
    sole_writer,
    waiting_writer,
)
from featcache.cache.reader import FeatureCache, FeatureSplit
from featcache.cache.reuse import RowSource
from featcache.cache.schema import BLOCK_ROWS, MAX_DIM, SplitRows, label_texts
from featcache.cache.summary import CacheInfo, SkippedSample, begun_with, info, read_meta
from featcache.cache.verifier import VerifyReport, verify
from featcache.cache.writer import CacheWriter, open_writer, part_path, prepare_repair

__all__ = [
    "BLOCK_ROWS",
    "MARKS",
    "MAX_DIM",
    "CacheInfo",
    "CacheWriter",
    "CostRecord",
    "FeatureCache",
    "FeatureDataset",
    "FeatureSplit",
    "HeldError",
    "RowSource",
    "SkippedSample",
    "SplitRows",
    "VerifyReport",
    "begin_cost",
    "begun_with",
    "check_unlocked",
    "cost_of",
    "finish_cost",
    "info",
    "label_texts",
    "lock_path",
    "open_writer",
    "part_path",
    "prepare_repair",
    "read_meta",
    "sole_writer",
    "spent_on",
    "verify",
    "waiting_writer",
]

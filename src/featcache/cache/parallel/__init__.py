"""One cache written by several processes: in place on one machine, or as shards to be merged."""

from featcache.cache.parallel.claims import ClaimedWriter, join_writers
from featcache.cache.parallel.mounts import shared_disk
from featcache.cache.parallel.plan import Plan, Write
from featcache.cache.parallel.shards import (
    MERGING,
    copy_shards,
    join_shards,
    merge_if_last,
    merge_shards,
    num_in_shards,
    open_shard,
    remove_shards,
)
from featcache.cache.parallel.shares import Job, Share

__all__ = [
    "MERGING",
    "ClaimedWriter",
    "Job",
    "Plan",
    "Share",
    "Write",
    "copy_shards",
    "join_shards",
    "join_writers",
    "merge_if_last",
    "merge_shards",
    "num_in_shards",
    "open_shard",
    "remove_shards",
    "shared_disk",
]

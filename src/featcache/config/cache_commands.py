"""The settings of info, verify and merge, which take a cache that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from featcache.config.checks import check_range, check_types
from featcache.config.options import ImagePathsConfig, OutputConfig
from featcache.config.settings import settings
from featcache.errors import UserError

# --force replaces only files with these suffixes.
CACHE_SUFFIXES = (".h5", ".hdf5")


@settings
class InfoConfig(OutputConfig):
    """Show what a cache contains and how it was made."""

    cache: Path
    """A file written by extract-features."""

    def __post_init__(self) -> None:
        check_types(self)


@settings
class VerifyConfig(OutputConfig, ImagePathsConfig):
    """Check a cache's structure, checksums, labels, ids and value ranges, and name damaged rows."""

    cache: Path
    """A file written by extract-features."""
    repair: bool = False
    """Compute damaged blocks again; needs --dataset."""
    dataset: Optional[str] = None
    """For --repair: the dataset that the cache was made from."""
    weights: Optional[str] = None
    """For --repair: the weights file, if the cache was made with one."""
    seed: int = 42
    """For --repair: the seed that the cache was made with."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.dataset is not None and not self.repair:
            raise UserError("--dataset is for --repair: leave it out, or add --repair")


@settings
class MergeConfig(OutputConfig):
    """Merge the shards that several ranks of extract-features wrote into one cache.

    The last rank does so by itself. Rerun the same command to resume an interrupted merge.
    """

    cache: Path
    """The cache's name without .shard-…; its shards and its plan lie beside it."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.cache.suffix.lower() not in CACHE_SUFFIXES:
            raise UserError(
                f"{self.cache} is no cache's name: give the one that ends in .h5, without .shard-…"
            )

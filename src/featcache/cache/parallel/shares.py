"""Which blocks each of several processes owns, and the shard files that hold them."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.cache.schema import BLOCK_ROWS, SplitRows, num_blocks
from featcache.config import CacheMeta


@dataclasses.dataclass(frozen=True, order=True)
class Share:
    """Part number `index`, from 0, of `size` equal parts of a cache: neighboring blocks."""

    index: int
    size: int

    def blocks(self, num_rows: Mapping[str, int]) -> dict[str, range]:
        """Numbers of its blocks in each split that has any of them.

        Args:
            num_rows: Rows of each split, in the order of the file.
        """
        total = sum(map(num_blocks, num_rows.values()))
        start, stop = (total * i // self.size for i in (self.index, self.index + 1))
        found, first = {}, 0
        for split, rows in num_rows.items():
            here = num_blocks(rows)
            low, high = max(start - first, 0), min(stop - first, here)
            if low < high:
                found[split] = range(low, high)
            first += here
        return found


WHOLE = Share(0, 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """A rank's part of writing the cache NAME.h5.

    Attributes:
        path: The finished cache's path.
        meta: What the rows are made with.
        class_names: C names; labels index them.
        splits: Every row of every split of the whole cache.
        share: The rank's blocks.
    """

    path: Path
    meta: CacheMeta
    class_names: Sequence[str]
    splits: Sequence[SplitRows]
    share: Share

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each split of the whole cache."""
        return {split.name: len(split.ids) for split in self.splits}

    @property
    def rank(self) -> str:
        """For messages."""
        return f"rank {self.share.index} of {self.share.size}"


def rows_of(splits: Sequence[SplitRows], blocks: Mapping[str, range]) -> list[SplitRows]:
    """The rows of some blocks."""
    return [
        _slice(split, slice(found.start * BLOCK_ROWS, found.stop * BLOCK_ROWS))
        for split in splits
        if (found := blocks.get(split.name)) is not None
    ]


def _slice(split: SplitRows, rows: slice) -> SplitRows:
    columns: dict[str, Any] = {f.name: getattr(split, f.name) for f in dataclasses.fields(split)}
    whole = ("name", *(name for name, values in columns.items() if values is None))
    return SplitRows(**{k: v if k in whole else v[rows] for k, v in columns.items()})


def shard_path(path: Path, share: Share) -> Path:
    """Where a finished shard of the cache NAME.h5 is: NAME.h5.shard-00003-of-00016."""
    return path.with_name(f"{path.name}.shard-{share.index:05d}-of-{share.size:05d}")


def shards_of(path: Path) -> dict[Share, Path]:
    """The shard files of a cache, finished or else unfinished, in order."""
    name = re.compile(r".*\.shard-(\d{5})-of-(\d{5})(\.part)?", re.DOTALL)
    found: dict[Share, Path] = {}
    for file in path.parent.glob(f"{glob.escape(path.name)}.shard-*-of-*"):
        match = name.fullmatch(file.name)
        share = Share(int(match[1]), int(match[2])) if match else None
        # Not an unfinished one beside a finished one.
        if (
            share
            and share.index < share.size
            and (file == (shard := shard_path(path, share)) or not shard.exists())
        ):
            found[share] = file
    return dict(sorted(found.items()))

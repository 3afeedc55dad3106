"""Several ranks write one file on one machine's disk, each the blocks that it has claimed.

A claim is a lock on a byte that stands for the block, so it ends with its process. If nothing is
written for LEASE_S, a claim counts as that of a rank that hangs, and others compute its blocks too:
the same rows, so it does no harm if that rank resumes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.create import CacheSpec, check_contents, create_part
from featcache.cache.fileio import read_at, reading, sync, write_at
from featcache.cache.lock import Lock, join, pause
from featcache.cache.parallel.shards import remove_shards
from featcache.cache.parallel.shares import Job, Share
from featcache.cache.schema import BLOCK_ROWS, block_range, num_blocks
from featcache.cache.writer import CacheWriter, part_path
from featcache.display import say
from featcache.errors import StorageError, listed
from featcache.files import storage_errors

LEASE_S = 120.0


def join_writers(job: Job, *, helps: bool) -> ClaimedWriter | None:
    """Begin NAME.h5.part or join the ranks that are writing it.

    Args:
        job: The cache, and the blocks that this rank computes first.
        helps: Whether it then computes blocks of others, dead ones included.

    Returns:
        None if the cache is finished.

    Raises:
        CacheError: The unfinished file is of a different cache, or damaged.
        StorageError: A run that is no rank is writing it, or the file system refused.
    """
    path, part = job.path, part_path(job.path)
    spec = check_contents(job.meta, job.class_names, job.splits)
    while True:
        lock = join(path, job.rank)
        try:
            if path.exists():
                remove_shards(path)
                lock.release()
                return None
            if not lock.shared and not os.path.lexists(part):
                create_part(part, spec)
            if os.path.lexists(part):
                return ClaimedWriter(path, spec, lock, job.share, helps=helps)
        except BaseException:
            lock.release()
            raise
        # The rank that was first died before it had laid out the file.
        lock.release()
        pause()


class ClaimedWriter(CacheWriter):
    """Writes some blocks of a file that other ranks write, too; see `join_writers`.

    Attributes:
        is_first: Whether no other rank was there when this one came.
    """

    def __init__(
        self, path: Path, spec: CacheSpec, lock: Lock, share: Share, *, helps: bool
    ) -> None:
        super().__init__(path, spec, lock)
        self.is_first, self._helps, self._overdue = not lock.shared, helps, False
        self._num_rows = self.layout.all_num_rows()
        self._own = share.blocks(self._num_rows)
        if self.is_first:
            self._clear_wrong_marks()
            lock.share()

    def _clear_wrong_marks(self) -> None:
        """Unmark the blocks that fail their checksums, so that marks alone count from now on."""
        with storage_errors(self._part):
            for split, done in self._done.items():
                marks = self._marks(split)
                for block in np.flatnonzero((marks != 0) & ~done).tolist():
                    write_at(self._fd, b"\0", self.layout.extents[f"{split}/state"].offset + block)
            sync(self._fd)

    def _marks(self, split: str) -> npt.NDArray[np.uint8]:
        extent = self.layout.extents[f"{split}/state"]
        with reading(self._part):
            return np.frombuffer(read_at(self._fd, extent.num_bytes, extent.offset), np.uint8)

    def num_written(self) -> int:
        """Rows that are written by now, by all ranks."""
        for split in self._done:
            self._done[split] |= self._marks(split) == 1
        return sum(map(self._rows_done, self._done))

    def turns(self) -> Iterator[bool]:
        """Rounds of taking blocks: first the rank's own, then, if it helps, whatever is left.

        Yields:
            Whether to take others' blocks; for `take`.
        """
        yield False
        if self._helps:
            yield True
            while self._wait_for_others():
                yield True

    def take(self, split: str, *, others: bool) -> Iterator[range]:
        """Claim blocks one by one, as they are asked for; ends when there is none to claim.

        Args:
            split: The split's name.
            others: Take blocks of others, beginning after its own.
        """
        self.num_written()
        own = self._own.get(split, range(0))
        everything = len(self._done[split])
        after = itertools.chain(range(own.stop, everything), range(own.stop))
        for block in after if others else own:
            if self._done[split][block] or not (self._claim(split, block) or self._overdue):
                continue
            if self._marks_one(split, block):  # by another rank, before this one's claim
                self._done[split][block] = True
                self._lock.unclaim(self._number(split, block))
            else:
                yield block_range(block, self._num_rows[split])

    def _marks_one(self, split: str, block: int) -> bool:
        with reading(self._part):
            at = self.layout.extents[f"{split}/state"].offset + block
            return read_at(self._fd, 1, at) == b"\1"

    def _number(self, split: str, block: int) -> int:
        """A block's number among those of all splits."""
        before = self.layout.splits[: self.layout.splits.index(split)]
        return sum(num_blocks(self._num_rows[name]) for name in before) + block

    def _claim(self, split: str, block: int) -> bool:
        with storage_errors(self._part):
            return self._lock.claim(self._number(split, block))

    def write_block(self, split: str, rows: range, features: Any, row_status: Any) -> None:
        """As `CacheWriter.write_block`; the block need not be claimed any longer."""
        super().write_block(split, rows, features, row_status)
        self._lock.unclaim(self._number(split, rows.start // BLOCK_ROWS))

    def missing(self) -> list[tuple[str, int]]:
        """Split and number of every block that no rank has written."""
        self.num_written()
        return [
            (split, block)
            for split, done in self._done.items()
            for block in np.flatnonzero(~done).tolist()
        ]

    def _wait_for_others(self) -> bool:
        """Wait while others compute the last blocks; True when there is a block to take again."""
        since, before = time.monotonic(), -1
        while left := self.missing():
            if self._overdue:
                return True
            for place in left:
                if self._claim(*place):
                    self._lock.unclaim(self._number(*place))
                    return True
            if len(left) != before:
                since, before = time.monotonic(), len(left)
            elif time.monotonic() - since > LEASE_S:
                say(f"{_blocks_text(left)}: nothing written for {LEASE_S:.0f} s, computed here too")
                self._overdue = True
            pause()
        return False

    def leave(self) -> Path | None:
        """Finish the file if every block is written and no other rank is at work; else leave it.

        Returns:
            The path of the finished cache; None where other ranks, or another run, have to go on.

        Raises:
            StorageError: Every block is written, but a rank hangs and holds the file; or as
                `CacheWriter.finish`.
        """
        end = time.monotonic() + LEASE_S
        while not self._lock.alone():
            if self.missing() or self._lock.locked_out():  # by the rank that finishes it
                return None
            if time.monotonic() > end:
                raise StorageError(
                    f"{self._part}: every block is written, but another rank has not ended for "
                    f"{LEASE_S:.0f} s: end it, then run the same command once more to finish"
                )
            pause()
        if self.missing() or not self._is_mine():
            return None
        return self.finish()

    def _is_mine(self) -> bool:
        """Whether the file still has its name: another rank may just have finished it."""
        try:
            return os.path.samestat(os.stat(self._part), os.fstat(self._fd))
        except FileNotFoundError:
            return False


def _blocks_text(blocks: Sequence[tuple[str, int]]) -> str:
    names = listed([f"{split}/{block}" for split, block in blocks], 3)
    return f"block{'s' if len(blocks) > 1 else ''} {names}"

"""Writing a cache so that a kill at any moment loses at most one block and tells no lie.

The file is laid out whole as NAME.h5.part; then every block is features, then checksum, then mark.
A mark is believed only where the checksum fits, so the order in which a dying machine wrote its
pages does not matter. NAME.h5 appears by one rename after everything was checked again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featcache.cache import layout as form
from featcache.cache.create import create_part
from featcache.cache.fileio import sha256_of, sync, sync_folder, write_at
from featcache.cache.layout import block_crc, block_range
from featcache.cache.lock import Lock, locked
from featcache.cache.plan import Plan, SplitRows, make_plan
from featcache.cache.reader import FeatureCache, meta_of
from featcache.cache.reuse import RowSource, describe_differences, setting_differences
from featcache.cache.storage import CacheFile
from featcache.config import CacheMeta
from featcache.errors import CacheError, StorageError, UserError
from featcache.files import storage_errors

SYNC_BLOCKS = 8
SYNC_SECONDS = 10.0


def part_path(path: Path) -> Path:
    """Where a cache is while it is not finished."""
    return path.with_name(path.name + ".part")


def open_writer(
    path: Path,
    meta: CacheMeta,
    class_names: Sequence[str],
    splits: Sequence[SplitRows],
    *,
    force: bool = False,
    reuse: FeatureCache | None = None,
) -> CacheWriter:
    """Begin a cache, or go on with NAME.h5.part where it stopped.

    Args:
        path: The finished cache's path, NAME.h5.
        meta: What the rows are made with.
        class_names: C names; labels index them.
        splits: Every row of every split.
        force: Start afresh, whatever is there; an existing NAME.h5 is replaced at the end.
        reuse: Keep this older cache's rows of samples with the same content (usually the cache at
            `path`, which is replaced at the end); rows of an unfinished update are kept too.

    Raises:
        UserError: Something that a cache cannot hold, or no room on the disk.
        CacheError: There is a finished cache, or an unfinished one of something else.
        StorageError: Another run is writing it, or the file system refused.
    """
    plan = make_plan(meta, class_names, splits)
    with locked(path) as lock:
        part = part_path(path)
        sources = [] if reuse is None else [reuse.file]
        if force:
            with storage_errors(part):
                part.unlink(missing_ok=True)
        elif path.exists() and reuse is None:
            raise CacheError(f"{path} exists: give --force to replace it, or another --output")
        elif sources and (stale := _stale_part(part, plan)):
            sources.append(stale)
        source = RowSource(sources, meta)
        if len(sources) > 1:  # checked, and stays readable without its name
            with storage_errors(part):
                part.unlink()
        if not os.path.lexists(part):
            create_part(part, plan)
        return CacheWriter(path, plan, lock, source)


def _stale_part(part: Path, plan: Plan) -> CacheFile | None:
    """The unfinished file if it was begun for other images with the same settings."""
    if not os.path.lexists(part):
        return None
    file = CacheFile(part)
    try:
        check_same(file, plan)
    except CacheError:
        if setting_differences(meta_of(file), plan.meta):
            raise
        return file
    return None


class CacheWriter:
    """Writes the blocks of NAME.h5.part in any order; leaves a valid .part whatever happens.

    Use as a context manager, so that the lock is released.

    Attributes:
        path: The finished cache's path.
        num_resumed: Rows of each split that an earlier run had written.
        num_reused: Other rows of each split that an older cache has and that need no computing.
    """

    def __init__(self, path: Path, plan: Plan, lock: Lock, source: RowSource) -> None:
        self.path, self._part, self._plan, self._lock = path, part_path(path), plan, lock
        file = CacheFile(self._part)
        try:
            self.layout = file.layout
            check_same(file, plan)
            self._done = {split: file.good_blocks(split) for split in self.layout.splits}
        finally:
            file.close()
        with storage_errors(self._part):
            self._fd = os.open(self._part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._unsynced, self._synced_at = 0, time.monotonic()
        self.num_resumed = {split: self._rows_done(split) for split in self.layout.splits}
        self._source = source
        try:
            self.num_reused = {split: self._copy_reused(split) for split in self.layout.splits}
        except BaseException:
            os.close(self._fd)
            raise

    def _rows_done(self, split: str) -> int:
        num = self.layout.num_rows(split)
        return sum(len(block_range(int(b), num)) for b in np.flatnonzero(self._done[split]))

    def pending(self, split: str) -> list[range]:
        """Row ranges of the blocks that are not written yet, in order."""
        num = self.layout.num_rows(split)
        return [block_range(int(b), num) for b in np.flatnonzero(~self._done[split])]

    def _find_reused(self, split: str, rows: range) -> npt.NDArray[np.int64]:
        return self._source.find(self._plan.arrays[f"{split}/content"][rows.start : rows.stop])

    def _copy_reused(self, split: str) -> int:
        """Write the blocks of which every row is there; returns the rows found in all blocks."""
        found = 0
        for rows in self.pending(split) if len(self._source) else ():
            mask, features = self.reused_rows(split, rows)
            found += int(mask.sum())
            if mask.all():
                self.write_block(split, rows, features, np.zeros(len(rows), np.uint8))
        return found

    def is_reused(self, split: str, rows: range) -> npt.NDArray[np.bool_]:
        """Which rows an older cache has: [n]."""
        return self._find_reused(split, rows) >= 0

    def reused_rows(
        self, split: str, rows: range
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Rows that an older cache has.

        Returns:
            Which rows, [n]; and features [V, n, D], float32, zeros where there is none.
        """
        num_views, _, dim = self.layout.extents[f"{split}/features"].shape
        features = np.zeros((num_views, len(rows), dim), np.float32)
        places = self._find_reused(split, rows)
        found = places >= 0
        if found.any():
            features[:, found] = self._source.fetch(places[found])
        return found, features

    def write_block(
        self,
        split: str,
        rows: range,
        features: npt.NDArray[np.float32],
        row_status: npt.NDArray[np.uint8],
    ) -> None:
        """Write one block.

        Args:
            split: The split's name.
            rows: One of the ranges that `pending` gave.
            features: [V, n, D], float32; rows that were skipped are stored as zeros.
            row_status: [n], uint8: 0 for a good row, else why it was skipped (data.REASONS).

        Raises:
            UserError: A feature is not finite, or too large for the cache's dtype.
            StorageError: The file system refused; what was written before stays.
        """
        block = rows.start // form.BLOCK_ROWS
        extents = self.layout.extents
        whole = extents[f"{split}/features"]
        assert rows == block_range(block, whole.shape[1]), "one whole block at a time"
        status = np.ascontiguousarray(row_status, np.uint8)
        assert features.shape == (whole.shape[0], len(rows), whole.shape[2])
        assert status.shape == (len(rows),)
        stored = self._stored(split, rows, features, status)
        with storage_errors(self._part):
            row_bytes = stored[0, 0].nbytes
            for view, data in enumerate(stored):
                at = whole.offset + (view * whole.shape[1] + rows.start) * row_bytes
                write_at(self._fd, data, at)
            write_at(self._fd, status, extents[f"{split}/row_status"].offset + rows.start)
            crc = block_crc(split, block, stored, status)
            write_at(
                self._fd, crc.to_bytes(4, "little"), extents[f"{split}/crc32"].offset + 4 * block
            )
            write_at(self._fd, b"\1", extents[f"{split}/state"].offset + block)
            self._sync_sometimes()
        self._done[split][block] = True

    def _stored(
        self, split: str, rows: range, features: npt.NDArray[Any], status: npt.NDArray[np.uint8]
    ) -> npt.NDArray[Any]:
        """The block in the file's dtype, checked."""
        good = status == 0
        dtype = self.layout.extents[f"{split}/features"].dtype
        with np.errstate(over="ignore"):
            stored = np.where(good[None, :, None], features, 0).astype(dtype, order="C")
        finite = np.isfinite(stored).all(axis=(0, 2))
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            name = self._plan.arrays[f"{split}/ids"][rows.start + row].decode()
            if np.isfinite(features[:, row]).all():
                raise UserError(
                    f"a feature of {name!r} ({split}) does not fit into float16: "
                    "give --dtype float32"
                )
            raise UserError(
                f"the features of {name!r} ({split}) are not finite: the weights do not fit this "
                "network or its precision; try --precision float32 or other --weights"
            )
        return stored

    def _sync_sometimes(self) -> None:
        """Bound what a power cut can undo."""
        self._unsynced += 1
        if self._unsynced >= SYNC_BLOCKS or time.monotonic() - self._synced_at > SYNC_SECONDS:
            sync(self._fd)
            self._unsynced, self._synced_at = 0, time.monotonic()

    def finish(self) -> Path:
        """Check the whole file again, then give it its name.

        Returns:
            The path of the finished cache.

        Raises:
            StorageError: The file system refused or the disk did not keep what was written; run
                again and only what was lost is computed.
        """
        assert not any(self.pending(split) for split in self.layout.splits), "blocks are missing"
        with storage_errors(self._part):
            os.fsync(self._fd)
            digest = sha256_of(self._fd, self.layout.digested())
            write_at(self._fd, digest, self.layout.extents["digest"].offset)
            os.fsync(self._fd)
        try:
            FeatureCache(self._part, _unfinished=True).check()
        except CacheError as error:
            raise StorageError(
                f"{self._part}: the disk does not hold what was written ({error}); "
                "run the same command again"
            ) from error
        with storage_errors(self.path):
            os.replace(self._part, self.path)
            sync_folder(self.path.parent)
        self.close()
        return self.path

    def close(self) -> None:
        """Have what was written on the disk and let others write; does nothing the second time."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            with storage_errors(self._part):
                try:
                    sync(fd)
                finally:
                    os.close(fd)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_same(file: CacheFile, plan: Plan) -> None:
    """Check that an unfinished file was begun for exactly this plan.

    Raises:
        CacheError: It was begun for something else (the fields are named), or is damaged.
    """
    name = f"{file.path} was begun with other"
    fresh = "run the earlier command to finish it, or give --force to start afresh"
    if damaged := file.damaged_parts():
        raise CacheError(
            f"{file.path} is damaged in {', '.join(damaged)}: give --force to start afresh"
        )
    if differences := meta_of(file).differences(plan.meta):
        raise CacheError(f"{name} settings: {describe_differences(differences)}; {fresh}")
    here = {n: (e.dtype, e.shape, e.sha256) for n, e in file.layout.extents.items()}
    there = {n: (e.dtype, e.shape, e.sha256) for n, e in plan.members.items()}
    differ = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if differ:
        raise CacheError(f"{name} {', '.join(differ)}; {fresh}")

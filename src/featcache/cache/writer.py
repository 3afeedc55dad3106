"""Writing a cache so that a kill at any moment loses at most one block and corrupts none.

The file is laid out whole as NAME.h5.part; then every block is features, then checksum, then mark.
A mark counts only if the checksum is right, so the order in which a crashing machine wrote its
pages does not matter. NAME.h5 appears by one rename after everything has been checked again.
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

from featcache.cache.create import CacheSpec, check_contents, create_part
from featcache.cache.fileio import sha256_of, sync, sync_folder, write_at
from featcache.cache.layout import RECREATE, block_crc
from featcache.cache.lock import Lock, locked
from featcache.cache.reader import FeatureCache
from featcache.cache.reuse import RowSource, check_same, setting_differences
from featcache.cache.schema import BLOCK_ROWS, SplitRows, block_range
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
    lock: Lock | None = None,
) -> CacheWriter:
    """Begin a cache, or resume NAME.h5.part where it stopped.

    Args:
        path: The finished cache's path, NAME.h5.
        meta: What the rows are made with.
        class_names: C names; labels index them.
        splits: Every row of every split.
        force: Start over and discard any NAME.h5.part; an existing NAME.h5 is replaced at the end.
        reuse: Keep this older cache's rows of samples with the same content (usually the cache at
            `path`, which is replaced at the end); rows of an unfinished update are kept too.
        lock: The lock on `path`, where the caller has it already; released on an error.

    Raises:
        UserError: A value that a cache cannot hold, or no space on the disk.
        CacheError: There is a finished cache, or an unfinished one begun for a different one.
        StorageError: Another run is writing it, or the file system refused.
    """
    spec = check_contents(meta, class_names, splits)
    with locked(path, lock) as held:
        part = part_path(path)
        sources = [] if reuse is None else [reuse.file]
        if force:
            with storage_errors(part):
                part.unlink(missing_ok=True)
        elif path.exists() and reuse is None:
            raise CacheError(f"{path} exists: give --force to replace it, or another --output")
        elif sources and (stale := _stale_part(part, spec)):
            sources.append(stale)
        source = RowSource(sources, meta)
        if len(sources) > 1:  # checked, and stays readable without its name
            with storage_errors(part):
                part.unlink()
        if not os.path.lexists(part):
            create_part(part, spec)
        return CacheWriter(path, spec, held, source)


def _stale_part(part: Path, spec: CacheSpec) -> CacheFile | None:
    """The unfinished file if it was begun for other images with the same settings."""
    if not os.path.lexists(part):
        return None
    file = CacheFile(part)
    try:
        check_same(file, spec)
    except CacheError:
        if setting_differences(file.meta, spec.meta):
            raise
        return file
    return None


def prepare_repair(path: Path) -> CacheWriter:
    """Begin a sound copy of a damaged cache, or resume one; `finish` puts it in its place.

    Everything but features must be sound. The HDF5 library's own bytes are rewritten.

    Args:
        path: A finished cache, NAME.h5. It stays as it is until the copy is whole.

    Returns:
        A writer whose `pending` blocks are the damaged ones.

    Raises:
        CacheError: Labels, ids or other data of the rows are damaged too, so features cannot be
            matched to samples; or an unfinished file of a different cache is in the way.
        StorageError: Another run is writing it, or the file system refused.
    """
    file = CacheFile(path)
    if damaged := file.damaged_datasets():
        raise CacheError(
            f"{path} cannot be repaired: {', '.join(damaged)} are damaged, not only features; "
            f"{RECREATE}"
        )
    try:
        rows = [file.rows(split) for split in file.layout.splits]
        spec = check_contents(file.meta, file.class_names, rows)
    except CacheError:
        raise
    except UserError as error:
        raise CacheError(f"{path} is not a valid cache: {error}") from None
    with locked(path) as lock:
        part = part_path(path)
        if not os.path.lexists(part):
            create_part(part, spec)
        writer = CacheWriter(path, spec, lock)
        try:
            _copy_good_blocks(file, writer)
        except BaseException:
            writer.close()
            raise
        return writer


def _copy_good_blocks(file: CacheFile, writer: CacheWriter) -> None:
    for split in file.layout.splits:
        good = file.good_blocks(split)
        status = file.array(f"{split}/row_status")
        for rows in writer.pending(split):
            if good[rows.start // BLOCK_ROWS]:
                features = file.all_views(split, rows)
                writer.write_block(split, rows, features, status[rows.start : rows.stop])


class CacheWriter:
    """Writes the blocks of NAME.h5.part in any order; leaves a valid .part whatever happens.

    Use as a context manager, so that the lock is released.

    Attributes:
        path: The finished cache's path.
        spec: What it holds but for the features.
        num_resumed: Rows of each split that an earlier run had written.
        num_reused: Other rows of each split that an older cache has and that need no computing.
        sync_blocks: After how many blocks they are forced to the disk.
        first_rows: In a shard, the row of the whole cache that is the first of each split here.
    """

    def __init__(
        self, path: Path, spec: CacheSpec, lock: Lock, source: RowSource | None = None
    ) -> None:
        self.path, self.spec = path, spec
        self._part, self._lock = part_path(path), lock
        file = CacheFile(self._part)
        try:
            self.layout = file.layout
            check_same(file, spec)
            # The rank that was first has compared marks and checksums for the others.
            find = file.marked_blocks if lock.shared else file.good_blocks
            self._done = {split: find(split) for split in self.layout.splits}
        finally:
            file.close()
        with storage_errors(self._part):
            self._fd = os.open(self._part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._unsynced, self._synced_at = 0, time.monotonic()
        self.sync_blocks = SYNC_BLOCKS
        self.first_rows: dict[str, int] = {}
        self.num_resumed = {split: self._rows_done(split) for split in self.layout.splits}
        self._source = RowSource([], spec.meta) if source is None else source
        try:
            self.num_reused = {split: self._copy_reused(split) for split in self.layout.splits}
        except BaseException:
            os.close(self._fd)
            raise

    def _rows_done(self, split: str) -> int:
        num = self.layout.num_rows(split)
        return sum(len(block_range(int(b), num)) for b in np.flatnonzero(self._done[split]))

    def pending(self, split: str, among: range | None = None) -> list[range]:
        """Row ranges of the blocks, or of those `among` these, that are not written, in order."""
        num, done = self.layout.num_rows(split), self._done[split]
        blocks = among or range(len(done))
        left = blocks.start + np.flatnonzero(~done[blocks.start : blocks.stop])
        return [block_range(int(b), num) for b in left]

    def _find_reused(self, split: str, rows: range) -> npt.NDArray[np.int64]:
        return self._source.find(self.spec.arrays[f"{split}/content"][rows.start : rows.stop])

    def _copy_reused(self, split: str) -> int:
        """Write the blocks whose every row was found; returns the rows found in all blocks."""
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
            Which rows, [n]; and features [V, n, D], float32, zeros for the others.
        """
        num_views, _, dim = self.layout.features(split).shape
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
        block = rows.start // BLOCK_ROWS
        extents = self.layout.extents
        whole = self.layout.features(split)
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
        dtype = self.layout.features(split).dtype
        with np.errstate(over="ignore"):
            stored = np.where(good[None, :, None], features, 0).astype(dtype, order="C")
        finite = np.isfinite(stored).all(axis=(0, 2))
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            name = self.spec.arrays[f"{split}/ids"][rows.start + row].decode()
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
        """Limit what a power cut can undo."""
        self._unsynced += 1
        if self._unsynced >= self.sync_blocks or time.monotonic() - self._synced_at > SYNC_SECONDS:
            sync(self._fd)
            self._unsynced, self._synced_at = 0, time.monotonic()

    def finish(self) -> Path:
        """Check the whole file again, then give it its name.

        Returns:
            The path of the finished cache.

        Raises:
            StorageError: The file system refused, or the disk did not keep what was written: rerun,
                and only what was lost is computed.
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
        """Force what was written to the disk and release the lock; does nothing the second time."""
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

"""Shard files: each rank writes an ordinary cache file of its own, and they are merged in the end.

For disks of several machines, whose clients write whole pages back: marks, checksums and short rows
of different ranks share pages there, so that writing one file in place would lose data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.lock import JOIN_S, HeldError, Lock, join
from featcache.cache.parallel.plan import Plan, plan_path
from featcache.cache.parallel.shares import WHOLE, Job, Share, rows_of, shard_path, shards_of
from featcache.cache.reuse import describe_differences
from featcache.cache.schema import BLOCK_ROWS, SplitRows, block_range
from featcache.cache.storage import CacheFile
from featcache.cache.writer import CacheWriter, open_writer, part_path
from featcache.config import CacheMeta
from featcache.display import progress
from featcache.errors import CacheError, listed
from featcache.files import storage_errors

COPY_SYNC_BLOCKS = 4096
"""A block that a power cut undoes is still in its shard."""
MERGING = "another rank merges"


def join_shards(job: Job) -> Lock | None:
    """Share the lock of the cache with the other ranks, so that other runs are kept out.

    Returns:
        None if there is nothing to do: this rank's shard is finished, and another rank merges.

    Raises:
        StorageError: A run that is no rank is writing the cache, or the file system refused.
    """
    is_done = shard_path(job.path, job.share).exists()
    try:
        lock = join(job.path, job.rank, 0.0 if is_done else JOIN_S)
    except HeldError as error:
        if is_done and error.by_rank:
            return None
        raise
    lock.share()
    return lock


def open_shard(job: Job) -> CacheWriter | None:
    """Begin a rank's shard file of the cache NAME.h5, or resume it.

    Blocks that an earlier run wrote, to a shard of another size or to NAME.h5.part, are copied.

    Returns:
        None if there is nothing to write: the shard or the cache is finished, or it has no blocks.

    Raises:
        CacheError: Another file of this job was made with different settings; it is named.
        StorageError: Another run is writing this shard, or the file system refused.
    """
    path, blocks, shard = job.path, job.share.blocks(job.num_rows), shard_path(job.path, job.share)
    if not blocks or path.exists():
        return None
    if shard.exists():
        _check_same(CacheFile(shard), job.meta)
        return None
    writer = open_writer(shard, job.meta, job.class_names, rows_of(job.splits, blocks))
    writer.first_rows = {split: place.start * BLOCK_ROWS for split, place in blocks.items()}
    earlier = {WHOLE: part_path(path)} if part_path(path).exists() else {}
    others = {s: file for s, file in shards_of(path).items() if s.size != job.share.size}
    try:
        _copy_all(writer, blocks, {**earlier, **others}, job.num_rows)
    except BaseException:
        writer.close()
        raise
    return writer


def copy_shards(writer: CacheWriter) -> None:
    """Copy the pending blocks of a whole cache from its shard files, finished or not.

    Raises:
        CacheError: A shard was made with different settings, or holds other rows; it is named.
        StorageError: The file system refused.
    """
    if shards := shards_of(writer.path):
        num_rows = writer.layout.all_num_rows()
        _copy_all(writer, WHOLE.blocks(num_rows), shards, num_rows)


def merge_shards(path: Path) -> None:
    """Put the shards of the cache NAME.h5 together, then remove them.

    An interrupted merge is resumed. Memory holds what is known of the rows, and one block.

    Raises:
        CacheError: There are no shards, some are missing, unfinished or damaged, or they were made
            with different settings; they are named.
        StorageError: A rank is still at work, or the file system refused.
    """
    plan, shards = Plan.read(path), shards_of(path)
    if plan is None or not shards:
        what = "shards" if plan else plan_path(path).name
        raise CacheError(f"no {what} beside {path}: give the cache's name, without .shard-…")
    # Of an earlier job with another number of ranks, some may be left.
    sizes = sorted({share.size for share in shards})
    size = min(sizes, key=lambda size: len(_without(size, plan.num_rows, shards)))
    _refuse_missing(path, _without(size, plan.num_rows, shards))
    files = [CacheFile(file) for share, file in shards.items() if share.size == size]
    for file in files:
        _check_same(file, plan.meta)
    splits = [_joined(files, split, num, path) for split, num in plan.num_rows.items()]
    with open_writer(path, plan.meta, files[0].class_names, splits) as writer:
        _finish(writer, size)


def merge_if_last(job: Job, lock: Lock) -> str | None:
    """Merge the shards if no other rank is at work and all shards are finished.

    Args:
        job: The cache, and the rank's part of it.
        lock: What the ranks share; it is released.

    Returns:
        None if the cache was finished here, else what has to happen.

    Raises:
        CacheError: Another shard was made with different settings, or is damaged.
        StorageError: The file system refused.
    """
    path, is_last = job.path, lock.alone()
    missing = unfinished_shards(path, job.share.size, job.num_rows)
    if is_last and not missing and not path.exists():
        with open_writer(path, job.meta, job.class_names, job.splits, lock=lock) as writer:
            _finish(writer, job.share.size)
        return None
    lock.release()
    if path.exists():
        remove_shards(path)
        return "the cache is finished"
    if not missing:
        return MERGING
    names = listed([str(each.index) for each in missing], 5)
    return (
        f"unfinished shards: {names}; the last of their ranks merges, or type featcache merge "
        f"{path}"
    )


def _finish(writer: CacheWriter, size: int) -> None:
    """Copy what `size` shards hold, finish the cache, and remove the shards."""
    copy_shards(writer)
    if any(writer.pending(split) for split in writer.layout.splits):
        missing = unfinished_shards(writer.path, size, writer.layout.all_num_rows())
        _refuse_missing(writer.path, missing)
    writer.finish()
    remove_shards(writer.path)


def num_in_shards(path: Path) -> int:
    """Rows that the shards of the cache NAME.h5 hold by now."""
    num = 0
    for file in shards_of(path).values():
        with contextlib.suppress(CacheError), contextlib.closing(CacheFile(file)) as shard:
            for split in shard.layout.splits:
                blocks = np.flatnonzero(shard.marked_blocks(split)).tolist()
                num += sum(len(block_range(b, shard.layout.num_rows(split))) for b in blocks)
    return num


def unfinished_shards(path: Path, size: int, num_rows: Mapping[str, int]) -> list[Share]:
    """The shards of a job of `size` ranks that are not finished yet."""
    finished = [share for share, file in shards_of(path).items() if file == shard_path(path, share)]
    return _without(size, num_rows, finished)


def remove_shards(path: Path) -> None:
    """Remove the plan, the shards and all that belongs to them of a finished cache.

    Raises:
        StorageError: The file system refused.
    """
    ours = re.compile(
        rf"{(name := re.escape(path.name))}\.(plan|shard-\d{{5}}-of-\d{{5}}(\.part|\.lock)?)"
        rf"|\.{name}\.(shard-[-\d]+of-\d{{5}}\.)?part\.[0-9a-f]{{16}}\.tmp"  # of a killed writer
    )
    with storage_errors(path):
        for found in path.parent.glob(f"*{glob.escape(path.name)}.*"):
            if ours.fullmatch(found.name):
                if found.is_dir():
                    shutil.rmtree(found, ignore_errors=True)
                else:
                    found.unlink(missing_ok=True)


def _without(size: int, num_rows: Mapping[str, int], there: Iterable[Share]) -> list[Share]:
    """The shards of a job that have blocks and are not among those `there`."""
    known = set(there)
    shares = (Share(index, size) for index in range(size))
    return [share for share in shares if share not in known and share.blocks(num_rows)]


def _refuse_missing(path: Path, missing: Sequence[Share]) -> None:
    if missing:
        names = listed([str(share.index) for share in missing], 10)
        again = f"{missing[0].index}/{missing[0].size}"
        raise CacheError(
            f"{path}: of {missing[0].size} shards, {len(missing)} are missing or unfinished "
            f"({names}): run these ranks again (--shard {again})"
        )


def _joined(files: Sequence[CacheFile], split: str, num_rows: int, path: Path) -> SplitRows:
    """The rows of one split, from all shards that have some, in order."""
    parts = [file.rows(split) for file in files if split in file.layout.splits]
    if sum(len(part.ids) for part in parts) != num_rows:
        raise CacheError(f"{plan_path(path)} states other numbers of rows than the shards have")
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(SplitRows):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "name" or values[0] is None:
            columns[field.name] = values[0]
        elif isinstance(values[0], np.ndarray):
            columns[field.name] = np.concatenate(values)
        else:
            columns[field.name] = list(itertools.chain.from_iterable(values))
    return SplitRows(**columns)


def _copy_all(
    writer: CacheWriter,
    here: Mapping[str, range],
    parts: Mapping[Share, Path],
    num_rows: Mapping[str, int],
) -> None:
    """Copy pending blocks from other parts of the same cache.

    Args:
        writer: What to copy to.
        here: The writer's blocks, as numbers in the whole cache.
        parts: What to copy from.
        num_rows: Rows of each split of the whole cache.
    """
    num_pending = sum(len(rows) for split in here for rows in writer.pending(split))
    before, writer.sync_blocks = writer.sync_blocks, COPY_SYNC_BLOCKS
    with progress(num_pending, "merge", late=True) as bar:
        for share, path in parts.items():
            file = CacheFile(path)
            with contextlib.closing(file):
                _copy(writer, here, file, share.blocks(num_rows), bar)
    writer.sync_blocks = before


def _copy(
    writer: CacheWriter,
    here: Mapping[str, range],
    file: CacheFile,
    there: Mapping[str, range],
    bar: Any,
) -> None:
    both = {
        split: range(max(blocks.start, there[split].start), min(blocks.stop, there[split].stop))
        for split, blocks in here.items()
        if split in there
    }
    common = {split: blocks for split, blocks in both.items() if blocks}
    if not common:
        return
    _check_same(file, writer.spec.meta)
    for split, blocks in common.items():
        mine, theirs = _rows(blocks, here[split]), _rows(blocks, there[split])
        content = writer.spec.arrays[f"{split}/content"][mine]
        same = split in file.layout.splits and np.array_equal(
            content, file.array(f"{split}/content")[theirs]
        )
        if not same:
            raise CacheError(f"{file.path} holds other rows of {split}: remove it")
        state, crc = file.array(f"{split}/state"), file.array(f"{split}/crc32")
        status, shift = file.array(f"{split}/row_status"), here[split].start - there[split].start
        first = here[split].start
        for rows in writer.pending(split, range(blocks.start - first, blocks.stop - first)):
            block = rows.start // BLOCK_ROWS + shift
            if state[block] != 1:
                continue
            if file.crc_of(split, block) == crc[block]:
                at = block_range(block, len(status))
                features = file.all_views(split, at)
                writer.write_block(split, rows, features, status[at.start : at.stop])
                bar.update(len(rows))
            elif not file.path.name.endswith(".part"):  # whose writer would compute it again
                raise CacheError(
                    f"{file.path}: block {block} of {split} fails its checksum: remove this file, "
                    "and run its rank again"
                )


def _rows(blocks: range, part: range) -> slice:
    """The rows of some blocks in a file that holds the blocks of `part`."""
    return slice((blocks.start - part.start) * BLOCK_ROWS, (blocks.stop - part.start) * BLOCK_ROWS)


def _check_same(file: CacheFile, meta: CacheMeta) -> None:
    """Check that a file belongs to this job and is sound but for its features."""
    if damaged := file.damaged_datasets():
        raise CacheError(
            f"{file.path} is damaged in {', '.join(damaged)}: remove it, and run its rank again"
        )
    if differences := file.meta.differences(meta):
        raise CacheError(
            f"{file.path} was made with different settings: {describe_differences(differences)}; "
            "give every rank the same command, or remove that file"
        )

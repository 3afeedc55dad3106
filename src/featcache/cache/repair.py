"""Repairing a finished cache: good blocks are kept, damaged ones computed again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from featcache.cache.create import create_part
from featcache.cache.layout import block_range
from featcache.cache.lock import locked
from featcache.cache.plan import Plan, make_plan
from featcache.cache.reader import meta_of, rows_of
from featcache.cache.reuse import RowSource
from featcache.cache.storage import CacheFile, texts_of
from featcache.cache.writer import CacheWriter, part_path
from featcache.errors import CacheError, UserError


def prepare_repair(path: Path) -> CacheWriter:
    """Begin a sound copy of a damaged cache, or go on with it; `finish` puts it in its place.

    Everything but features must be sound. The HDF5 library's own bytes are made anew.

    Args:
        path: A finished cache, NAME.h5. It stays as it is until the copy is whole.

    Returns:
        A writer whose `pending` blocks are the damaged ones.

    Raises:
        CacheError: Labels, ids or other rows' data are damaged too, so that the features could not
            be told apart; or an unfinished file of something else is in the way.
        StorageError: Another run is writing it, or the file system refused.
    """
    file = CacheFile(path)
    damaged = [name for name in file.damaged_parts() if name != "HDF5 structure"]
    if damaged:
        raise CacheError(
            f"{path} cannot be repaired: {', '.join(damaged)} are damaged, not only features; "
            "run extract-features --force to make it again"
        )
    plan = _plan_of(file)
    with locked(path) as lock:
        part = part_path(path)
        if not os.path.lexists(part):
            create_part(part, plan)
        writer = CacheWriter(path, plan, lock, RowSource([], plan.meta))
        try:
            _copy_good(file, writer)
        except BaseException:
            writer.close()
            raise
        return writer


def _plan_of(file: CacheFile) -> Plan:
    splits = [rows_of(file, name) for name in file.layout.splits]
    class_names = texts_of(file.array("class_names"), file.path)
    try:
        return make_plan(meta_of(file), class_names, splits)
    except CacheError:
        raise
    except UserError as error:
        raise CacheError(f"{file.path} is not a valid cache: {error}") from None


def _copy_good(file: CacheFile, writer: CacheWriter) -> None:
    for split in file.layout.splits:
        good = file.good_blocks(split)
        status = file.array(f"{split}/row_status")
        num_views = file.layout.extents[f"{split}/features"].shape[0]
        pending = {rows.start for rows in writer.pending(split)}
        for block in np.flatnonzero(good):
            rows = block_range(int(block), file.layout.num_rows(split))
            if rows.start in pending:
                views = [file.view_rows(split, view, rows) for view in range(num_views)]
                writer.write_block(split, rows, np.stack(views), status[rows.start : rows.stop])

"""Laying out an empty cache on the disk, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from featcache.cache import layout as form
from featcache.cache.fileio import reserve, sha256_of, sync_folder, write_at
from featcache.cache.layout import Extent, Layout
from featcache.cache.plan import Plan
from featcache.cache.record import parse_record
from featcache.cache.skeleton import make_skeleton
from featcache.errors import UserError
from featcache.files import remove_temporaries, replacing, storage_errors


def create_part(part: Path, plan: Plan) -> None:
    """Lay out an empty cache on the disk, whole or not at all, under the lock on it.

    Raises:
        UserError: There is no room for it.
        StorageError: The file system refused.
    """
    skeleton = make_skeleton(plan.members)
    remove_temporaries(part)  # left by a run killed at this very point
    _check_room(part, skeleton.file_bytes)
    with storage_errors(part):
        with replacing(part) as draft:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                reserve(fd, skeleton.file_bytes)
                for offset, chunk in skeleton.chunks.items():
                    write_at(fd, chunk, offset)
                _write_known(fd, plan, skeleton.file_bytes, skeleton.offsets)
            finally:
                os.close(fd)
        sync_folder(part.parent)


def _write_known(fd: int, plan: Plan, file_bytes: int, offsets: dict[str, int]) -> None:
    """Write the fixed datasets, and last the layout record with the hash of all that."""
    extents = {
        name: Extent(offsets[name], e.dtype, e.shape, e.sha256) for name, e in plan.members.items()
    }
    for name, array in plan.arrays.items():
        write_at(fd, np.ascontiguousarray(array).view(np.uint8), offsets[name])
    structure = sha256_of(fd, form.complement(extents.values(), file_bytes)).hex()
    record = Layout(file_bytes, extents, structure).to_record()
    parse_record(record, file_bytes, Path("new cache"))  # what readers will do
    write_at(fd, record, offsets["layout"])


def _check_room(part: Path, num_bytes: int) -> None:
    with storage_errors(part):
        free = shutil.disk_usage(part.parent).free
    if free < num_bytes:
        raise UserError(
            f"no room for {part}: it needs {num_bytes} bytes, {free} are free; make room, or "
            "give --dtype float16, --num-train N, or --cache-dir on another disk"
        )

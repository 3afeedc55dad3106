"""The HDF5 library's part: the bytes of an empty cache, made in memory. The only use of h5py.

The library is handed a file that lives in memory and records what is written, so it never touches
the disk: no lock of its own, no half-written metadata, and no disk error inside C code. The writer
puts these few kilobytes into the file itself.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from featcache.cache.layout import HDF5_SIGNATURE, Extent


@dataclass(frozen=True)
class Skeleton:
    """An empty cache: size, the HDF5 metadata as offset -> bytes, and each dataset's offset."""

    file_bytes: int
    chunks: dict[int, bytes]
    offsets: dict[str, int]


def make_skeleton(members: dict[str, Extent]) -> Skeleton:
    """Lay out an HDF5 file of empty contiguous datasets.

    Args:
        members: Datasets by name ("split/name" lies in a group) in the order in which they are
            laid out; their offsets are ignored.
    """
    import h5py

    disk = _Sparse()
    splits = {name.partition("/")[0] for name in members if "/" in name}
    with h5py.File(
        disk,
        "w",
        # The oldest format has no "open for writing" mark that a kill would leave behind.
        libver=("earliest", "v110"),
        # All metadata fits into one block in front; every dataset starts on a page of its own.
        meta_block_size=16384 + 8192 * len(splits),
        alignment_threshold=1,
        alignment_interval=4096,
    ) as file:
        for split in (name.partition("/")[0] for name in members if "/" in name):
            file.require_group(split)
        offsets = {name: _create(h5py, file, name, extent) for name, extent in members.items()}
    assert disk.chunks[0].startswith(HDF5_SIGNATURE)
    return Skeleton(disk.size, disk.chunks, offsets)


def _create(h5py: Any, file: Any, name: str, extent: Extent) -> int:
    """Create one dataset without writing it; returns where its bytes will lie."""
    group, _, leaf = name.rpartition("/")
    kind = h5py.h5t.py_create(_h5_dtype(h5py, extent.dtype), logical=True)
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)  # equal content, equal file
    space = h5py.h5s.create_simple(extent.shape)
    parent = file[group or "/"].id
    dataset = h5py.h5d.create(parent, leaf.encode(), kind, space, create)
    return int(dataset.get_offset())


def _h5_dtype(h5py: Any, dtype: str) -> Any:
    import numpy as np

    if dtype.startswith("|S"):
        return h5py.string_dtype("utf-8", int(dtype[2:]))
    return np.dtype(dtype)


class _Sparse(io.RawIOBase):
    """A file in memory that keeps only what was written, however large it claims to be."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: dict[int, bytes] = {}
        self.size = 0
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        chunk = bytes(data)
        self.chunks[self._at] = chunk
        self._at += len(chunk)
        self.size = max(self.size, self._at)
        return len(chunk)

    def readinto(self, buffer: Any) -> int:
        """Not needed to create a file: HDF5 holds new metadata in its own memory."""
        raise OSError("the skeleton is written, never read")

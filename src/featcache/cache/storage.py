"""One open cache file, finished or not: its checked layout and its bytes, nothing yet believed."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache import layout as form
from featcache.cache.fileio import read_at, reading, sha256_of
from featcache.cache.layout import Layout, block_crc, block_range
from featcache.cache.record import parse_record
from featcache.errors import CacheError
from featcache.files import open_regular


class CacheFile:
    """An open file whose layout record is sound; what it holds is checked by asking.

    Everything is read from the file opened here, even if another takes its name meanwhile.

    Raises:
        CacheError: Not a cache, cut short, of another version, or with a damaged layout record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self.fd = open_regular(path)
        self._close = weakref.finalize(self, os.close, self.fd)
        with reading(path):
            size = os.fstat(self.fd).st_size
            if not size:
                raise CacheError(f"{path} is empty: run extract-features again")
            tail = read_at(self.fd, min(size, form.RECORD_BYTES), max(0, size - form.RECORD_BYTES))
        self.layout: Layout = parse_record(tail, size, path)

    def close(self) -> None:
        """Close the file; arrays that were mapped stay valid."""
        self._close()

    def array(self, name: str) -> npt.NDArray[Any]:
        """A copy of one whole dataset, read-only; unchecked.

        Raises:
            StorageError: The file system failed.
        """
        extent = self.layout.extents[name]
        with reading(self.path):
            data = read_at(self.fd, extent.num_bytes, extent.offset)
        return np.frombuffer(data, extent.dtype).reshape(extent.shape)

    def fixed(self, name: str) -> npt.NDArray[Any]:
        """A copy of one of the datasets that never change, checked against its own sha256.

        Raises:
            CacheError: It is damaged.
            StorageError: The file system failed.
        """
        array = self.array(name)
        if hashlib.sha256(array.tobytes()).hexdigest() != self.layout.extents[name].sha256:
            raise CacheError(
                f"{self.path} is damaged ({name}): run featcache verify {self.path} for details"
            )
        return array

    def map(self, name: str) -> npt.NDArray[Any]:
        """One dataset memory-mapped, read-only; unchecked."""
        extent = self.layout.extents[name]
        with reading(self.path), os.fdopen(os.dup(self.fd), "rb") as file:
            return np.memmap(file, extent.dtype, "r", extent.offset, extent.shape)

    def view_rows(self, split: str, view: int, rows: range) -> npt.NDArray[Any]:
        """A copy of features [len(rows), D] of one view, in the file's dtype; unchecked.

        Raises:
            StorageError: The file system failed.
        """
        extent = self.layout.extents[f"{split}/features"]
        _, num_rows, dim = extent.shape
        row_bytes = dim * np.dtype(extent.dtype).itemsize
        at = extent.offset + (view * num_rows + rows.start) * row_bytes
        with reading(self.path):
            data = read_at(self.fd, len(rows) * row_bytes, at)
        return np.frombuffer(data, extent.dtype).reshape(len(rows), dim)

    def crc_of(self, split: str, block: int) -> int:
        """The checksum that the bytes of a block have now."""
        rows = block_range(block, self.layout.num_rows(split))
        views = self.layout.extents[f"{split}/features"].shape[0]
        status = self.layout.extents[f"{split}/row_status"].offset + rows.start
        with reading(self.path):
            row_status = read_at(self.fd, len(rows), status)
        data = (self.view_rows(split, view, rows) for view in range(views))
        return block_crc(split, block, data, row_status)

    def good_blocks(self, split: str) -> npt.NDArray[np.bool_]:
        """[B]: which blocks are marked as done and hold what was written. Reads the whole split."""
        state, crc = self.array(f"{split}/state"), self.array(f"{split}/crc32")
        done = (state[b] == 1 and self.crc_of(split, b) == crc[b] for b in range(len(state)))
        return np.fromiter(done, bool, len(state))

    def digest(self) -> bytes:
        """Sha256 of every byte but the features and the digest itself."""
        with reading(self.path):
            return sha256_of(self.fd, self.layout.digested())

    def damaged_parts(self) -> list[str]:
        """Names of the fixed datasets (and "HDF5 structure") whose bytes are not the first ones."""
        parts = {
            name: ([(extent.offset, extent.end)], extent.sha256)
            for name, extent in self.layout.extents.items()
            if extent.sha256
        }
        parts["HDF5 structure"] = (list(self.layout.gaps()), self.layout.structure_sha256)
        with reading(self.path):
            return [
                name
                for name, (ranges, sha) in parts.items()
                if sha256_of(self.fd, ranges).hex() != sha
            ]


def texts_of(array: npt.NDArray[Any], path: Path) -> list[str]:
    """Decode a fixed-length UTF-8 dataset.

    Raises:
        CacheError: It is not UTF-8.
    """
    try:
        return [text.decode() for text in array.tolist()]
    except UnicodeDecodeError:
        raise CacheError(f"{path}: a name in it is not UTF-8; {form.AGAIN}") from None

"""One open cache file, finished or not: its layout is checked, what it holds only on request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.fileio import RESUME, read_at, reading, sha256_of
from featcache.cache.layout import RECREATE, Layout, block_crc, parse_record
from featcache.cache.schema import (
    FEATURE_DTYPES,
    RECORD_BYTES,
    TARGET_COLUMNS,
    SplitRows,
    block_range,
)
from featcache.config import CacheMeta, flatten
from featcache.errors import CacheError
from featcache.files import open_regular

HDF5_STRUCTURE = "HDF5 structure"


class CacheFile:
    """An open file whose layout record is sound; what it holds is checked only on request.

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
            tail = read_at(self.fd, min(size, RECORD_BYTES), max(0, size - RECORD_BYTES))
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

    @property
    def meta(self) -> CacheMeta:
        """What the rows were made with.

        Raises:
            CacheError: It is damaged or not valid.
        """
        features = self.layout.features(self.layout.splits[0])
        shape = (features.shape[0], features.shape[2], features.dtype)
        try:
            meta = parse_meta(self.fixed("meta_json").tobytes())
            stated = (meta.views.num, meta.backbone.feature_dim, FEATURE_DTYPES[meta.dtype])
            if stated != shape:
                raise ValueError(f"it states views, dim, dtype {stated}, the features have {shape}")
            needed = {TARGET_COLUMNS[meta.dataset.task]} - {None}
            for split in self.layout.splits:
                if self.layout.columns(split).keys() & set(TARGET_COLUMNS.values()) != needed:
                    raise ValueError(f"it states {meta.dataset.task}, which {split} is not")
        except CacheError:
            raise
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise CacheError(
                f"{self.path}: its metadata is not valid: {error!s:.200}; {RECREATE}"
            ) from None
        return meta

    @property
    def class_names(self) -> list[str]:
        """The C class names.

        Raises:
            CacheError: They are damaged or not UTF-8.
        """
        return texts_of(self.fixed("class_names"), self.path)

    def rows(self, split: str) -> SplitRows:
        """The fixed datasets of one split; unchecked.

        Raises:
            CacheError: A text is not UTF-8.
        """
        columns = {name: self.array(f"{split}/{name}") for name in self.layout.columns(split)}
        groups = columns.get("groups")
        return SplitRows(
            name=split,
            ids=texts_of(self.array(f"{split}/ids"), self.path),
            labels=self.array(f"{split}/labels"),
            content=self.array(f"{split}/content"),
            weights=columns.get("weights"),
            groups=None if groups is None else texts_of(groups, self.path),
            targets=columns.get("multihot", columns.get("targets")),
        )

    def check_finished(self) -> None:
        """Check that every block is marked as written.

        Raises:
            CacheError: Some are not.
        """
        states = (self.array(f"{split}/state") for split in self.layout.splits)
        if any((state != 1).any() for state in states):
            raise CacheError(f"{self.path} is unfinished: {RESUME}")

    def map(self, name: str) -> npt.NDArray[Any]:
        """One dataset memory-mapped, read-only; unchecked.

        No `numpy.memmap`: joblib opens the file of one by its name, in every process that it sends
        it to, and by then another file may have the name.
        """
        extent = self.layout.extents[name]
        with reading(self.path):
            mapped = mmap.mmap(self.fd, extent.end, access=mmap.ACCESS_READ)
        count = math.prod(extent.shape)
        return np.frombuffer(mapped, extent.dtype, count, extent.offset).reshape(extent.shape)

    def view_rows(self, split: str, view: int, rows: range) -> npt.NDArray[Any]:
        """A copy of features [len(rows), D] of one view, in the file's dtype; unchecked.

        Raises:
            StorageError: The file system failed.
        """
        extent = self.layout.features(split)
        _, num_rows, dim = extent.shape
        row_bytes = dim * np.dtype(extent.dtype).itemsize
        at = extent.offset + (view * num_rows + rows.start) * row_bytes
        with reading(self.path):
            data = read_at(self.fd, len(rows) * row_bytes, at)
        return np.frombuffer(data, extent.dtype).reshape(len(rows), dim)

    def all_views(self, split: str, rows: range) -> npt.NDArray[Any]:
        """A copy of features [V, len(rows), D], in the file's dtype; unchecked.

        Raises:
            StorageError: The file system failed.
        """
        views = range(self.layout.num_views)
        return np.stack([self.view_rows(split, view, rows) for view in views])

    def crc_of(self, split: str, block: int) -> int:
        """The checksum that the bytes of a block have now."""
        rows = block_range(block, self.layout.num_rows(split))
        views = self.layout.num_views
        status = self.layout.extents[f"{split}/row_status"].offset + rows.start
        with reading(self.path):
            row_status = read_at(self.fd, len(rows), status)
        data = (self.view_rows(split, view, rows) for view in range(views))
        return block_crc(split, block, data, row_status)

    def marked_blocks(self, split: str) -> npt.NDArray[np.bool_]:
        """[B]: which blocks are marked as done."""
        marked: npt.NDArray[np.bool_] = self.array(f"{split}/state") == 1
        return marked

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
        """Names of the fixed datasets whose bytes have changed since they were written.

        HDF5_STRUCTURE stands for the HDF5 library's own bytes.
        """
        parts = {
            name: ([(extent.offset, extent.end)], extent.sha256)
            for name, extent in self.layout.extents.items()
            if extent.sha256
        }
        parts[HDF5_STRUCTURE] = (list(self.layout.gaps()), self.layout.structure_sha256)
        with reading(self.path):
            return [
                name
                for name, (ranges, sha) in parts.items()
                if sha256_of(self.fd, ranges).hex() != sha
            ]

    def damaged_datasets(self) -> list[str]:
        """As `damaged_parts`, without the HDF5 library's own bytes: featcache can do without."""
        return [name for name in self.damaged_parts() if name != HDF5_STRUCTURE]


def texts_of(array: npt.NDArray[Any], path: Path) -> list[str]:
    """Decode a fixed-length UTF-8 dataset.

    Raises:
        CacheError: It is not UTF-8.
    """
    try:
        return [text.decode() for text in array.tolist()]
    except UnicodeDecodeError:
        raise CacheError(f"{path}: a name in it is not UTF-8; {RECREATE}") from None


def parse_meta(text: bytes) -> CacheMeta:
    """Rebuild metadata from the dataset meta_json; the file may be damaged or hostile.

    Raises:
        ValueError: It is not a cache's metadata, is not canonical JSON, or cannot be printed.
    """
    meta = CacheMeta.from_dict(json.loads(text, parse_constant=_refuse))
    if meta.to_json().encode() != text:
        raise ValueError("not in canonical form")
    for name, value in flatten(dataclasses.asdict(meta)).items():
        if not f"{name}{value}".isprintable():
            raise ValueError(f"{name!r:.80} cannot be printed")
    return meta


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a value")

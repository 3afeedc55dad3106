"""Where every byte of a cache lies: the layout record, its checks, and the block checksum.

A cache is an ordinary HDF5 file of plain contiguous datasets. Its last 32 KiB are the dataset
`layout`: a self-checked record of every dataset's place, type and shape, written once. Readers go
by this record and never call the HDF5 library, so damaged or hostile HDF5 metadata cannot crash,
hang or redirect them. docs/format.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
FORMAT = "featcache"
VERSION = 1
MAGIC = b"featcache-layout"
MARKS = re.compile(MAGIC + rb"|\bmeta_json\0")
"""A cache ends with the first; one that was cut short still has the second among its names."""
RECORD_BYTES = 32768
DIGEST_BYTES = 32
BLOCK_ROWS = 64

MAX_FILE_BYTES = 2**50
MAX_ROWS = 2**33
MAX_SPLITS = 16
MAX_CLASSES = 1_000_000
MAX_DIM = 2**20
MAX_NUM_VIEWS = 256
MAX_META_BYTES = 2**20
MAX_TEXT_BYTES = 4096
MAX_STRUCTURE_BYTES = 2**24

ROOT = ("meta_json", "class_names", "digest", "layout")
AGAIN = "run extract-features --force to make it again"
STATIC = ("labels", "ids", "content", "weights")
SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Extent:
    """One dataset's bytes: little-endian, rows first, no gaps.

    `sha256` is the hex digest of the bytes where they never change after creation, else None.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.num_bytes


@dataclass(frozen=True)
class Layout:
    """Every dataset of one cache by name ("labels" of split "train" is "train/labels").

    `structure_sha256` covers every byte that lies in no dataset: the HDF5 library's own.
    """

    file_bytes: int
    extents: dict[str, Extent]
    structure_sha256: str

    @property
    def splits(self) -> list[str]:
        """Split names, in file order."""
        return [name.partition("/")[0] for name in self.extents if name.endswith("/features")]

    def num_rows(self, split: str) -> int:
        """Rows of a split, skipped ones included."""
        return self.extents[f"{split}/features"].shape[1]

    def num_blocks(self, split: str) -> int:
        """Blocks of a split."""
        return num_blocks(self.num_rows(split))

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, end) that belong to no dataset, in order."""
        return complement(self.extents.values(), self.file_bytes)

    def digested(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, end) covered by the digest: all but the features and the digest."""
        left_out = [
            extent
            for name, extent in self.extents.items()
            if name == "digest" or name.endswith("/features")
        ]
        return complement(left_out, self.file_bytes)

    def to_record(self) -> bytes:
        """The layout dataset's bytes: magic, version, length, JSON, zeros, sha256 of all that."""
        datasets = [
            {"name": name, "offset": e.offset, "dtype": e.dtype, "shape": list(e.shape)}
            | ({"sha256": e.sha256} if e.sha256 else {})
            for name, e in self.extents.items()
        ]
        value = {
            "format": FORMAT,
            "block_rows": BLOCK_ROWS,
            "file_bytes": self.file_bytes,
            "structure_sha256": self.structure_sha256,
            "datasets": datasets,
        }
        text = json.dumps(value, separators=(",", ":")).encode()
        head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little")
        room = RECORD_BYTES - DIGEST_BYTES
        assert len(head) + len(text) <= room, "16 splits fit by measurement"
        body = (head + text).ljust(room, b"\0")
        return body + hashlib.sha256(body).digest()


def num_blocks(num_rows: int) -> int:
    """Blocks that hold so many rows."""
    return -(-num_rows // BLOCK_ROWS)


def block_range(block: int, num_rows: int) -> range:
    """Rows of block number `block` in a split of `num_rows` rows."""
    return range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows))


def block_crc(split: str, block: int, views: Iterable[Any], row_status: Any) -> int:
    """CRC-32 of one block, as zlib computes it.

    Args:
        split: The split's name; with the block's number it is hashed first, so that a block in
            another's place does not pass.
        block: The block's number.
        views: For each view, its rows [n, D] in the file's dtype, contiguous.
        row_status: [n], uint8.
    """
    crc = zlib.crc32(f"{split}/{block}".encode())
    for rows in views:
        crc = zlib.crc32(rows, crc)
    return zlib.crc32(row_status, crc)


def complement(extents: Iterable[Extent], file_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, end) of [0, file_bytes) outside `extents`, which do not overlap."""
    at = 0
    for extent in sorted(extents, key=lambda e: e.offset):
        if extent.offset > at:
            yield at, extent.offset
        at = extent.end
    if at < file_bytes:
        yield at, file_bytes

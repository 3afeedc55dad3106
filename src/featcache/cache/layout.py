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
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import CacheError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
FORMAT = "featcache"
VERSION = 1
MAGIC = b"featcache-layout"
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


def parse_record(record: bytes, file_bytes: int, path: Path) -> Layout:
    """Read and check a layout record; nothing in it is believed before it is checked.

    Args:
        record: The last RECORD_BYTES of the file.
        file_bytes: The file's real size.
        path: For messages.

    Raises:
        CacheError: The record is not one, is damaged, of another version, or claims something
            that a cache cannot hold.
    """
    if record[: len(MAGIC)] != MAGIC:
        raise CacheError(
            f"{path} is not a featcache file, or its end is missing (no layout record in its last "
            f"{RECORD_BYTES} bytes): run extract-features again"
        )
    body, sha = record[:-DIGEST_BYTES], record[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != sha:
        raise CacheError(f"{path} is damaged: its layout record fails its checksum; {AGAIN}")
    version = int.from_bytes(record[16:20], "little")
    if version != VERSION:
        raise CacheError(
            f"{path} has format version {version}; this featcache reads version {VERSION}: "
            "install the matching featcache or run extract-features --force"
        )
    try:
        return _layout_of(_record_json(body), file_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else type(error).__name__
        raise CacheError(f"{path} is not a valid cache: layout record: {reason}; {AGAIN}") from None


AGAIN = "run extract-features --force to make it again"


def _record_json(body: bytes) -> Any:
    length = int.from_bytes(body[20:24], "little")
    text = body[24 : 24 + length]
    if len(text) != length or any(body[24 + length :]):
        raise ValueError("wrong length")
    return json.loads(text)


def _layout_of(value: Any, file_bytes: int) -> Layout:
    """Check the parsed record against what a cache may hold (ValueError says what is wrong)."""
    _keys(value, {"format", "block_rows", "file_bytes", "structure_sha256", "datasets"})
    if value["format"] != FORMAT or value["block_rows"] != BLOCK_ROWS:
        raise ValueError(f"format is not {FORMAT} in blocks of {BLOCK_ROWS} rows")
    if value["file_bytes"] != file_bytes:
        raise ValueError(f"made for {value['file_bytes']!r:.30} bytes, the file has {file_bytes}")
    if not isinstance(value["datasets"], list):
        raise ValueError("datasets is not a list")
    extents: dict[str, Extent] = {}
    for entry in value["datasets"]:
        _keys(entry, {"name", "offset", "dtype", "shape"}, {"sha256"})
        name = entry["name"]
        if not isinstance(name, str) or name in extents:
            raise ValueError(f"dataset name {name!r:.50} twice or not text")
        extents[name] = _extent_of(entry)
    layout = Layout(file_bytes, extents, _sha_of(value["structure_sha256"]))
    check_members(layout)
    check_places(layout)
    return layout


def _keys(value: Any, needed: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    if not isinstance(value, dict) or not needed <= value.keys() <= needed | optional:
        raise ValueError("wrong fields")


def _sha_of(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError("a sha256 is not 64 hex digits")
    return value


def _extent_of(entry: dict[str, Any]) -> Extent:
    offset, dtype, shape = entry["offset"], entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not re.fullmatch(
        r"\|u1|<u4|<i8|<f2|<f4|\|S[1-9]\d{0,3}", dtype
    ):
        raise ValueError(f"dtype {dtype!r:.30}")
    numbers = [offset, *shape] if isinstance(shape, list) and len(shape) <= 3 else [None]
    # bool is an int in Python, hence the exact type.
    if any(type(n) is not int or not 0 <= n <= MAX_FILE_BYTES for n in numbers) or not shape:
        raise ValueError(f"offset {offset!r:.30} or shape {shape!r:.60} out of range")
    return Extent(
        offset, dtype, tuple(shape), _sha_of(entry["sha256"]) if "sha256" in entry else None
    )


def check_members(layout: Layout) -> None:
    """Exactly the datasets of a cache, each with the type and shape that the others imply.

    Raises:
        ValueError: What is wrong.
    """
    splits, extents = layout.splits, layout.extents
    if not 1 <= len(splits) <= MAX_SPLITS:
        raise ValueError(f"{len(splits)} splits")
    first = extents[f"{splits[0]}/features"]
    if len(first.shape) != 3 or first.dtype not in ("<f4", "<f2"):
        raise ValueError(f"features {first.dtype} {first.shape}")
    views, _, dim = first.shape
    if not (1 <= views <= MAX_NUM_VIEWS and 1 <= dim <= MAX_DIM):
        raise ValueError(f"{views} views of {dim} values")
    wanted = _root_members(extents)
    for split in splits:
        if not SPLIT_NAME.fullmatch(split) or split in wanted:
            raise ValueError(f"split name {split!r:.50}")
        wanted |= _split_members(split, extents, first)
    if extents.keys() != wanted.keys():
        raise ValueError(
            f"datasets {sorted(extents.keys() ^ wanted.keys())!r:.150} unexpected or missing"
        )
    for name, (dtype, shape, fixed) in wanted.items():
        extent = extents[name]
        if (extent.dtype, extent.shape, extent.sha256 is not None) != (dtype, shape, fixed):
            raise ValueError(f"{name} is {extent.dtype} {extent.shape}, not {dtype} {shape}")


Member = tuple[str, tuple[int, ...], bool]


def _root_members(extents: dict[str, Extent]) -> dict[str, Member]:
    meta, classes = extents["meta_json"], extents["class_names"]
    if not 1 <= math.prod(meta.shape) <= MAX_META_BYTES:
        raise ValueError(f"meta_json of {meta.shape} bytes")
    if len(classes.shape) != 1 or not 1 <= classes.shape[0] <= MAX_CLASSES:
        raise ValueError(f"class_names {classes.shape}")
    return {
        "meta_json": ("|u1", (math.prod(meta.shape),), True),
        "class_names": (_text_dtype(classes), classes.shape, True),
        "digest": ("|u1", (DIGEST_BYTES,), False),
        "layout": ("|u1", (RECORD_BYTES,), False),
    }


def _split_members(split: str, extents: dict[str, Extent], first: Extent) -> dict[str, Member]:
    shape = extents[f"{split}/features"].shape
    if len(shape) != 3 or not 1 <= shape[1] <= MAX_ROWS:
        raise ValueError(f"{split}/features {shape}")
    rows, blocks = shape[1], num_blocks(shape[1])
    members: dict[str, Member] = {
        "labels": ("<i8", (rows,), True),
        "ids": (_text_dtype(extents[f"{split}/ids"]), (rows,), True),
        "content": ("|u1", (rows, DIGEST_BYTES), True),
        "row_status": ("|u1", (rows,), False),
        "state": ("|u1", (blocks,), False),
        "crc32": ("<u4", (blocks,), False),
        "features": (first.dtype, (first.shape[0], rows, first.shape[2]), False),
    }
    if f"{split}/weights" in extents:
        members["weights"] = ("<f4", (rows,), True)
    return {f"{split}/{name}": member for name, member in members.items()}


def _text_dtype(extent: Extent) -> str:
    size = np.dtype(extent.dtype).itemsize
    if extent.dtype[:2] != "|S" or size > MAX_TEXT_BYTES:
        raise ValueError(f"text of type {extent.dtype}")
    return extent.dtype


def check_places(layout: Layout) -> None:
    """Every dataset inside the file, aligned, apart from the others; the record at the very end.

    Raises:
        ValueError: What is wrong.
    """
    at = len(HDF5_SIGNATURE)
    for name, extent in sorted(layout.extents.items(), key=lambda item: item[1].offset):
        if extent.offset < at or extent.end > layout.file_bytes:
            raise ValueError(f"{name} at {extent.offset} overlaps another or leaves the file")
        if extent.offset % 8:
            raise ValueError(f"{name} at {extent.offset} is not aligned to 8 bytes")
        at = extent.end
    if layout.extents["layout"].end != layout.file_bytes:
        raise ValueError("the layout record is not the end of the file")
    if sum(end - start for start, end in layout.gaps()) > MAX_STRUCTURE_BYTES:
        raise ValueError("too many bytes outside the datasets")

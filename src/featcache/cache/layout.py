"""Where each dataset of a cache is in its file: the layout record, and the checksum of a block.

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

from featcache.cache import schema
from featcache.cache.schema import CacheSizes, Member, SplitSizes
from featcache.errors import CacheError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAGIC = b"featcache-layout"
MARKS = re.compile(MAGIC + rb"|\bmeta_json\0")
"""A cache ends with the first; a truncated one still has the second, a dataset's name."""
MAX_STRUCTURE_BYTES = 2**24

RECREATE = "run extract-features --force to recreate it"


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

    @property
    def member(self) -> Member:
        """Its type and shape, apart from its place."""
        return Member(self.dtype, self.shape, fixed=self.sha256 is not None)


@dataclass(frozen=True)
class Layout:
    """Every dataset of one cache by name ("labels" of split "train" is "train/labels").

    `structure_sha256` covers every byte outside the datasets: the HDF5 library's own.
    """

    file_bytes: int
    extents: dict[str, Extent]
    structure_sha256: str

    @property
    def splits(self) -> list[str]:
        """Split names, in file order."""
        return [name.partition("/")[0] for name in self.extents if name.endswith("/features")]

    def features(self, split: str) -> Extent:
        """A split's features [V, N, D]."""
        return self.extents[f"{split}/features"]

    @property
    def num_views(self) -> int:
        """Views of each sample; the same in every split."""
        return self.features(self.splits[0]).shape[0]

    def num_rows(self, split: str) -> int:
        """Rows of a split, skipped ones included."""
        return self.features(split).shape[1]

    def all_num_rows(self) -> dict[str, int]:
        """Rows of every split."""
        return {split: self.num_rows(split) for split in self.splits}

    def columns(self, split: str) -> dict[str, Extent]:
        """Those of schema.COLUMNS that a split has."""
        names = {name: f"{split}/{name}" for name in schema.COLUMNS}
        return {name: self.extents[path] for name, path in names.items() if path in self.extents}

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, end) that belong to no dataset, in order."""
        return complement(self.extents.values(), self.file_bytes)

    def digested(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, end) covered by the digest: all but the features and the digest."""
        left_out = [self.extents["digest"], *map(self.features, self.splits)]
        return complement(left_out, self.file_bytes)

    def to_record(self) -> bytes:
        """The layout dataset's bytes: magic, version, length, JSON, zeros, sha256 of all that."""
        datasets = [
            {"name": name, "offset": e.offset, "dtype": e.dtype, "shape": list(e.shape)}
            | ({"sha256": e.sha256} if e.sha256 else {})
            for name, e in self.extents.items()
        ]
        value = {
            "format": schema.FORMAT,
            "block_rows": schema.BLOCK_ROWS,
            "file_bytes": self.file_bytes,
            "structure_sha256": self.structure_sha256,
            "datasets": datasets,
        }
        text = json.dumps(value, separators=(",", ":")).encode()
        head = MAGIC + schema.VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little")
        room = schema.RECORD_BYTES - schema.DIGEST_BYTES
        assert len(head) + len(text) <= room, "16 splits fit by measurement"
        body = (head + text).ljust(room, b"\0")
        return body + hashlib.sha256(body).digest()


def parse_record(record: bytes, file_bytes: int, path: Path) -> Layout:
    """Read and check a layout record; the file may be damaged or hostile.

    Args:
        record: The last schema.RECORD_BYTES of the file.
        file_bytes: The file's real size.
        path: For messages.

    Raises:
        CacheError: The record is not one, is damaged, of another version, or claims something
            that a cache cannot hold.
    """
    if record[: len(MAGIC)] != MAGIC:
        raise CacheError(
            f"{path} is not a cache, or its end is missing (no layout record in its last "
            f"{schema.RECORD_BYTES} bytes): give one that extract-features wrote, or run it again"
        )
    body, sha = record[: -schema.DIGEST_BYTES], record[-schema.DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != sha:
        raise CacheError(f"{path} is damaged: its layout record fails its checksum; {RECREATE}")
    version = int.from_bytes(record[16:20], "little")
    if version != schema.VERSION:
        raise CacheError(
            f"{path} has format version {version}; this featcache reads version {schema.VERSION}: "
            "install the matching featcache or run extract-features --force"
        )
    try:
        return _layout_of(_record_json(body), file_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else type(error).__name__
        raise CacheError(
            f"{path} is not a valid cache: layout record: {reason}; {RECREATE}"
        ) from None


def _record_json(body: bytes) -> Any:
    length = int.from_bytes(body[20:24], "little")
    text = body[24 : 24 + length]
    if len(text) != length or any(body[24 + length :]):
        raise ValueError("wrong length")
    return json.loads(text)


def _layout_of(value: Any, file_bytes: int) -> Layout:
    """Check the parsed record against what a cache may hold (ValueError says what is wrong)."""
    _keys(value, {"format", "block_rows", "file_bytes", "structure_sha256", "datasets"})
    if value["format"] != schema.FORMAT or value["block_rows"] != schema.BLOCK_ROWS:
        raise ValueError(f"format is not {schema.FORMAT} in blocks of {schema.BLOCK_ROWS} rows")
    if value["file_bytes"] != file_bytes:
        raise ValueError(f"made for {value['file_bytes']!r:.30} bytes, the file has {file_bytes}")
    if not isinstance(value["datasets"], list):
        raise ValueError("datasets is not a list")
    extents: dict[str, Extent] = {}
    for entry in value["datasets"]:
        _keys(entry, {"name", "offset", "dtype", "shape"}, {"sha256"})
        name = entry["name"]
        if not isinstance(name, str) or name in extents:
            raise ValueError(f"dataset name {name!r:.50} is a duplicate or not text")
        extents[name] = _extent_of(entry)
    layout = Layout(file_bytes, extents, _sha_of(value["structure_sha256"]))
    _check_members(layout)
    _check_places(layout)
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
        r"\|u1|<u4|<i8|<f2|<f4|<f8|\|S[1-9]\d{0,3}", dtype
    ):
        raise ValueError(f"dtype {dtype!r:.30}")
    numbers = [offset, *shape] if isinstance(shape, list) and len(shape) <= 3 else [None]
    # bool is an int in Python, hence the exact type.
    if any(type(n) is not int or not 0 <= n <= schema.MAX_FILE_BYTES for n in numbers) or not shape:
        raise ValueError(f"offset {offset!r:.30} or shape {shape!r:.60} out of range")
    return Extent(
        offset, dtype, tuple(shape), _sha_of(entry["sha256"]) if "sha256" in entry else None
    )


def _check_members(layout: Layout) -> None:
    """Exactly the datasets of a cache, each with the type and shape that the others imply."""
    extents = layout.extents
    sizes = _sizes_of(layout)
    sizes.check()
    wanted = sizes.members()
    if extents.keys() != wanted.keys():
        raise ValueError(
            f"datasets {sorted(extents.keys() ^ wanted.keys())!r:.150} unexpected or missing"
        )
    for name, member in wanted.items():
        e = extents[name]
        if e.member != member:
            raise ValueError(f"{name} is {e.dtype} {e.shape}, not {member.dtype} {member.shape}")


def _sizes_of(layout: Layout) -> CacheSizes:
    """The numbers that the other datasets' types and shapes must agree with."""
    splits = layout.splits[: schema.MAX_SPLITS + 1]
    if not splits:
        raise ValueError("no splits")
    if any(len(layout.features(split).shape) != 3 for split in splits):
        raise ValueError("features are not [V, N, D]")
    views, _, dim = layout.features(splits[0]).shape
    names = layout.extents["class_names"]
    return CacheSizes(
        meta_bytes=math.prod(layout.extents["meta_json"].shape),
        num_classes=names.shape[0],
        class_name_bytes=np.dtype(names.dtype).itemsize,
        dtype=layout.features(splits[0]).dtype,
        num_views=views,
        dim=dim,
        splits={
            split: SplitSizes(
                num_rows=layout.num_rows(split),
                id_bytes=np.dtype(layout.extents[f"{split}/ids"].dtype).itemsize,
                columns={
                    name: np.dtype(extent.dtype).itemsize
                    for name, extent in layout.columns(split).items()
                },
            )
            for split in splits
        },
    )


def _check_places(layout: Layout) -> None:
    """Every dataset inside the file, aligned, apart from the others; the record at the very end."""
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

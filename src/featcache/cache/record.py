"""Reading a layout record as if a stranger had written it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import layout as form
from featcache.cache.layout import Extent, Layout, num_blocks
from featcache.errors import CacheError


def parse_record(record: bytes, file_bytes: int, path: Path) -> Layout:
    """Read and check a layout record; nothing in it is believed before it is checked.

    Args:
        record: The last form.RECORD_BYTES of the file.
        file_bytes: The file's real size.
        path: For messages.

    Raises:
        CacheError: The record is not one, is damaged, of another version, or claims something
            that a cache cannot hold.
    """
    if record[: len(form.MAGIC)] != form.MAGIC:
        raise CacheError(
            f"{path} is not a featcache file, or its end is missing (no layout record in its last "
            f"{form.RECORD_BYTES} bytes): run extract-features again"
        )
    body, sha = record[: -form.DIGEST_BYTES], record[-form.DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != sha:
        raise CacheError(f"{path} is damaged: its layout record fails its checksum; {form.AGAIN}")
    version = int.from_bytes(record[16:20], "little")
    if version != form.VERSION:
        raise CacheError(
            f"{path} has format version {version}; this featcache reads version {form.VERSION}: "
            "install the matching featcache or run extract-features --force"
        )
    try:
        return _layout_of(_record_json(body), file_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else type(error).__name__
        raise CacheError(
            f"{path} is not a valid cache: layout record: {reason}; {form.AGAIN}"
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
    if value["format"] != form.FORMAT or value["block_rows"] != form.BLOCK_ROWS:
        raise ValueError(f"format is not {form.FORMAT} in blocks of {form.BLOCK_ROWS} rows")
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
    if any(type(n) is not int or not 0 <= n <= form.MAX_FILE_BYTES for n in numbers) or not shape:
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
    if not 1 <= len(splits) <= form.MAX_SPLITS:
        raise ValueError(f"{len(splits)} splits")
    first = extents[f"{splits[0]}/features"]
    if len(first.shape) != 3 or first.dtype not in ("<f4", "<f2"):
        raise ValueError(f"features {first.dtype} {first.shape}")
    views, _, dim = first.shape
    if not (1 <= views <= form.MAX_NUM_VIEWS and 1 <= dim <= form.MAX_DIM):
        raise ValueError(f"{views} views of {dim} values")
    wanted = _root_members(extents)
    for split in splits:
        if not form.SPLIT_NAME.fullmatch(split) or split in wanted:
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
    if not 1 <= math.prod(meta.shape) <= form.MAX_META_BYTES:
        raise ValueError(f"meta_json of {meta.shape} bytes")
    if len(classes.shape) != 1 or not 1 <= classes.shape[0] <= form.MAX_CLASSES:
        raise ValueError(f"class_names {classes.shape}")
    return {
        "meta_json": ("|u1", (math.prod(meta.shape),), True),
        "class_names": (_text_dtype(classes), classes.shape, True),
        "digest": ("|u1", (form.DIGEST_BYTES,), False),
        "layout": ("|u1", (form.RECORD_BYTES,), False),
    }


def _split_members(split: str, extents: dict[str, Extent], first: Extent) -> dict[str, Member]:
    shape = extents[f"{split}/features"].shape
    if len(shape) != 3 or not 1 <= shape[1] <= form.MAX_ROWS:
        raise ValueError(f"{split}/features {shape}")
    rows, blocks = shape[1], num_blocks(shape[1])
    members: dict[str, Member] = {
        "labels": ("<i8", (rows,), True),
        "ids": (_text_dtype(extents[f"{split}/ids"]), (rows,), True),
        "content": ("|u1", (rows, form.DIGEST_BYTES), True),
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
    if extent.dtype[:2] != "|S" or size > form.MAX_TEXT_BYTES:
        raise ValueError(f"text of type {extent.dtype}")
    return extent.dtype


def check_places(layout: Layout) -> None:
    """Every dataset inside the file, aligned, apart from the others; the record at the very end.

    Raises:
        ValueError: What is wrong.
    """
    at = len(form.HDF5_SIGNATURE)
    for name, extent in sorted(layout.extents.items(), key=lambda item: item[1].offset):
        if extent.offset < at or extent.end > layout.file_bytes:
            raise ValueError(f"{name} at {extent.offset} overlaps another or leaves the file")
        if extent.offset % 8:
            raise ValueError(f"{name} at {extent.offset} is not aligned to 8 bytes")
        at = extent.end
    if layout.extents["layout"].end != layout.file_bytes:
        raise ValueError("the layout record is not the end of the file")
    if sum(end - start for start, end in layout.gaps()) > form.MAX_STRUCTURE_BYTES:
        raise ValueError("too many bytes outside the datasets")

"""A new cache: its contents checked, then its file laid out on the disk, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache import schema
from featcache.cache.fileio import reserve, sha256_of, sync_folder, write_at
from featcache.cache.layout import HDF5_SIGNATURE, Extent, Layout, complement, parse_record
from featcache.cache.schema import CacheSizes, Member, SplitRows, SplitSizes
from featcache.cache.storage import parse_meta
from featcache.config import CacheMeta
from featcache.errors import UserError
from featcache.files import remove_temporaries, replacing, storage_errors


@dataclass(frozen=True)
class CacheSpec:
    """Everything about a cache but its features, checked.

    Attributes:
        meta: What the rows are made with.
        arrays: The fixed datasets by name, in the file's types.
        members: Every dataset, in file order.
        sha256: Of each fixed dataset, in hex.
    """

    meta: CacheMeta
    arrays: dict[str, npt.NDArray[Any]]
    members: dict[str, Member]
    sha256: dict[str, str]


def check_contents(
    meta: CacheMeta, class_names: Sequence[str], splits: Sequence[SplitRows]
) -> CacheSpec:
    """Check everything that goes into a cache but the features.

    Raises:
        UserError: The value that a cache cannot hold, by name.
    """
    try:
        meta_json = meta.to_json().encode()
        parse_meta(meta_json)  # what readers will do
    except (ValueError, TypeError) as error:
        raise UserError(f"the settings cannot be stored: {error}") from None
    if not 1 <= len(splits) <= schema.MAX_SPLITS or not 1 <= len(class_names) <= schema.MAX_CLASSES:
        raise UserError(
            f"{len(splits)} splits and {len(class_names)} classes: a cache holds 1 to "
            f"{schema.MAX_SPLITS} splits and 1 to {schema.MAX_CLASSES} classes"
        )
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta_json": np.frombuffer(meta_json, np.uint8),
        "class_names": _encode_texts(class_names, "class name"),
    }
    for split in splits:
        arrays |= _split_arrays(split, len(class_names))
    members = _sizes_of(meta, arrays, splits).members()
    assert all(
        (a.dtype.str, a.shape) == (members[n].dtype, members[n].shape) for n, a in arrays.items()
    )
    sha256 = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    return CacheSpec(meta, arrays, members, sha256)


def _sizes_of(
    meta: CacheMeta, arrays: dict[str, npt.NDArray[Any]], splits: Sequence[SplitRows]
) -> CacheSizes:
    return CacheSizes(
        meta_bytes=arrays["meta_json"].size,
        num_classes=arrays["class_names"].size,
        class_name_bytes=arrays["class_names"].itemsize,
        dtype=schema.FEATURE_DTYPES[meta.dtype],
        num_views=meta.views.num,
        dim=meta.backbone.feature_dim,
        splits={
            split.name: SplitSizes(
                num_rows=len(split.ids),
                id_bytes=arrays[f"{split.name}/ids"].itemsize,
                columns={
                    column: arrays[f"{split.name}/{column}"].itemsize
                    for column in schema.COLUMNS
                    if f"{split.name}/{column}" in arrays
                },
            )
            for split in splits
        },
    )


def _split_arrays(split: SplitRows, num_classes: int) -> dict[str, npt.NDArray[Any]]:
    num = len(split.ids)
    if not schema.is_split_name(split.name):
        raise UserError(f"split name {split.name!r}: letters, digits, _ and -, at most 32")
    if num == 0:
        raise UserError(f"split {split.name} has no samples: a cache needs at least one per split")
    labels, content = np.asarray(split.labels), np.asarray(split.content)
    assert labels.shape == (num,)
    assert content.dtype == np.uint8
    assert content.shape == (num, schema.DIGEST_BYTES)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"label {labels[first]} of {split.ids[first]!r} in {split.name} is not a class: "
            f"there are {num_classes}, counted from 0"
        )
    arrays: dict[str, npt.NDArray[Any]] = {
        "labels": labels.astype("<i8"),
        "ids": _encode_texts(split.ids, f"id in {split.name}"),
        "content": np.ascontiguousarray(content),
    }
    if split.weights is not None:
        arrays["weights"] = _weights(split)
    if split.groups is not None:
        assert len(split.groups) == num
        arrays["groups"] = _encode_texts(split.groups, f"group in {split.name}", unique=False)
    if split.targets is not None:
        arrays |= _targets(split, num_classes)
    return {f"{split.name}/{name}": array for name, array in arrays.items()}


def _targets(split: SplitRows, num_classes: int) -> dict[str, npt.NDArray[Any]]:
    targets = np.asarray(split.targets)
    if targets.ndim > 1:
        assert targets.shape == (len(split.ids), num_classes)
        assert np.isin(targets, (0, 1)).all()
        return {"multihot": targets.astype("|u1")}
    assert targets.shape == (len(split.ids),)
    wrong = np.flatnonzero(~np.isfinite(targets))
    if len(wrong):
        raise UserError(
            f"target {targets[wrong[0]]} of {split.ids[int(wrong[0])]!r} in {split.name}: give "
            "finite numbers"
        )
    return {"targets": targets.astype("<f8")}


def _weights(split: SplitRows) -> npt.NDArray[Any]:
    weights = np.asarray(split.weights).astype("<f4")
    assert weights.shape == (len(split.ids),)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise UserError(
            f"weight {weights[wrong[0]]} of {split.ids[int(wrong[0])]!r} in {split.name}: "
            "give finite numbers, 0 or more"
        )
    return weights


def _encode_texts(
    texts: Sequence[str], what: str, *, unique: bool = True
) -> npt.NDArray[np.bytes_]:
    """Fixed-length UTF-8, padded with zeros.

    Args:
        texts: N texts.
        what: What they are, for messages.
        unique: Whether all must differ.

    Raises:
        UserError: A text that is empty, too long, a duplicate, or not storable.
    """
    width = 0
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} {text!r} is not valid Unicode: rename it") from None
        if not data or b"\0" in data or len(data) > schema.MAX_TEXT_BYTES:
            raise UserError(
                f"{what} {text!r:.80} cannot be stored: 1 to {schema.MAX_TEXT_BYTES} bytes without "
                "NUL; rename it"
            )
        width = max(width, len(data))
    if unique and len(set(texts)) < len(texts):
        duplicate = Counter(texts).most_common(1)[0][0]
        raise UserError(f"{what} {duplicate!r} is a duplicate: names must differ")
    # Not all at once as bytes, which of many millions of names would take the most memory of all.
    return np.fromiter((text.encode() for text in texts), f"S{width}", len(texts))


def create_part(part: Path, spec: CacheSpec) -> None:
    """Lay out an empty cache on the disk, whole or not at all, under the lock on it.

    Raises:
        UserError: There is no room for it.
        StorageError: The file system refused.
    """
    skeleton = _make_skeleton(spec.members)
    remove_temporaries(part)  # left by a run killed at this very point
    _check_room(part, skeleton.file_bytes)
    with storage_errors(part):
        with replacing(part) as draft:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                reserve(fd, skeleton.file_bytes)
                for offset, chunk in skeleton.chunks.items():
                    write_at(fd, chunk, offset)
                _write_known(fd, spec, skeleton.file_bytes, skeleton.offsets)
            finally:
                os.close(fd)
        sync_folder(part.parent)


def _write_known(fd: int, spec: CacheSpec, file_bytes: int, offsets: dict[str, int]) -> None:
    """Write the fixed datasets, and last the layout record with the hash of all that."""
    extents = {
        name: Extent(offsets[name], member.dtype, member.shape, spec.sha256.get(name))
        for name, member in spec.members.items()
    }
    for name, array in spec.arrays.items():
        write_at(fd, np.ascontiguousarray(array).view(np.uint8), offsets[name])
    structure = sha256_of(fd, complement(extents.values(), file_bytes)).hex()
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


@dataclass(frozen=True)
class _Skeleton:
    """An empty cache: size, the HDF5 metadata as offset -> bytes, and each dataset's offset."""

    file_bytes: int
    chunks: dict[int, bytes]
    offsets: dict[str, int]


def _make_skeleton(members: dict[str, Member]) -> _Skeleton:
    """The bytes of an HDF5 file of empty contiguous datasets: the only use of h5py for writing.

    The library is handed a file in memory that records what is written, so it never touches the
    disk: no lock of its own, no half-written metadata, and no disk error inside C code.

    Args:
        members: Datasets by name ("split/name" is in a group), in the order of the file.
    """
    import h5py

    disk = _SparseFile()
    splits = list(dict.fromkeys(name.partition("/")[0] for name in members if "/" in name))
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
        for split in splits:
            file.create_group(split)
        offsets = {
            name: _create_dataset(h5py, file, name, member) for name, member in members.items()
        }
    assert disk.chunks[0].startswith(HDF5_SIGNATURE)
    return _Skeleton(disk.size, disk.chunks, offsets)


def _create_dataset(h5py: Any, file: Any, name: str, member: Member) -> int:
    """Create one dataset without writing it; returns where its bytes will lie."""
    group, _, leaf = name.rpartition("/")
    kind = h5py.h5t.py_create(_h5_dtype(h5py, member.dtype), logical=True)
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)  # equal content, equal file
    space = h5py.h5s.create_simple(member.shape)
    parent = file[group or "/"].id
    dataset = h5py.h5d.create(parent, leaf.encode(), kind, space, create)
    return int(dataset.get_offset())


def _h5_dtype(h5py: Any, dtype: str) -> Any:
    if dtype.startswith("|S"):
        return h5py.string_dtype("utf-8", int(dtype[2:]))
    return np.dtype(dtype)


class _SparseFile(io.RawIOBase):
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

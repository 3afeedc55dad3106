"""Head files: safetensors with JSON metadata; no pickle, and nothing believed unchecked.

Format "featcache-head", version 1. Tensors: `weight` [C, D] and `bias` [C], with `mean` and `scale`
[D] when features were standardised (already folded into weight and bias); or, for knn, `rows`
[N, D] and `labels` [N]. Metadata: `format`, `version`, and `head`, a JSON object of the rest.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import CacheMeta, flatten
from featcache.errors import CacheError, StorageError, UserError
from featcache.files import open_regular, write_atomically
from featcache.heads.knn import KnnHead
from featcache.heads.linear import LinearHead

FORMAT, VERSION = "featcache-head", "1"
MARKS = re.compile(rb'"%s"' % FORMAT.encode())
MAX_FILE_BYTES = 8 << 30
MAX_HEADER_BYTES = 16 << 20
DTYPES = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
}
Head = LinearHead | KnnHead
Tensors = dict[str, NDArray[Any]]


def save_head(path: Path, head: Head, provenance: dict[str, Any] | None = None) -> None:
    """Write a head file, whole or not at all.

    Args:
        path: The .safetensors file.
        head: What to write.
        provenance: Replaces the head's own, if given.

    Raises:
        StorageError: The file system refused.
    """
    from safetensors.numpy import save

    if provenance is not None:
        head = head.replace(provenance=provenance)
    tensors, rest = {}, {}
    for item in dataclasses.fields(head):
        value = getattr(head, item.name)
        if isinstance(value, np.ndarray):
            tensors[item.name] = np.ascontiguousarray(value)
        elif value is not None:
            rest[item.name] = value
    metadata = {"format": FORMAT, "version": VERSION, "head": json.dumps(rest, sort_keys=True)}
    write_atomically(path, save(tensors, metadata=metadata))


def load_head(path: Path | str) -> Head:
    """Read a head file.

    Raises:
        UserError: It is no head file, is damaged, or is of another version.
        StorageError: It cannot be read.
    """
    path = Path(path)
    tensors, metadata = _read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a head file: give one that train-head wrote")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} is of head format version {metadata.get('version')!r:.20}; this featcache "
            f"reads version {VERSION}: upgrade featcache, or run train-head again"
        )
    try:
        rest = json.loads(metadata["head"])
        kind = KnnHead if "rows" in tensors else LinearHead
        names = {item.name for item in dataclasses.fields(kind)}
        if unknown := (rest.keys() | tensors.keys()) - names:
            raise UserError(f"unknown parts {', '.join(sorted(unknown))}")
        parts: dict[str, Any] = {**rest, **tensors}
        head = kind(**parts)
        _check_types(rest)
        _check_values(head, tensors)
    except (UserError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is a damaged head file ({str(error)[:200]}): run train-head again"
        ) from error
    return head


def check_head_fits(head: Head, meta: CacheMeta) -> None:
    """Refuse a head for features that another network or preprocessing made.

    Where the weights file lay does not matter, its content does.

    Args:
        head: With the provenance of the cache it was trained on.
        meta: Of the features to be classified.

    Raises:
        CacheError: Naming the first field that differs.
    """
    theirs = head.provenance.get("backbone")
    if not isinstance(theirs, dict):
        raise CacheError("the head does not say which features it is for: run train-head again")
    ours = flatten(json.loads(json.dumps(dataclasses.asdict(meta.backbone))))
    recorded = flatten(theirs)
    for name in sorted(ours.keys() | recorded.keys()):
        if name != "weights" and ours.get(name) != recorded.get(name):
            raise CacheError(
                f"the head was trained on features with {name} {recorded.get(name)!r}, these have "
                f"{ours.get(name)!r}: run train-head on this cache, or extract-features with the "
                "head's settings"
            )


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a safetensors file and its metadata; every claim of its header is checked."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 8 < size <= MAX_FILE_BYTES:
                raise UserError(f"{path} has {size} bytes: not a head file")
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path} is not a head file: give one that train-head wrote")
            header = _parse_header(file.read(length), path)
            body = file.read()
    except FileNotFoundError:
        raise UserError(f"there is no head file {path}; train-head writes one") from None
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):
            raise UserError(
                f"{path} is not a file ({error.strerror}): give a head that train-head wrote"
            ) from error
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a head file: its metadata is no table")
    return {name: _tensor(name, entry, body, path) for name, entry in header.items()}, metadata


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a head file: its header is not JSON") from error
    if not isinstance(header, dict) or len(header) > 16:
        raise UserError(f"{path} is not a head file: its header is no short table")
    return header


def _tensor(name: str, entry: Any, body: bytes, path: Path) -> NDArray[Any]:
    """One tensor, if its claims about type, shape and place agree."""
    try:
        dtype = np.dtype(DTYPES[entry["dtype"]])
        shape = [int(side) for side in entry["shape"]]
        start, stop = (int(offset) for offset in entry["data_offsets"])
        count = 1
        for side in shape:
            count *= side
        if min(shape, default=0) < 0 or len(shape) > 2 or count == 0:
            raise ValueError(f"shape {shape}")
        if not 0 <= start <= stop <= len(body) or stop - start != count * dtype.itemsize:
            raise ValueError(f"{stop - start} bytes for shape {shape}")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is a damaged head file (tensor {name!r:.40}: {error})") from error
    # A copy: writable, aligned, and the file's bytes can go.
    return np.frombuffer(body[start:stop], dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _check_types(rest: dict[str, Any]) -> None:
    names = rest["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("class_names is no list of names")
    for key in ("chosen", "scores", "provenance"):
        if not isinstance(rest.get(key, {}), dict):
            raise UserError(f"{key} is no table")


def _check_values(head: Head, tensors: Tensors) -> None:
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise UserError(f"{name} holds values that are not finite")
        if name in ("mean", "scale") and values.shape != (head.feature_dim,):
            raise UserError(f"{name} has shape {values.shape}, not [{head.feature_dim}]")

"""What a cache will hold, checked before anything is written: rows, names, metadata."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache import layout as form
from featcache.cache.layout import Extent
from featcache.cache.meta import check_types
from featcache.config import CacheMeta
from featcache.errors import UserError

DTYPES = {"float32": "<f4", "float16": "<f2"}


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split, in order.

    Attributes:
        name: For example "train".
        ids: N different names.
        labels: [N], each in [0, C).
        content: [N, 32], uint8: the sha256 of each sample.
        weights: [N], sample weights, or None.
    """

    name: str
    ids: Sequence[str]
    labels: npt.NDArray[np.integer[Any]]
    content: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """A checked plan of a cache.

    Attributes:
        arrays: What is known before extraction, by dataset name, in the file's types.
        members: Every dataset in the order of the file; offsets are not known yet (0).
    """

    meta: CacheMeta
    arrays: dict[str, npt.NDArray[Any]]
    members: dict[str, Extent]


def make_plan(meta: CacheMeta, class_names: Sequence[str], splits: Sequence[SplitRows]) -> Plan:
    """Check everything that goes into a cache but the features.

    Raises:
        UserError: Something that a cache cannot hold, named.
    """
    try:
        check_types(meta)
    except ValueError as error:
        raise UserError(f"the settings cannot be stored: {error}") from None
    if not 1 <= len(splits) <= form.MAX_SPLITS or not 1 <= len(class_names) <= form.MAX_CLASSES:
        raise UserError(
            f"{len(splits)} splits and {len(class_names)} classes: a cache holds 1 to "
            f"{form.MAX_SPLITS} splits and 1 to {form.MAX_CLASSES} classes"
        )
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta_json": np.frombuffer(meta.to_json().encode(), np.uint8),
        "class_names": encode_texts(class_names, "class name"),
    }
    for split in splits:
        arrays |= _split_arrays(split, len(class_names))
    return Plan(meta, arrays, _members(meta, arrays, splits))


def _split_arrays(split: SplitRows, num_classes: int) -> dict[str, npt.NDArray[Any]]:
    num = len(split.ids)
    if not form.SPLIT_NAME.fullmatch(split.name) or split.name in form.ROOT:
        raise UserError(f"split name {split.name!r}: letters, digits, _ and -, at most 32")
    if num == 0:
        raise UserError(f"split {split.name} has no samples: a cache needs at least one per split")
    labels, content = np.asarray(split.labels), np.asarray(split.content)
    assert labels.shape == (num,)
    assert content.dtype == np.uint8
    assert content.shape == (num, form.DIGEST_BYTES)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"label {labels[first]} of {split.ids[first]!r} in {split.name} is not a class: "
            f"there are {num_classes}, counted from 0"
        )
    arrays: dict[str, npt.NDArray[Any]] = {
        "labels": labels.astype("<i8"),
        "ids": encode_texts(split.ids, f"id in {split.name}"),
        "content": np.ascontiguousarray(content),
    }
    if split.weights is not None:
        arrays["weights"] = _weights(split)
    return {f"{split.name}/{name}": array for name, array in arrays.items()}


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


def encode_texts(texts: Sequence[str], what: str) -> npt.NDArray[np.bytes_]:
    """Fixed-length UTF-8, padded with zeros.

    Args:
        texts: N different texts.
        what: What they are, for messages.

    Raises:
        UserError: A text that is empty, too long, twice there, or not storable.
    """
    encoded = []
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} {text!r} is not valid Unicode: rename it") from None
        if not data or b"\0" in data or len(data) > form.MAX_TEXT_BYTES:
            raise UserError(
                f"{what} {text!r:.80} cannot be stored: 1 to {form.MAX_TEXT_BYTES} bytes without "
                "NUL; rename it"
            )
        encoded.append(data)
    if len(set(encoded)) < len(encoded):
        twice = Counter(texts).most_common(1)[0][0]
        raise UserError(f"{what} {twice!r} is there twice: names must differ")
    return np.array(encoded, dtype=f"S{max(map(len, encoded))}")


def _members(
    meta: CacheMeta, arrays: dict[str, npt.NDArray[Any]], splits: Sequence[SplitRows]
) -> dict[str, Extent]:
    def fixed(name: str) -> Extent:
        array = arrays[name]
        sha = hashlib.sha256(array.tobytes()).hexdigest()
        return Extent(0, array.dtype.str, array.shape, sha)

    members = {name: fixed(name) for name in ("meta_json", "class_names")}
    members["digest"] = Extent(0, "|u1", (form.DIGEST_BYTES,))
    for split in splits:
        names = [f"{split.name}/{name}" for name in form.STATIC]
        members |= {name: fixed(name) for name in names if name in arrays}
        num, blocks = len(split.ids), form.num_blocks(len(split.ids))
        members[f"{split.name}/row_status"] = Extent(0, "|u1", (num,))
        members[f"{split.name}/state"] = Extent(0, "|u1", (blocks,))
        members[f"{split.name}/crc32"] = Extent(0, "<u4", (blocks,))
    for split in splits:
        shape = (meta.views.num, len(split.ids), meta.backbone.feature_dim)
        members[f"{split.name}/features"] = Extent(0, DTYPES[meta.dtype], shape)
    # Last, so that readers find it from the end of the file.
    members["layout"] = Extent(0, "|u1", (form.RECORD_BYTES,))
    return members

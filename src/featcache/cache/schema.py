"""What a cache holds: the name, type and shape of every dataset, and the limits.

This is the one description of the format: the writer lays files out by it, and readers check files
against it. docs/format.md is the specification.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "featcache"
VERSION = 1
BLOCK_ROWS = 64
DIGEST_BYTES = 32
RECORD_BYTES = 32768
"""Size of the layout record, the dataset `layout`."""

MAX_FILE_BYTES = 2**50
MAX_ROWS = 2**33
MAX_SPLITS = 16
MAX_CLASSES = 1_000_000
MAX_DIM = 2**20
MAX_NUM_VIEWS = 256
MAX_META_BYTES = 2**20
MAX_TEXT_BYTES = 4096

FEATURE_DTYPES = {"float32": "<f4", "float16": "<f2"}
RESERVED_NAMES = ("meta_json", "class_names", "digest", "layout")
"""The datasets that belong to no split."""
SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Column:
    """A dataset that a split may have beside `labels`: a value of each row, known from the start.

    Attributes:
        dtype: Of the values; "|S" stands for texts, all as long as the longest.
        per_class: Whether a row has one value for each class.
    """

    dtype: str
    per_class: bool = False

    def member(self, num_rows: int, num_classes: int, item_bytes: int) -> Member:
        """Its type and shape; `item_bytes` is the length of a text."""
        dtype = f"|S{item_bytes}" if self.dtype == "|S" else self.dtype
        shape = (num_rows, num_classes) if self.per_class else (num_rows,)
        return Member(dtype, shape, fixed=True)


COLUMNS = {
    "weights": Column("<f4"),
    "groups": Column("|S"),
    "multihot": Column("|u1", per_class=True),
    "targets": Column("<f8"),
}
"""By name, in file order. A new one also needs a field of `SplitRows`, its reading in
`storage.CacheFile.rows`, and its check in `create`."""

TARGET_COLUMNS: dict[str, str | None] = {
    "multiclass": None,
    "multilabel": "multihot",
    "regression": "targets",
}
"""By task, the column of COLUMNS that every split has, and no cache of another task."""


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split, in order.

    Attributes:
        name: For example "train".
        ids: N different names.
        labels: [N], each in [0, C).
        content: [N, 32], uint8: the sha256 of each sample.
        weights: [N], sample weights, or None.
        groups: N names of what each sample belongs to (patient, camera), or None.
        targets: What samples have instead of one class, or None: 1 for each of their labels and 0
            for the others, uint8 [N, C], or a number, float64 [N]. Labels are then 0.
    """

    name: str
    ids: Sequence[str]
    labels: npt.NDArray[np.integer[Any]]
    content: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.floating[Any]] | None = None
    groups: Sequence[str] | None = None
    targets: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class Member:
    """One dataset: its type, its shape, and whether its bytes are known before extraction.

    The layout record has a sha256 of each fixed one.
    """

    dtype: str
    shape: tuple[int, ...]
    fixed: bool = False


@dataclass(frozen=True)
class SplitSizes:
    """The numbers that fix the datasets of one split; texts have a fixed length in bytes.

    `columns` are those of COLUMNS that it has, with the bytes of one value.
    """

    num_rows: int
    id_bytes: int
    columns: dict[str, int]


@dataclass(frozen=True)
class CacheSizes:
    """The numbers that fix the type and shape of every dataset of a cache."""

    meta_bytes: int
    num_classes: int
    class_name_bytes: int
    dtype: str
    num_views: int
    dim: int
    splits: dict[str, SplitSizes]

    def check(self) -> None:
        """Check the limits of the format.

        Raises:
            ValueError: A number is beyond its limit, or a split's name is not valid.
        """
        if self.dtype not in FEATURE_DTYPES.values():
            raise ValueError(f"features of type {self.dtype}")
        for what, number, limit in (
            ("splits", len(self.splits), MAX_SPLITS),
            ("bytes of metadata", self.meta_bytes, MAX_META_BYTES),
            ("classes", self.num_classes, MAX_CLASSES),
            ("bytes per class name", self.class_name_bytes, MAX_TEXT_BYTES),
            ("views", self.num_views, MAX_NUM_VIEWS),
            ("features per image", self.dim, MAX_DIM),
            *(("rows", split.num_rows, MAX_ROWS) for split in self.splits.values()),
            *(
                ("bytes per text", num_bytes, MAX_TEXT_BYTES)
                for split in self.splits.values()
                for num_bytes in (split.id_bytes, *split.columns.values())
            ),
        ):
            if not 1 <= number <= limit:
                raise ValueError(f"{number} {what}, not 1 to {limit}")
        for name in self.splits:
            if not is_split_name(name):
                raise ValueError(f"split name {name!r:.50}")

    def members(self) -> dict[str, Member]:
        """Every dataset by name ("labels" of split "train" is "train/labels"), in file order."""
        members = {
            "meta_json": Member("|u1", (self.meta_bytes,), fixed=True),
            "class_names": Member(f"|S{self.class_name_bytes}", (self.num_classes,), fixed=True),
            "digest": Member("|u1", (DIGEST_BYTES,)),
        }
        for name, split in self.splits.items():
            rows, blocks = split.num_rows, num_blocks(split.num_rows)
            members[f"{name}/labels"] = Member("<i8", (rows,), fixed=True)
            members[f"{name}/ids"] = Member(f"|S{split.id_bytes}", (rows,), fixed=True)
            members[f"{name}/content"] = Member("|u1", (rows, DIGEST_BYTES), fixed=True)
            for column, item_bytes in split.columns.items():
                member = COLUMNS[column].member(rows, self.num_classes, item_bytes)
                members[f"{name}/{column}"] = member
            members[f"{name}/row_status"] = Member("|u1", (rows,))
            members[f"{name}/state"] = Member("|u1", (blocks,))
            members[f"{name}/crc32"] = Member("<u4", (blocks,))
        for name, split in self.splits.items():
            shape = (self.num_views, split.num_rows, self.dim)
            members[f"{name}/features"] = Member(self.dtype, shape)
        # Last, so that readers find it from the end of the file.
        members["layout"] = Member("|u1", (RECORD_BYTES,))
        return members


def is_split_name(name: str) -> bool:
    """Whether a split may have this name."""
    return SPLIT_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES


def num_blocks(num_rows: int) -> int:
    """Number of blocks that hold `num_rows` rows."""
    return -(-num_rows // BLOCK_ROWS)


def block_range(block: int, num_rows: int) -> range:
    """Rows of block number `block` in a split of `num_rows` rows."""
    return range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows))


def label_texts(
    class_names: list[str],
    labels: npt.NDArray[np.integer[Any]],
    targets: npt.NDArray[Any] | None,
) -> list[str]:
    """Every sample's class, labels ("a|b") or number in words.

    Args:
        class_names: C names.
        labels: Class numbers [N].
        targets: See `SplitRows`.
    """
    if targets is None:
        return [class_names[label] for label in labels.tolist()]
    if targets.ndim == 1:
        return [str(number) for number in targets.tolist()]
    return ["|".join(class_names[label] for label in np.flatnonzero(row)) for row in targets]

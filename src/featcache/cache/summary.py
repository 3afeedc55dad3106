"""What a cache says about itself, without a look at its features: settings, names, counts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from featcache.cache.schema import VERSION
from featcache.cache.storage import CacheFile, texts_of
from featcache.cache.writer import part_path
from featcache.config import CacheMeta, JsonObject
from featcache.errors import CacheError

MAX_SKIPPED = 1000


class SkippedSample(TypedDict):
    """A sample without features; `code` is one of data.REASONS."""

    id: str
    code: int


class SplitInfo(TypedDict):
    """What `info` says about one split.

    `skipped` lists at most MAX_SKIPPED samples; `num_groups` is None where no groups are known.
    """

    num_samples: int
    num_skipped: int
    skipped: list[SkippedSample]
    num_per_class: dict[str, int]
    num_blocks: int
    num_blocks_done: int
    weighted: bool
    num_groups: int | None


class CacheInfo(TypedDict):
    """What `info` says about a cache; `meta` is a CacheMeta as a dict."""

    path: str
    format_version: int
    file_bytes: int
    finished: bool
    digest: str
    feature_dim: int
    num_views: int
    dtype: str
    class_names: list[str]
    splits: dict[str, SplitInfo]
    meta: JsonObject


def read_meta(path: Path) -> tuple[CacheMeta, list[str]]:
    """The metadata and the class names of a finished cache; rows are not looked at.

    Raises:
        CacheError: It is not a finished cache, or is damaged.
    """
    file = CacheFile(Path(path))
    file.check_finished()
    return file.meta, file.class_names


def begun_with(path: Path) -> CacheMeta | None:
    """The metadata of an unfinished cache; None if there is none.

    A damaged one counts as none here: `open_writer` refuses it and says why.
    """
    part = part_path(path)
    if not os.path.lexists(part):
        return None
    try:
        file = CacheFile(part)
        try:
            return file.meta
        finally:
            file.close()
    except CacheError:
        return None


def info(path: Path | str) -> CacheInfo:
    """What `featcache info` prints of a cache, finished or not, for JSON.

    Features are neither read nor checked.

    Raises:
        CacheError: Not a cache, or what it says about itself is damaged.
        StorageError: The file system failed.
    """
    file = CacheFile(Path(path))
    meta = file.meta
    class_names = file.class_names
    splits = {name: _describe(file, name, class_names) for name in file.layout.splits}
    done = all(split["num_blocks_done"] == split["num_blocks"] for split in splits.values())
    return {
        "path": str(file.path),
        "format_version": VERSION,
        "file_bytes": file.layout.file_bytes,
        "finished": done and not file.path.name.endswith(".part"),
        "digest": file.array("digest").tobytes().hex(),
        "feature_dim": meta.backbone.feature_dim,
        "num_views": meta.views.num,
        "dtype": meta.dtype,
        "class_names": class_names,
        "splits": splits,
        "meta": dataclasses.asdict(meta),
    }


def _describe(file: CacheFile, split: str, class_names: list[str]) -> SplitInfo:
    status, state = file.array(f"{split}/row_status"), file.array(f"{split}/state")
    labels = file.fixed(f"{split}/labels").clip(0, len(class_names) - 1)
    bad, columns = np.flatnonzero(status), file.layout.columns(split)
    groups = set(file.fixed(f"{split}/groups").tolist()) if "groups" in columns else None
    counts = np.bincount(labels[status == 0], minlength=len(class_names))
    return {
        "num_samples": len(status),
        "num_skipped": len(bad),
        "skipped": _skipped(file, split, bad[:MAX_SKIPPED]),
        "num_per_class": dict(zip(class_names, counts.tolist(), strict=True)),
        "num_blocks": len(state),
        "num_blocks_done": int((state == 1).sum()),
        "weighted": "weights" in columns,
        "num_groups": None if groups is None else len(groups),
    }


def _skipped(file: CacheFile, split: str, rows: npt.NDArray[np.intp]) -> list[SkippedSample]:
    if not len(rows):
        return []
    ids = texts_of(file.fixed(f"{split}/ids")[rows], file.path)
    codes = file.array(f"{split}/row_status")[rows].tolist()
    return [{"id": name, "code": code} for name, code in zip(ids, codes, strict=True)]

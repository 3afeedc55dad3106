"""Rows that need not be computed: those of an older cache whose samples have the same content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.layout import BLOCK_ROWS
from featcache.cache.reader import meta_of
from featcache.cache.storage import CacheFile
from featcache.config import CacheMeta
from featcache.errors import CacheError


def setting_differences(cached: CacheMeta, wanted: CacheMeta) -> list[tuple[str, object, object]]:
    """Fields, as (name, cached, wanted), that can change a row of the same image."""
    # Which images there are is told by each row's own content hash.
    return [d for d in cached.differences(wanted) if not d[0].startswith("dataset.")]


@dataclass
class _Part:
    """Good rows of one split of one file: content hashes [n, 32] and their row numbers [n]."""

    file: CacheFile
    split: str
    content: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]


class RowSource:
    """Finds rows by the sha256 of their sample in files made with the same settings.

    Blocks that fail their checksum and skipped samples are never found.

    Args:
        files: Open caches, finished or not; an unsound one raises.
        meta: What the wanted rows are made with.

    Raises:
        CacheError: A file is damaged, or was made with other settings (the fields are named).
    """

    def __init__(self, files: Sequence[CacheFile], meta: CacheMeta) -> None:
        self._parts: list[_Part] = []
        for file in files:
            _check_usable(file, meta)
            for split in file.layout.splits:
                good = np.repeat(file.good_blocks(split), BLOCK_ROWS)[: file.layout.num_rows(split)]
                rows = np.flatnonzero(good & (file.array(f"{split}/row_status") == 0))
                content = file.array(f"{split}/content")[rows]
                self._parts.append(_Part(file, split, content, rows))
        heads = [_head(part.content) for part in self._parts] or [np.empty(0, np.uint64)]
        self._starts = np.cumsum([0, *map(len, heads)])
        keys = np.concatenate(heads)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, content: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Places of samples, to be given to `fetch`.

        Args:
            content: [n, 32], uint8: the samples' sha256.

        Returns:
            [n], int64; -1 where there is none.
        """
        if not len(self):
            return np.full(len(content), -1)
        at = np.searchsorted(self._keys, _head(content)).clip(max=len(self._keys) - 1)
        places = self._order[at]
        found = [
            bool((self._content_at(int(place)) == wanted).all())
            for place, wanted in zip(places, content, strict=True)
        ]
        return np.where(found, places, -1)

    def _locate(self, place: int) -> tuple[_Part, int]:
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._parts[part], place - int(self._starts[part])

    def __len__(self) -> int:
        return len(self._keys)

    def _content_at(self, place: int) -> npt.NDArray[np.uint8]:
        part, row = self._locate(place)
        content: npt.NDArray[np.uint8] = part.content[row]
        return content

    def fetch(self, place: int) -> list[npt.NDArray[Any]]:
        """The V views [D] of the row at a place that `find` gave, in the file's dtype."""
        part, row = self._locate(place)
        at = int(part.rows[row])
        views = part.file.layout.extents[f"{part.split}/features"].shape[0]
        return [
            part.file.view_rows(part.split, view, range(at, at + 1))[0] for view in range(views)
        ]


def _head(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The first 8 of 32 bytes as a number to sort by; the rest is compared when found."""
    return np.ascontiguousarray(content[:, :8]).view("<u8")[:, 0].astype(np.uint64)


def _check_usable(file: CacheFile, meta: CacheMeta) -> None:
    if damaged := [name for name in file.damaged_parts() if name != "HDF5 structure"]:
        raise CacheError(
            f"{file.path} is damaged in {', '.join(damaged)}, so its rows cannot be kept: "
            "give --force to extract afresh"
        )
    if differences := setting_differences(meta_of(file), meta):
        raise CacheError(
            f"{file.path} was made with other settings, so its rows cannot be kept: "
            f"{describe_differences(differences)}; give --force to extract afresh"
        )


def describe_differences(differences: Sequence[tuple[str, object, object]]) -> str:
    """For people: "name: there 1, wanted 2; …"."""
    return "; ".join(f"{name}: there {old!r}, wanted {new!r}" for name, old, new in differences)

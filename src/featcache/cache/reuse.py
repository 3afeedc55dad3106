"""Rows that need not be computed again: those of an unfinished cache, or of an older one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.create import CacheSpec
from featcache.cache.schema import BLOCK_ROWS
from featcache.cache.storage import CacheFile
from featcache.config import CacheMeta
from featcache.errors import CacheError


def check_same(file: CacheFile, spec: CacheSpec) -> None:
    """Check that an unfinished file was begun for exactly this cache.

    Raises:
        CacheError: It was begun for a different one (the fields are named), or is damaged.
    """
    if damaged := file.damaged_parts():
        raise CacheError(
            f"{file.path} is damaged in {', '.join(damaged)}: give --force to start over"
        )
    different = f"{file.path} was begun with different"
    advice = "run the earlier command to finish it, or give --force to start over"
    if differences := file.meta.differences(spec.meta):
        raise CacheError(f"{different} settings: {describe_differences(differences)}; {advice}")
    here = {n: (e.dtype, e.shape, e.sha256) for n, e in file.layout.extents.items()}
    wanted = {n: (m.dtype, m.shape, spec.sha256.get(n)) for n, m in spec.members.items()}
    differ = sorted(n for n in here.keys() | wanted.keys() if here.get(n) != wanted.get(n))
    if differ:
        raise CacheError(f"{different} {', '.join(differ)}; {advice}")


def setting_differences(cached: CacheMeta, wanted: CacheMeta) -> list[tuple[str, object, object]]:
    """Fields, as (name, cached, wanted), that can change a row of the same image."""
    # Each row's own content hash says which image it stands for.
    return [d for d in cached.differences(wanted) if not d[0].startswith("dataset.")]


class RowSource:
    """Finds rows by the sha256 of their sample in files made with the same settings.

    Blocks that fail their checksum and skipped samples are never found.

    Args:
        files: Open caches, finished or not; a damaged one raises.
        meta: What the wanted rows are made with.

    Raises:
        CacheError: A file is damaged, or was made with different settings (the fields are named).
    """

    def __init__(self, files: Sequence[CacheFile], meta: CacheMeta) -> None:
        self._parts: list[tuple[CacheFile, str]] = []
        rows, content = [np.empty(0, np.int64)], [np.empty((0, 32), np.uint8)]
        for file in files:
            _check_usable(file, meta)
            for split in file.layout.splits:
                good = np.repeat(file.good_blocks(split), BLOCK_ROWS)[: file.layout.num_rows(split)]
                rows.append(np.flatnonzero(good & (file.array(f"{split}/row_status") == 0)))
                content.append(file.array(f"{split}/content")[rows[-1]])
                self._parts.append((file, split))
        # One place for each good row of every split of every file, in this order.
        self._starts = np.cumsum([len(part) for part in rows])
        self._rows, self._content = np.concatenate(rows), np.concatenate(content)
        keys = _head(self._content)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return len(self._keys)

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
        return np.where((self._content[places] == content).all(axis=1), places, -1)

    def fetch(self, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows [V, n, D] at the n > 0 places that `find` gave, in the file's dtype."""
        parts = np.searchsorted(self._starts, places, side="right") - 1
        rows = self._rows[places]
        neighbors = (np.diff(parts) == 0) & (np.diff(rows) == 1)
        runs = np.split(np.arange(len(places)), np.flatnonzero(~neighbors) + 1)
        return np.concatenate([self._read(int(parts[r[0]]), rows[r]) for r in runs], axis=1)

    def _read(self, part: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Neighboring rows [V, n, D] of one split of one file."""
        file, split = self._parts[part]
        wanted = range(int(rows[0]), int(rows[-1]) + 1)
        return file.all_views(split, wanted)


def _head(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The first 8 of 32 bytes as a number to sort by; the rest is compared when found."""
    return np.ascontiguousarray(content[:, :8]).view("<u8")[:, 0].astype(np.uint64)


def _check_usable(file: CacheFile, meta: CacheMeta) -> None:
    if damaged := file.damaged_datasets():
        raise CacheError(
            f"{file.path} is damaged in {', '.join(damaged)}, so its rows cannot be kept: "
            "give --force to extract everything again"
        )
    if differences := setting_differences(file.meta, meta):
        raise CacheError(
            f"{file.path} was made with different settings, so its rows cannot be kept: "
            f"{describe_differences(differences)}; give --force to extract everything again"
        )


def describe_differences(differences: Sequence[tuple[str, object, object]]) -> str:
    """For messages: "name: cached 1, requested 2; …"."""
    return "; ".join(f"{name}: cached {old!r}, requested {new!r}" for name, old, new in differences)

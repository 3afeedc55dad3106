"""A cache's split as a torch Dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reader import FeatureCache, FeatureSplit
from featcache.errors import CacheError


class FeatureDataset:
    """One split's rows as (features [D] float32, label).

    Give it to a `DataLoader` with any number of workers, forked or spawned: it travels as a path
    and opens the file in each process. Where the features fit into memory, plain arrays
    (`X, y = FeatureCache(path).split("train")`) are much faster than any loader.

    Args:
        path: A finished cache.
        split: For example "train".
        view: Which cached view.

    Raises:
        CacheError: Not a cache, damaged, or without that split or view.
    """

    def __init__(self, path: Path | str, split: str = "train", *, view: int = 0) -> None:
        self.path, self.split, self.view = Path(path).absolute(), split, view
        self._digest: bytes | None = None
        self._rows: FeatureSplit | None = None
        self._pid = -1
        self._open()

    def _open(self) -> FeatureSplit:
        if self._rows is None or self._pid != os.getpid():
            cache = FeatureCache(self.path)
            if self._digest not in (None, cache.digest):
                raise CacheError(f"{self.path} was replaced while it was in use: start again")
            self._digest = cache.digest
            rows = cache.split(self.split)
            if not 0 <= self.view < rows.num_views:
                raise CacheError(
                    f"{self.path} has no view {self.view}: it has {rows.num_views}, counted from 0"
                )
            self._rows, self._pid = rows, os.getpid()
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": -1, "_rows": None}

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[npt.NDArray[np.float32], int]]:
        """Several rows at once, which is what a DataLoader asks for."""
        split = self._open()
        features = split.take(indices, self.view).astype(np.float32)
        return list(zip(features, split.y[list(indices)].tolist(), strict=True))

"""All rows of a cache under one numbering, whatever their split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache
from featcache.errors import UserError
from featcache.heads.features import Floats, Ints, Singles, widen
from featcache.runtime import available_memory

ORDER = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class AllRows:
    """The rows of every split, those of train first.

    Attributes:
        split: The name of each row's split, [N].
        ids: Their names.
        X: Plain features [N, D].
        y: Class indices [N].
        content: Digests of the images [N, 32].
        groups: Names of their groups, [N]; None if a split has none.
        class_names: C names.
        num_train: How many are train rows.
    """

    split: NDArray[np.str_]
    ids: Sequence[str]
    X: Singles
    y: Ints
    content: NDArray[np.uint8]
    groups: NDArray[np.str_] | None
    class_names: list[str]
    num_train: int

    def of(self, name: str) -> Ints:
        """The numbers of a split's rows."""
        return np.flatnonzero(self.split == name)


def all_rows(cache: FeatureCache) -> AllRows:
    """Read a cache that has train rows.

    Raises:
        UserError: It is too large for memory.
        CacheError: A block is damaged.
    """
    names = [name for name in ORDER if cache.splits.get(name)]
    splits = [cache.split(name) for name in names]
    # Features as float32, and copies of them for neighbors and for the folds.
    needed = 4 * 4 * sum(len(split) * split.dim for split in splits)
    if needed > available_memory():
        raise UserError(
            f"audit keeps all features in memory and needs {needed / 2**30:.1f} GiB: free some, or "
            "extract fewer images with --num-train"
        )
    groups = [split.groups for split in splits]
    known = [names for names in groups if names is not None]
    return AllRows(
        split=np.repeat(names, [len(split) for split in splits]),
        ids=[name for split in splits for name in split.ids],
        X=_plain([split.X for split in splits]),
        y=np.concatenate([split.y for split in splits]),
        content=np.concatenate([split.content for split in splits]),
        groups=np.concatenate(known) if len(known) == len(groups) else None,
        class_names=cache.class_names,
        num_train=len(splits[0]),
    )


def _plain(parts: Sequence[Floats]) -> Singles:
    return np.concatenate([widen(part) for part in parts])

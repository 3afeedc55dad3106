"""A cache's splits, checked and ready to learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.cache import FeatureCache, FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.rows import Doubles, Rows, balanced_weights, check_classes, check_rows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """What a head learns from and is scored on.

    Attributes:
        cache: Where the rows come from.
        train: What heads learn from.
        content: A digest per train row [N, 32] uint8.
        val: The dataset's own validation rows, if it has any.
        test: What heads are scored on, once.
        test_ids: Their names.
    """

    cache: FeatureCache
    train: Rows
    content: Any
    val: Rows | None
    test: Rows
    test_ids: list[str]

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes."""
        return self.cache.class_names


def open_cache(config: TrainHeadConfig) -> FeatureCache:
    """Open the cache and see that it has what training needs.

    Raises:
        UserError: It is no cache, or has no train or test split.
    """
    cache = FeatureCache(config.cache)
    for name in ("train", "test"):
        if not cache.splits.get(name):
            filled = ", ".join(split for split, rows in cache.splits.items() if rows)
            raise UserError(
                f"{config.cache} has rows in {filled} but none in {name}: run extract-features on "
                "a dataset with train and test, or with --test-fraction"
            )
    train = cache.split("train")
    check_classes(train.y, cache.class_names)
    if config.tta and train.num_views == 1:
        raise UserError(
            "--tta averages over cached views, and this cache has one: run extract-features with "
            "--views flip, or leave --tta out"
        )
    return cache


def load_data(config: TrainHeadConfig, cache: FeatureCache) -> Data:
    """Read the splits that a head needs.

    Raises:
        UserError: Rows are of no use.
    """
    splits = {n: cache.split(n) for n in ("train", "test", "val") if cache.splits.get(n)}
    rows = {name: load_rows(split, cache.class_names) for name, split in splits.items()}
    train = rows["train"]
    weights = effective_weights(config, splits["train"], train.num_classes)
    return Data(
        cache=cache,
        train=dataclasses.replace(train, weights=weights),
        content=splits["train"].content,
        val=rows.get("val"),
        test=rows["test"],
        test_ids=splits["test"].ids,
    )


def load_rows(split: FeatureSplit, class_names: Sequence[str]) -> Rows:
    """One split as checked rows.

    Raises:
        UserError: It has rows that are of no use.
    """
    views = split.views
    check_rows(views, split.y, split.ids, class_names, split.name)
    return Rows(views=views, y=split.y, weights=sample_weights(split), num_classes=len(class_names))


def sample_weights(split: FeatureSplit) -> Doubles:
    """What the manifest's weight column says of each row, [N]; 1 without one.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """
    if split.weights is None:
        return np.ones(len(split))
    weights = split.weights.astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError(f"the weights of {split.name} must be numbers from 0 on, not all 0")
    return weights


def effective_weights(config: TrainHeadConfig, split: FeatureSplit, num_classes: int) -> Doubles:
    """Sample weights times, if asked for, what balances the classes, [N]."""
    weights = sample_weights(split)
    if config.class_weight == "balanced":
        weights = balanced_weights(split.y, weights, num_classes)
    return weights

"""A cache's splits, checked and ready to learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache, FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.files import Head
from featcache.heads.linear import Floats
from featcache.heads.rows import (
    Doubles,
    Ints,
    Rows,
    balanced_weights,
    check_classes,
    check_finite,
    check_rows,
)
from featcache.results.metrics import checked_weights

# Test rows are scored so many at a time.
TEST_ROWS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TestSplit:
    """What heads are scored on, block by block.

    Attributes:
        y: Class indices [N].
        ids: N sample names.
        num_views: Views that count: all with --tta, else the plain one.
        blocks: Makes an iterator of consecutive rows: features [n, D] of each view that counts.
    """

    __test__ = False  # pytest: not a test

    y: Ints
    ids: list[str]
    num_views: int
    blocks: Callable[[], Iterator[list[Floats]]]

    @property
    def num_rows(self) -> int:
        """Number N of rows."""
        return len(self.y)

    @property
    def name(self) -> str:
        """What was scored, in words."""
        views = f"mean over {self.num_views} views" if self.num_views > 1 else "view 0"
        return f"test, {views} ({self.num_rows} rows)"

    def score(self, head: Head) -> tuple[Ints, Floats]:
        """Predicted classes [N], and the probability given to each [N] float32."""
        predicted, confidence = [], []
        for views in self.blocks():
            total = head.predict_proba(views[0])
            for view in views[1:]:
                total = total + head.predict_proba(view)
            predicted.append(total.argmax(axis=1).astype(np.int64))
            confidence.append((total.max(axis=1) / len(views)).astype(np.float32))
        return np.concatenate(predicted), np.concatenate(confidence)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """What a head learns from, in memory, as it is in the cache.

    Attributes:
        train: The rows.
        content: A digest per train row [N, 32] uint8.
        val: The dataset's own validation rows, if it has any.
    """

    train: Rows
    content: NDArray[np.uint8]
    val: Rows | None

    def take(self, index: Ints) -> Data:
        """Some train rows alone, without a val split: choose on a part of them."""
        return Data(train=self.train.take(index), content=self.content[index], val=None)

    def ready(self, config: TrainHeadConfig, class_names: Sequence[str]) -> Data:
        """Rows that count, with the weights that the command asks for.

        Raises:
            UserError: Fewer than two classes have rows.
        """
        train, content = self.train, self.content
        if not train.weights.all():  # rows of weight 0 are as good as absent
            counted = np.flatnonzero(train.weights)
            train, content = train.take(counted), content[counted]
        check_classes(train.y, class_names)
        if config.class_weight == "balanced":
            weights = balanced_weights(train.y, train.weights, train.num_classes)
            train = dataclasses.replace(train, weights=weights)
        return Data(train=train, content=content, val=self.val)


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
    if config.tta and cache.split("test").num_views == 1:
        raise UserError(
            "--tta averages over cached views, and this cache has one: run extract-features with "
            "--views flip, or leave --tta out"
        )
    return cache


def load_data(cache: FeatureCache) -> Data:
    """Read what a head learns from.

    Raises:
        UserError: Rows are of no use.
    """
    split = cache.split("train")
    train = load_rows(split, cache.class_names)
    val = load_rows(cache.split("val"), cache.class_names) if cache.splits.get("val") else None
    return Data(train=train, content=split.content, val=val)


def open_test(config: TrainHeadConfig, cache: FeatureCache, *, in_memory: bool) -> TestSplit:
    """The test split, mapped, or read anew each time in bounded memory.

    Raises:
        UserError: Rows are of no use.
    """
    split = cache.split("test")
    num_views = split.num_views if config.tta else 1
    mapped = load_rows(split, cache.class_names).views[:num_views] if in_memory else None

    def blocks() -> Iterator[list[Floats]]:
        if mapped is not None:
            for start in range(0, mapped.shape[1], TEST_ROWS):
                yield list(mapped[:, start : start + TEST_ROWS])
            return
        for start in range(0, split.num_places, TEST_ROWS):
            places = range(start, min(start + TEST_ROWS, split.num_places))
            kept, features = split.read(places)
            views = [features, *(split.read(places, v)[1] for v in range(1, num_views))]
            for view in views:
                check_finite(view, split.ids[kept], "test")
            if len(features):
                yield views

    return TestSplit(y=split.y, ids=split.ids, num_views=num_views, blocks=blocks)


def load_rows(split: FeatureSplit, class_names: Sequence[str]) -> Rows:
    """One split as checked rows.

    Raises:
        UserError: It has rows that are of no use.
    """
    views = split.views
    check_rows(views, split.y, split.ids, class_names, split.name)
    return Rows(views=views, y=split.y, weights=sample_weights(split), num_classes=len(class_names))


def sample_weights(split: FeatureSplit) -> Doubles:
    """What each row counts for by the manifest's weight column, [N]; 1 without one.

    The mean over rows that count is one: the common scale of the weights is not the strength's.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """
    if split.weights is None:
        return np.ones(len(split))
    weights = checked_weights(split.weights, split.name)
    return np.asarray(weights / weights[weights > 0].mean())

"""Rows to learn from: a cache's splits, checked, in memory.

Solvers fit `TrainRows`: `Rows`, or `streaming.StreamedRows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featcache.cache import FeatureCache, FeatureSplit, cost_of
from featcache.config import JsonObject, TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.features import Doubles, Floats, Ints, Singles, all_finite, row_blocks, widen
from featcache.heads.solvers.moments import Moments
from featcache.random_order import epoch_order, epoch_views
from featcache.results.metrics import checked_weights

# Rows checked or scored at a time.
BLOCK_ROWS = 8192
# Up to this many values, float64 costs little and reaches the optimum to its last digits.
SMALL = 500_000
# Rows at a time that stay in the processor's cache.
CACHED_ROWS = 1024
# Rows are fetched for this many batches at a time.
FETCH_BATCHES = 64

# Mean and deviation [D] to standardize with.
Scale = tuple[Doubles, Doubles]
# Features [n, D] float32, class indices [n], and weights [n] of mean one over the split unless all
# rows count alike.
Batch = tuple[Singles, Ints, Singles | None]
# Called with the epoch's number from 0; yields its batches.
Batches = Callable[[int], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Features in memory, with what is needed to learn from them.

    Attributes:
        views: Features [V, N, D], any float type; view 0 is the plain image.
        y: Class indices [N].
        weights: What each row counts for, [N], above zero.
        class_names: C names, whether or not each class has rows.
        values: Numbers to estimate instead of classes [N]; `y` is then 0 throughout.
    """

    views: Floats
    y: Ints
    weights: Doubles
    class_names: list[str]
    values: Doubles | None = None

    @property
    def num_rows(self) -> int:
        """Number N of rows, views not counted."""
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return len(self.class_names)

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return int(self.views.shape[2])

    @property
    def num_values(self) -> int:
        """Number of feature values: V * N * D."""
        return int(self.views.size)

    @property
    def plain(self) -> Floats:
        """View 0, [N, D]."""
        plain: Floats = self.views[0]
        return plain

    @property
    def sample(self) -> Rows:
        """Rows in memory to look at: all of them."""
        return self

    def take(self, index: Ints) -> Rows:
        """The rows at `index`, all their views, copied."""
        return dataclasses.replace(
            self,
            views=self.views[:, index],
            y=self.y[index],
            weights=self.weights[index],
            values=None if self.values is None else self.values[index],
        )

    def on_columns(self, columns: slice) -> Rows:
        """The same rows with some of their features, not copied."""
        return dataclasses.replace(self, views=self.views[..., columns])

    def stacked(self) -> tuple[Floats, Ints, Doubles]:
        """Every view as a row of its own: features [V * N, D], labels, weights over V.

        One view is not copied.
        """
        num_views = len(self.views)
        features = self.views.reshape(-1, self.feature_dim)
        return features, np.tile(self.y, num_views), np.tile(self.weights / num_views, num_views)

    def moments(self, shift: Doubles | None = None, *, products: bool = False) -> Moments:
        """Sums over all views; each counts with its part of the row's weight.

        Args:
            shift: See `Moments`; the mean of the first rows unless given.
            products: Whether sums of products are needed.
        """
        if shift is None:
            shift = self.plain[:CACHED_ROWS].mean(axis=0, dtype=np.float64)
        sums = Moments.empty(shift, self.num_classes, products=products)
        exact = np.float64 if products and self.num_values <= SMALL else np.float32
        for view in self.views:
            for cut, block in row_blocks(view, 8 * CACHED_ROWS if products else CACHED_ROWS):
                weights = self.weights[cut] / len(self.views)
                dtype = np.result_type(block.dtype, exact)
                sums.add(block.astype(dtype, copy=False), self.y[cut], weights)
        return sums

    def batches(self, batch_size: int, seed: int, scale: Scale | None = None) -> Batches:
        """Batches of an epoch: every row once, in shuffled order, in one of its views.

        Args:
            batch_size: Rows per batch; the last may have fewer.
            seed: Of order and views.
            scale: What to standardize with, if wanted.
        """
        weights = self.weights / self.weights.mean()

        def batches(epoch: int) -> Iterator[Batch]:
            order = epoch_order(self.num_rows, seed, epoch)
            view = epoch_views(self.num_rows, len(self.views), seed, epoch)
            for first in range(0, len(order), FETCH_BATCHES * batch_size):
                index = order[first : first + FETCH_BATCHES * batch_size]
                X = self.views[view[index], index]
                yield from cut_batches(X, self.y[index], weights[index], batch_size, scale)

        return batches


class TrainRows(Protocol):
    """What solvers fit: `Rows`, or `streaming.StreamedRows`, which are read anew at each pass."""

    @property
    def num_rows(self) -> int:
        """Number N of rows, views not counted."""

    @property
    def num_values(self) -> int:
        """Number of feature values: V * N * D."""

    @property
    def num_classes(self) -> int:
        """Number C of classes."""

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""

    @property
    def sample(self) -> Rows:
        """Some or all of the rows, in memory."""

    def moments(self, *, products: bool = False) -> Moments:
        """Sums over all rows and views; with sums of products if asked for."""

    def batches(self, batch_size: int, seed: int, scale: Scale | None = None) -> Batches:
        """Makes batches: every row once per epoch, shuffled."""


def cut_batches(
    features: Floats, y: Ints, weights: Doubles, batch_size: int, scale: Scale | None
) -> Iterator[Batch]:
    """Cut fetched rows into batches.

    Args:
        features: [n, D], any float type.
        y: Class indices [n].
        weights: [n], of mean one over the split.
        batch_size: Rows per batch; the last may have fewer.
        scale: What to standardize with, if wanted.
    """
    X = widen(features)
    if scale is not None:
        X = ((X - scale[0]) / scale[1]).astype(np.float32)
    own = weights.astype(np.float32)
    alike = bool((own == 1).all())
    for start in range(0, len(y), batch_size):
        cut = slice(start, start + batch_size)
        yield X[cut], y[cut], None if alike else own[cut]


def open_cache(config: TrainHeadConfig) -> FeatureCache:
    """Open the cache and check that it has what training needs.

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


def extraction_of(cache: FeatureCache) -> JsonObject | None:
    """What extract-features recorded beside the cache: seconds and settings; None if nothing."""
    cost = cost_of(cache.path, cache.digest)
    return None if cost is None else {"seconds": cost.seconds, "config": cost.config}


def load_rows(split: FeatureSplit, class_names: list[str]) -> Rows:
    """One split as checked rows.

    Raises:
        UserError: A row cannot be learned from.
    """
    views, y = split.views, classes_of(split)
    check_rows(views, y, split.ids, class_names, split.name)
    return Rows(
        views=views,
        y=y,
        weights=sample_weights(split),
        class_names=class_names,
        values=split.targets if split.targets is not None and split.targets.ndim == 1 else None,
    )


def classes_of(split: FeatureSplit) -> Ints:
    """Class indices [N]; 0 throughout where rows have several labels or a number."""
    return split.y if split.targets is None else np.zeros(len(split), np.int64)


def sample_weights(split: FeatureSplit) -> Doubles:
    """What each row counts for by the manifest's weight column, [N]; 1 without one.

    The mean over rows that count is one, so that scaling all weights does not change the
    regularization.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """
    if split.weights is None:
        return np.ones(len(split))
    weights = checked_weights(split.weights, split.name)
    return np.asarray(weights / weights[weights > 0].mean())


def balanced_weights(y: Ints, weights: Doubles, num_classes: int) -> Doubles:
    """Weights [N] changed so that every class with rows counts alike; their sum stays.

    Args:
        y: Class indices [N].
        weights: What each row counts for otherwise [N].
        num_classes: Number C of classes.
    """
    class_total = np.bincount(y, weights, num_classes).astype(np.float64)
    return np.asarray(weights * balancing_factors(class_total)[y], np.float64)


def balancing_factors(class_total: Doubles) -> Doubles:
    """What to multiply each class's weights with, [C], so that all classes count alike."""
    share = np.divide(1.0, class_total, out=np.zeros(len(class_total)), where=class_total > 0)
    return np.asarray(share * class_total.sum() / np.count_nonzero(class_total))


def check_rows(
    views: Floats, y: Ints, ids: Sequence[str], class_names: Sequence[str], split: str
) -> None:
    """Refuse rows that no head can learn from or be scored on.

    Args:
        views: Features [V, N, D].
        y: Class indices [N].
        ids: N sample ids, for messages.
        class_names: Names of the C classes.
        split: The split's name, for messages.

    Raises:
        UserError: No rows, a label outside the classes, or a value that is not finite.
    """
    if not len(y):
        raise UserError(f"split {split!r} has no rows; run extract-features with more images")
    wrong = np.flatnonzero((y < 0) | (y >= len(class_names)))
    if wrong.size:
        row = int(wrong[0])
        raise UserError(
            f"sample {ids[row]!r} of {split!r} has label {int(y[row])}, but there are "
            f"{len(class_names)} classes; run verify on the cache"
        )
    for view in views:
        for start in range(0, len(y), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            if not surely_finite(view[rows]):
                check_finite(view[rows], ids[rows], split)


def check_finite(block: Floats, ids: Sequence[str], split: str) -> None:
    """Refuse features [n, D] that hold NaN or infinity.

    Raises:
        UserError: Naming the first such sample.
    """
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if bad.size:
        raise UserError(
            f"features of sample {ids[int(bad[0])]!r} in {split!r} are not finite; run verify on "
            "the cache, then extract-features again"
        )


def surely_finite(features: Floats) -> bool:
    """Whether all values are finite, as far as a cheap test can tell; False if in doubt."""
    if features.dtype == np.float16:
        return all_finite(features)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(features.sum()))  # a sum is finite only when all its terms are


def check_classes(y: Ints, class_names: Sequence[str]) -> None:
    """Refuse train rows of a single class.

    Raises:
        UserError: Fewer than two classes have rows.
    """
    present = np.unique(y)
    if len(present) < 2:
        raise UserError(
            f"every train row is {class_names[int(present[0])]!r}: a head needs rows of at least "
            "two classes; run extract-features with more images or another dataset"
        )

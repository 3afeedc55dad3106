"""Train rows read from the cache again and again, in memory that does not grow with their number.

A part of them is kept in memory: held-out rows, which choose, and a sample of the others, which
gives solvers their scale and their start.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featcache.cache import FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.heads.data import sample_weights
from featcache.heads.halves import all_finite, widen
from featcache.heads.linear import Floats
from featcache.heads.rows import Doubles, Ints, check_classes, check_finite
from featcache.heads.steps import FETCH_BATCHES, Batch, Batches, Singles
from featcache.random_order import epoch_order

# Rows read at a time; contiguous in the file, so that a spinning disk keeps up too.
READ_ROWS = 4096
# What is kept in memory, all views together: held-out rows, the sample, a window of shuffled rows.
HELD_BYTES, SAMPLE_BYTES, WINDOW_BYTES = 48 << 20, 96 << 20, 96 << 20
# More held-out rows tell no candidates apart, and every candidate answers for each of them.
MAX_HELD = 100_000
# Rows that are shuffled as one when an epoch's order is drawn.
SHUFFLE_ROWS = 512

Block = tuple[Floats, Ints, Doubles]


@dataclass(eq=False)
class RowStream:
    """The rows of one split, block by block.

    Attributes:
        split: Where they are.
        num_classes: Number C of classes.
        class_factor: What the rows of each class count for, [C], times the row's own weight.
        own: What each row counts for, [N]; None where all count alike.
        held: Numbers of the rows held out, ascending.
        checked: Whether every row was seen to be finite; the first pass finds out.
    """

    split: FeatureSplit
    num_classes: int
    class_factor: Doubles
    own: Doubles | None
    held: Ints
    checked: bool = False

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.split.dim

    @property
    def num_rows(self) -> int:
        """Number N of rows, views not counted, the held-out ones among them."""
        return len(self.split)

    def weights(self, kept: slice | Ints) -> Doubles:
        """What some rows count for."""
        factor = self.class_factor[self.split.y[kept]]
        return factor if self.own is None else factor * self.own[kept]

    def blocks(self, *, with_held: bool) -> Iterator[Block]:
        """All views of all rows once, in order.

        Args:
            with_held: Whether the held-out rows are among them.

        Yields:
            Features [n, D] in the cache's type, class indices [n], weights [n] over the views.

        Raises:
            UserError: A value is not finite.
        """
        num_views = self.split.num_views
        for view in range(num_views):
            for kept, features in self.reads(view):
                y, weights = self.split.y[kept], self.weights(kept) / num_views
                here = within(self.held, kept)
                if with_held or not here.size:
                    yield features, y, weights
                else:
                    fitted = np.ones(len(y), bool)
                    fitted[here] = False
                    yield features[fitted], y[fitted], weights[fitted]
        self.checked = True

    def all_reads(self) -> Iterator[tuple[int, slice, Floats]]:
        """`reads` of every view, with its number."""
        for view in range(self.split.num_views):
            for kept, features in self.reads(view):
                yield view, kept, features

    def reads(self, view: int) -> Iterator[tuple[slice, Floats]]:
        """One view of all rows in order: which rows, and features [n, D] in the cache's type.

        Raises:
            UserError: A value is not finite.
        """
        places = self.split.num_places
        for start in range(0, places, READ_ROWS):
            kept, features = self.split.read(range(start, min(start + READ_ROWS, places)), view)
            if not self.checked and not surely_finite(features):
                check_finite(features, self.split.ids[kept], self.split.name)
            if len(features):
                yield kept, features

    def batches(
        self, batch_size: int, seed: int, scale: tuple[Doubles, Doubles] | None, *, with_held: bool
    ) -> Batches:
        """Batches for the notebook's loop: every row once per epoch, well mixed.

        Groups of 512 neighbouring rows come in random order; as many as fit the window are read,
        and its rows are shuffled before they are cut into batches. Each group is read in one view
        drawn for it. The order depends on the seed, the epoch and the number of rows alone.

        Args:
            batch_size: Rows per batch; the last of a window may have fewer.
            seed: Of order and views.
            scale: Mean and deviation [D] to standardise with, if wanted.
            with_held: Whether the held-out rows are trained on.
        """
        places = self.split.num_places
        num_groups = -(-places // SHUFFLE_ROWS)
        row_bytes = self.feature_dim * 4
        window = max(1, WINDOW_BYTES // (row_bytes * SHUFFLE_ROWS))
        mean_weight = float(self.class_factor @ self.class_counts()) / self.num_rows

        def batches(epoch: int) -> Iterator[Batch]:
            groups = epoch_order(num_groups, seed, epoch)
            random = np.random.default_rng([seed, 0x57E4, epoch])
            for first in range(0, num_groups, window):
                some = groups[first : first + window]
                views = random.integers(self.split.num_views, size=len(some))
                X, y, weights = self._gather(some, views, with_held=with_held)
                order = random.permutation(len(y))
                for start in range(0, len(order), batch_size * FETCH_BATCHES):
                    yield from _cut(
                        X, y, weights, order[start : start + batch_size * FETCH_BATCHES],
                        batch_size, scale, mean_weight,
                    )  # fmt: skip

        return batches

    def class_counts(self) -> Doubles:
        """Rows by class, each counting its own weight, [C]."""
        return np.bincount(self.split.y, self.own, self.num_classes).astype(np.float64)

    def _gather(
        self, groups: Ints, views: Ints, *, with_held: bool
    ) -> tuple[Floats, Ints, Doubles]:
        places = self.split.num_places
        parts: list[Block] = []
        for group, view in zip(groups, views, strict=True):
            start = int(group) * SHUFFLE_ROWS
            places_of = range(start, min(start + SHUFFLE_ROWS, places))
            kept, features = self.split.read(places_of, int(view))
            y, weights = self.split.y[kept], self.weights(kept)
            if not with_held:
                fitted = ~np.isin(np.arange(kept.start, kept.stop), self.held)
                features, y, weights = features[fitted], y[fitted], weights[fitted]
            parts.append((features, y, weights))
        X, y, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        return X, y, weights


def surely_finite(features: Floats) -> bool:
    """Whether all values are finite; no where a cheap look does not tell."""
    if features.dtype == np.float16:
        return all_finite(features)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(features.sum()))


def within(index: Ints, kept: slice) -> Ints:
    """Those of some ascending row numbers that lie in a slice, counted from its start."""
    low, high = np.searchsorted(index, (kept.start, kept.stop))
    return np.asarray(index[low:high] - kept.start)


def _cut(
    X: Floats,
    y: Ints,
    weights: Doubles,
    index: Ints,
    batch_size: int,
    scale: tuple[Doubles, Doubles] | None,
    mean_weight: float,
) -> Iterator[Batch]:
    """Batches of a window's rows at `index`."""
    features: Singles = widen(X[index])
    if scale is not None:
        features = ((features - scale[0]) / scale[1]).astype(np.float32)
    own = (weights[index] / mean_weight).astype(np.float32)
    alike = bool((own == 1).all())
    for start in range(0, len(index), batch_size):
        cut = slice(start, start + batch_size)
        yield features[cut], y[index[cut]], None if alike else own[cut]


def open_stream(config: TrainHeadConfig, split: FeatureSplit, class_names: list[str]) -> RowStream:
    """The split as a stream, with rows to hold out chosen.

    Args:
        config: Says how many (`holdout`, at most what fits) and with which seed.
        split: Train.
        class_names: C names.

    Raises:
        UserError: Fewer than two classes have rows, or weights are of no use.
    """
    own = sample_weights(split) if split.weights is not None else None
    check_classes(split.y if own is None else split.y[own > 0], class_names)
    num_classes = len(class_names)
    stream = RowStream(split, num_classes, np.ones(num_classes), own, np.zeros(0, np.int64))
    if config.class_weight == "balanced":
        counts = stream.class_counts()
        share = np.divide(1.0, counts, out=np.zeros(num_classes), where=counts > 0)
        stream.class_factor = share * counts.sum() / np.count_nonzero(counts)
    stream.held = draw_held(config, split, num_classes)
    return stream


def draw_held(config: TrainHeadConfig, split: FeatureSplit, num_classes: int) -> Ints:
    """Row numbers to hold out, ascending; every class keeps at least one row to be fitted.

    At this size a plain random sample has every class's share well enough.
    """
    most = min(HELD_BYTES // (split.dim * 4 * split.num_views), MAX_HELD)
    count = max(1, min(round(config.holdout * len(split)), most))
    random = np.random.default_rng([config.seed, 0x5E1EC7])
    drawn = np.sort(random.choice(len(split), count, replace=False, shuffle=False))
    left = np.bincount(split.y, minlength=num_classes) - np.bincount(
        split.y[drawn], minlength=num_classes
    )
    return _counted(split, drawn[left[split.y[drawn]] > 0])


def draw_sample(config: TrainHeadConfig, stream: RowStream) -> Ints:
    """Row numbers of a sample of the rows that are not held out, ascending."""
    most = SAMPLE_BYTES // (stream.feature_dim * 4 * stream.split.num_views)
    random = np.random.default_rng([config.seed, 0x5A4B])
    count = min(most, stream.num_rows)
    drawn = random.choice(stream.num_rows, count, replace=False, shuffle=False)
    return _counted(stream.split, np.setdiff1d(drawn, stream.held))


def _counted(split: FeatureSplit, index: Ints) -> Ints:
    """Those of some rows whose weight is not 0."""
    return index if split.weights is None else index[split.weights[index] > 0]


Item = TypeVar("Item")


def read_ahead(blocks: Callable[[], Iterator[Item]], depth: int = 2) -> Iterator[Item]:
    """Yield what `blocks` yields, reading a little ahead on another thread.

    Leaving early stops the thread; what it raises is raised here.

    Args:
        blocks: Makes the iterator; called on the other thread.
        depth: Blocks that wait at most.
    """
    waiting: queue.Queue[Item | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Item | BaseException | None) -> None:
        while not left.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for block in blocks():
                put(block)
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()

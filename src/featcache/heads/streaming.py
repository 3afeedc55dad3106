"""Train rows read from the cache at every pass, in memory that does not grow with their number.

One first pass keeps held-out rows, which choose, and a sample of the others in memory, and sums up
moments. After it, ridge needs no other pass; logistic chooses C on the sample and then passes over
all rows, starting where the sample's fit ended; adam and sgd read shuffled windows.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from featcache.cache import FeatureCache, FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.groups import hold_out_units, kept_together
from featcache.heads.features import Doubles, Floats, Ints, widen
from featcache.heads.selection import InMemoryData, Selection, load_data
from featcache.heads.solvers.moments import Moments
from featcache.heads.solvers.softmax_loss import Block
from featcache.heads.training_data import (
    FETCH_BATCHES,
    Batch,
    Batches,
    Rows,
    Scale,
    balancing_factors,
    check_classes,
    check_finite,
    cut_batches,
    sample_weights,
    surely_finite,
)
from featcache.random_order import epoch_order
from featcache.runtime import available_memory

# With --stream auto, train splits larger than this part of the free memory are streamed.
MEMORY_SHARE = 0.25
# Rows read at a time; contiguous in the file, so that a spinning disk keeps up too.
READ_ROWS = 4096
# Kept in memory, all views together: held-out rows, the sample, a window of shuffled rows.
HELD_BYTES, SAMPLE_BYTES, WINDOW_BYTES = 48 << 20, 96 << 20, 96 << 20
# More held-out rows do not tell candidates apart better, and each candidate predicts all of them.
MAX_HELD = 100_000
# Neighboring rows that are shuffled as one when an epoch's order is drawn.
SHUFFLE_ROWS = 512

Item = TypeVar("Item")


@dataclass(eq=False)
class RowReader:
    """Reads the rows of one split, block by block.

    Attributes:
        split: Where they are.
        class_names: C names.
        class_factor: What the rows of each class count for, [C], times the row's own weight.
        own: What each row counts for, [N]; None where all count alike.
        checked: Whether every row is known to be finite; the first pass finds out.
    """

    split: FeatureSplit
    class_names: list[str]
    class_factor: Doubles
    own: Doubles | None
    checked: bool = False

    def weights(self, kept: slice | Ints) -> Doubles:
        """What some rows count for."""
        factor: Doubles = self.class_factor[self.split.y[kept]]
        return factor if self.own is None else factor * self.own[kept]

    def rows(self, index: Ints, views: Floats) -> Rows:
        """Rows in memory: those at `index`, given their features [V, n, D]."""
        return Rows(
            views=views,
            y=self.split.y[index],
            weights=self.weights(index),
            class_names=self.class_names,
        )

    def blocks(self) -> Iterator[tuple[int, slice, Floats]]:
        """All rows of every view once, in order.

        Yields:
            The view, which rows, and their features [n, D] in the cache's type.

        Raises:
            UserError: A value is not finite.
        """
        places = self.split.num_places
        for view in range(self.split.num_views):
            for start in range(0, places, READ_ROWS):
                kept, features = self.split.read(range(start, min(start + READ_ROWS, places)), view)
                if not self.checked and not surely_finite(features):
                    check_finite(features, self.split.ids[kept], self.split.name)
                if len(features):
                    yield view, kept, features
        self.checked = True


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedRows:
    """Train rows that are read anew at each pass: all of them, or all but the held-out ones.

    Implements `TrainRows`; only `sample` is in memory.

    Attributes:
        reader: Reads them.
        left_out: Numbers of the rows that do not take part, ascending.
        sample: Some of the rows, in memory.
        sums: Moments of all of them, from the first pass.
    """

    reader: RowReader
    left_out: Ints
    sample: Rows
    sums: Moments

    @property
    def num_rows(self) -> int:
        """Number N of rows, views not counted."""
        return len(self.reader.split) - len(self.left_out)

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return len(self.reader.class_names)

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.reader.split.dim

    @property
    def num_values(self) -> int:
        """Number of feature values: V * N * D."""
        return self.reader.split.num_views * self.num_rows * self.feature_dim

    def moments(self, *, products: bool = False) -> Moments:
        """Sums over all rows and views; nothing is read for them."""
        assert self.sums.second is not None or not products
        return self.sums

    def blocks(self, ready: Callable[[Block], Block]) -> Iterator[Block]:
        """All views of all rows once, in order, read ahead on another thread.

        Args:
            ready: Applied to each block on that thread: features [n, D] in the cache's type, class
                indices [n], weights [n] over the views.
        """
        split = self.reader.split

        def blocks() -> Iterator[Block]:
            for _, kept, features in self.reader.blocks():
                weights = self.reader.weights(kept) / split.num_views
                yield ready(self._taking_part(kept, features, weights))

        return read_ahead(blocks)

    def batches(self, batch_size: int, seed: int, scale: Scale | None = None) -> Batches:
        """Batches of an epoch: every row once, well mixed.

        Groups of 512 neighboring rows come in random order; as many as fit the window are read,
        and its rows are shuffled before they are cut into batches. Each group is read in one view
        drawn for it. The order depends on the seed, the epoch and the number of rows alone.

        Args:
            batch_size: Rows per batch; the last of a window may have fewer.
            seed: Of order and views.
            scale: What to standardize with, if wanted.
        """
        split = self.reader.split
        num_groups = -(-split.num_places // SHUFFLE_ROWS)
        window = max(1, WINDOW_BYTES // (self.feature_dim * 4 * SHUFFLE_ROWS))
        mean_weight = self.sums.total / self.num_rows

        def batches(epoch: int) -> Iterator[Batch]:
            groups = epoch_order(num_groups, seed, epoch)
            random = np.random.default_rng([seed, 0x57E4, epoch])
            for first in range(0, num_groups, window):
                some = groups[first : first + window]
                X, y, weights = self._gather(some, random.integers(split.num_views, size=len(some)))
                order = random.permutation(len(y))
                for start in range(0, len(order), batch_size * FETCH_BATCHES):
                    index = order[start : start + batch_size * FETCH_BATCHES]
                    own = weights[index] / mean_weight
                    yield from cut_batches(X[index], y[index], own, batch_size, scale)

        return batches

    def _gather(self, groups: Ints, views: Ints) -> tuple[Floats, Ints, Doubles]:
        """Read groups of neighboring rows, each in its view."""
        split = self.reader.split
        parts: list[tuple[Floats, Ints, Doubles]] = []
        for group, view in zip(groups, views, strict=True):
            start = int(group) * SHUFFLE_ROWS
            places = range(start, min(start + SHUFFLE_ROWS, split.num_places))
            kept, features = split.read(places, int(view))
            parts.append(self._taking_part(kept, features, self.reader.weights(kept)))
        X, y, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        return X, y, weights

    def _taking_part(
        self, kept: slice, features: Floats, weights: Doubles
    ) -> tuple[Floats, Ints, Doubles]:
        """A block without the rows that are left out."""
        y, out = self.reader.split.y[kept], within(self.left_out, kept)
        if not out.size:
            return features, y, weights
        taking = np.ones(len(y), bool)
        taking[out] = False
        return features[taking], y[taking], weights[taking]


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedData:
    """A train split to learn from in bounded memory.

    Attributes:
        reader: Reads it.
        streamed: True; see `InMemoryData`.
    """

    reader: RowReader
    streamed: bool = True

    def selection(self, config: TrainHeadConfig) -> Selection:
        """Read everything once: what chooses, a sample, and the sums that solvers need.

        Args:
            config: Has the held-out share, the solver, and the seed.
        """
        reader = self.reader
        held_index = draw_held(config, reader.split, len(reader.class_names))
        sample_index = draw_sample(config, reader.split, held_index)
        parts: list[tuple[Ints, dict[int, list[Any]]]] = [(held_index, {}), (sample_index, {})]
        sums: Moments | None = None
        # Allocating memory for every block would cost as much as the arithmetic.
        buffer = np.empty((READ_ROWS, reader.split.dim), np.float32)
        for view, kept, features in read_ahead(reader.blocks):
            for index, found in parts:
                found.setdefault(view, []).append(features[within(index, kept)])
            X = widen(features, buffer[: len(features)])
            weights = reader.weights(kept) / reader.split.num_views
            weights[within(held_index, kept)] = 0.0
            if sums is None:
                products = config.solver in ("ridge", "auto")
                shift = X.mean(axis=0, dtype=np.float64)
                sums = Moments.empty(shift, len(reader.class_names), products=products)
            sums.add(X, reader.split.y[kept], weights)
        assert sums is not None
        held, sample = (
            reader.rows(index, np.stack([np.concatenate(blocks) for blocks in found.values()]))
            for index, found in parts
        )
        rest = StreamedRows(reader=reader, left_out=held_index, sample=sample, sums=sums)
        of_held = held.moments(sums.shift, products=sums.second is not None)
        train = dataclasses.replace(rest, left_out=held_index[:0], sums=sums.plus(of_held))
        name = f"a held-out random {held.num_rows} rows of train, seed {config.seed}"
        return Selection(train=train, pairs=[(rest, held)] if held.num_rows else [], name=name)


def open_data(
    config: TrainHeadConfig, cache: FeatureCache, index: Ints | None
) -> InMemoryData | StreamedData:
    """What to learn from: in memory, or as a stream where that is asked for or needed.

    Args:
        config: The command's settings.
        cache: Has a train split.
        index: Learn from these train rows alone, without a val split; all unless given.

    Raises:
        UserError: Rows cannot be learned from, or the settings need all of them in memory.
    """
    if index is not None:
        return load_data(cache).take(index)
    split = cache.split("train")
    if not wants_stream(config, split):
        return load_data(cache)
    class_names = cache.class_names
    own = sample_weights(split) if split.weights is not None else None
    check_classes(split.y if own is None else split.y[own > 0], class_names)
    factor = np.ones(len(class_names))
    if config.class_weight == "balanced":
        factor = balancing_factors(np.bincount(split.y, own, len(class_names)).astype(np.float64))
    return StreamedData(reader=RowReader(split, class_names, factor, own))


def wants_stream(config: TrainHeadConfig, split: FeatureSplit) -> bool:
    """Whether to stream: as --stream says, or when train is large compared to free memory.

    Few-shot samples are small whatever the size of train: auto never streams for them.

    Raises:
        UserError: A setting needs all rows in memory.
    """
    size = split.num_views * len(split) * split.dim * 4
    large = size > MEMORY_SHARE * available_memory() and config.shots is None
    if config.stream == "off" or not (large or config.stream == "on"):
        return False
    why = "--stream on" if config.stream == "on" else f"{size / 2**30:.1f} GiB of train features"
    logistic_elsewhere = config.solver == "logistic" and config.backend in ("sklearn", "torch")
    for flag, given in (
        ("--solver knn", config.solver == "knn"),
        ("--select cv", config.select == "cv"),
        (f"--backend {config.backend}", logistic_elsewhere),
        ("--shots", config.shots is not None),
    ):
        if given:
            raise UserError(
                f"{flag} needs all rows in memory, which {why} rules out: leave it out, or give "
                "--stream off"
            )
    return True


def draw_held(config: TrainHeadConfig, split: FeatureSplit, num_classes: int) -> Ints:
    """Row numbers to hold out, ascending; every class keeps at least one row to be fitted.

    A plain random sample is close enough to every class's share; groups stay together.
    """
    most = min(HELD_BYTES // (split.dim * 4 * split.num_views), MAX_HELD)
    count = max(1, min(round(config.holdout * len(split)), most))
    random = np.random.default_rng([config.seed, 0x5E1EC7])
    if split.groups is not None:
        units, order = kept_together(split.content, split.groups), random.permutation(len(split))
        return _counted(split, hold_out_units(order, units, split.y, count / len(split)))
    drawn = np.sort(random.choice(len(split), count, replace=False, shuffle=False))
    left = np.bincount(np.delete(split.y, drawn), minlength=num_classes)
    return _counted(split, drawn[left[split.y[drawn]] > 0])


def draw_sample(config: TrainHeadConfig, split: FeatureSplit, held: Ints) -> Ints:
    """Row numbers of a sample of the rows that are not held out, ascending."""
    most = SAMPLE_BYTES // (split.dim * 4 * split.num_views)
    random = np.random.default_rng([config.seed, 0x5A4B])
    drawn = random.choice(len(split), min(most, len(split)), replace=False, shuffle=False)
    return _counted(split, np.setdiff1d(drawn, held))


def _counted(split: FeatureSplit, index: Ints) -> Ints:
    """Those of some rows whose weight is not 0."""
    return index if split.weights is None else index[split.weights[index] > 0]


def within(index: Ints, kept: slice) -> Ints:
    """Those of some ascending row numbers that lie in a slice, counted from its start."""
    low, high = np.searchsorted(index, (kept.start, kept.stop))
    return np.asarray(index[low:high] - kept.start)


def read_ahead(blocks: Callable[[], Iterator[Item]], depth: int = 2) -> Iterator[Item]:
    """Yield what `blocks` yields, reading a little ahead on another thread.

    Leaving early stops the thread; an error there is raised here.

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

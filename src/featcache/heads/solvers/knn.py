"""k nearest neighbors: the rows themselves are the head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import UserError
from featcache.heads.features import Floats, checked_features, row_blocks
from featcache.heads.linear import BaseHead
from featcache.heads.solvers.base import FittedHead, HeldOutPredictions, Metric, Settings
from featcache.heads.training_data import Rows, TrainRows

# How sharply votes fall with distance: a cosine similarity lower by this much counts 1/e.
TEMPERATURE = 0.07
# Similarities computed at a time.
BLOCK_VALUES = 1 << 24
# Shares of votes become logits; no votes at all would be minus infinity.
SMALLEST_SHARE = 1e-12
# Candidates for k.
K_GRID = (50, 20, 10, 5, 3, 1)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class KnnHead(BaseHead):
    """Votes of the k nearest train rows; closer rows count more.

    cosine: rows are scaled to length one, a neighbor's vote is exp(similarity / 0.07).
    euclidean: a neighbor's vote is one over its distance. Votes carry the row's weight.

    Attributes:
        rows: Train features [N, D], float16, float32 or float64.
        labels: Their class indices [N] int64.
        k: Number of neighbors.
        metric: How nearness is measured.
        row_weights: What each row counts for, [N], unless all count alike.
    """

    rows: Floats
    labels: NDArray[np.int64]
    k: int = 10
    metric: Metric = "cosine"
    row_weights: Floats | None = None
    solver: str = "knn"

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.labels.shape != (len(self.rows),) or not len(self.rows):
            raise UserError(
                f"knn needs rows [N, D] and labels [N], not {self.rows.shape} and "
                f"{self.labels.shape}"
            )
        if self.labels.dtype.kind != "i" or not (
            0 <= self.labels.min() <= self.labels.max() < len(self.class_names)
        ):
            raise UserError(f"knn labels must be class numbers below {len(self.class_names)}")
        if self.row_weights is not None and self.row_weights.shape != self.labels.shape:
            raise UserError(f"knn row_weights {self.row_weights.shape} do not match its rows")
        if self.metric not in ("cosine", "euclidean") or not isinstance(self.k, int) or self.k < 1:
            raise UserError(f"knn with k={self.k!r:.20} and metric {self.metric!r:.20}")

    @property
    def feature_dim(self) -> int:  # noqa: D102 - as for every head
        return int(self.rows.shape[1])

    @property
    def num_params(self) -> int:
        """0: nothing is trained."""
        return 0

    def decision_function(self, X: ArrayLike) -> Floats:
        """Logits [N, C] of features [N, D]: logarithms of the shares of the votes."""
        return np.log(np.maximum(self.shares(X), SMALLEST_SHARE))

    def shares(self, X: ArrayLike) -> Floats:
        """Share of the votes by class, [N, C], for features [N, D]."""
        features = checked_features(X, self.feature_dim)
        found = [
            vote(near, self, k=self.k) for near in nearest(self.rows, features, self.k, self.metric)
        ]
        return np.concatenate(found) if found else np.zeros((0, len(self.class_names)), np.float32)


@dataclass(frozen=True)
class Neighbors:
    """The nearest train rows of some features, nearest first.

    Attributes:
        index: Row numbers [n, k].
        log_votes: Logarithm of each one's vote [n, k]: no distance is too large for it.
    """

    index: NDArray[np.int64]
    log_votes: Floats


def nearest(rows: Floats, features: Floats, k: int, metric: Metric) -> Iterator[Neighbors]:
    """Find the k nearest rows of every feature.

    Args:
        rows: Train features [N, D].
        features: [M, D].
        k: At most N neighbors are found.
        metric: cosine or euclidean.

    Yields:
        The neighbors of consecutive features.
    """
    k = min(k, len(rows))
    dtype = np.float64 if rows.dtype == np.float64 else np.float32
    # Distances do not change under translation; near the origin they lose fewer digits.
    center = rows.mean(axis=0, dtype=np.float64).astype(dtype) if metric == "euclidean" else None
    base = _ready(rows.astype(dtype), center)
    squares = np.einsum("nd,nd->n", base, base) if metric == "euclidean" else None
    for _, block in row_blocks(features, max(1, BLOCK_VALUES // len(rows))):
        query = _ready(block.astype(dtype), center)
        closeness = query @ base.T
        if squares is not None:
            closeness *= 2
            closeness -= squares
        index = _largest(closeness, k)
        top = np.take_along_axis(closeness, index, axis=1)
        if squares is None:
            log_votes = top / TEMPERATURE
        else:
            own = np.einsum("nd,nd->n", query, query)
            # The expanded square rounds; the few distances that count are computed directly.
            distance = np.linalg.norm(query[:, None] - base[index], axis=2)
            floor = np.finfo(dtype).eps * np.sqrt(own + squares.max())[:, None]
            log_votes = -np.log(np.maximum(distance, floor + np.finfo(dtype).tiny))
        yield Neighbors(index, log_votes)


def vote(near: Neighbors, head: KnnHead, *, k: int) -> Floats:
    """Share of the first k neighbors' votes by class, [n, C]."""
    index, log_votes = near.index[:, :k], near.log_votes[:, :k]
    votes = np.exp(log_votes - log_votes.max(axis=1, keepdims=True))
    if head.row_weights is not None:
        votes = votes * head.row_weights[index]
    shares = np.zeros((len(index), len(head.class_names)), votes.dtype)
    np.add.at(shares, (np.arange(len(index))[:, None], head.labels[index]), votes)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _ready(features: Floats, center: Floats | None) -> Floats:
    """Centered for distances, or of unit length for similarities; zero rows stay zero."""
    if center is not None:
        return np.asarray(features - center)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(length > 0, length, 1))


def _largest(closeness: Floats, k: int) -> NDArray[np.int64]:
    """Column numbers [n, k] of the k largest of each row, largest first, ties by column."""
    num, width = closeness.shape
    some = np.arange(width)[None].repeat(num, 0) if k == width else _candidates(closeness, k)
    if k < some.shape[1]:
        values = np.take_along_axis(closeness, some, axis=1)
        best = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
        some = np.sort(np.take_along_axis(some, best, axis=1), axis=1)
    order = np.argsort(-np.take_along_axis(closeness, some, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, axis=1))


def _candidates(closeness: Floats, k: int) -> NDArray[np.int64]:
    """Column numbers [n, m] of a few values in each row that include the k largest.

    Columns are divided into sets. Only the k sets with the largest maxima can have one of the k
    largest values, and finding maxima takes a tenth of the time of a partition.
    """
    num, width = closeness.shape
    sets = min(width, max(k, round(math.sqrt(k * width))))
    size = width // sets
    whole = closeness[:, : sets * size].reshape(num, size, sets)
    best = np.argpartition(whole.max(axis=1), sets - k, axis=1)[:, -k:]
    members = best[:, None] + sets * np.arange(size)[None, :, None]
    rest = np.arange(sets * size, width)[None].repeat(num, 0)
    return np.concatenate([members.reshape(num, -1), rest], axis=1)


@dataclass(frozen=True, kw_only=True)
class KnnSolver:
    """k nearest neighbors among the plain views, as `train-head` uses it.

    Attributes:
        k: The only k to try, if given.
    """

    k: int | None = None
    name: str = "knn"
    backend: str = "numpy"
    patience: int | None = None

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Every number of neighbors by cosine, then by Euclidean distance."""
        ks = K_GRID if self.k is None else (self.k,)
        return [
            [{"k": k, "metric": metric} for k in ks if k <= rows.num_rows or len(ks) == 1]
            for metric in get_args(Metric)
        ]

    def default(self) -> Settings:
        """The nearest by cosine."""
        return {"k": 1 if self.k is None else self.k, "metric": "cosine"}

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> PreparedKnn:
        """Take rows, which must be in memory."""
        assert isinstance(rows, Rows)
        return PreparedKnn(rows, max(int(c["k"]) for c in candidates))


class PreparedKnn:
    """Rows to be neighbors; they are searched once per metric, for the largest k."""

    def __init__(self, rows: Rows, largest_k: int) -> None:
        self._rows, self._largest_k = rows, largest_k
        self._found: tuple[Rows, Metric, list[Neighbors]] | None = None

    def fit(self, settings: Settings) -> FittedHead[KnnHead]:
        """The rows as a head."""
        rows = self._rows
        alike = bool(np.ptp(rows.weights) == 0)
        head = KnnHead(
            rows=np.ascontiguousarray(rows.plain),
            labels=rows.y,
            class_names=rows.class_names,
            k=int(settings["k"]),
            metric=settings["metric"],
            row_weights=None if alike else rows.weights.astype(np.float32),
        )
        return FittedHead(head=head)

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Classes; the first call for some rows finds the neighbors for every k."""
        head = self.fit(settings).head
        if self._found is None or self._found[:2] != (held, head.metric):
            near = list(nearest(head.rows, held.plain, self._largest_k, head.metric))
            self._found = (held, head.metric, near)
        votes = [vote(near, head, k=head.k).argmax(axis=1) for near in self._found[2]]
        return HeldOutPredictions(np.concatenate(votes).astype(np.int64))

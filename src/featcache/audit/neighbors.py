"""Near-duplicates and outliers, from the similarity of every row to every train row.

All similarities are computed, none approximated: N x N cosines, block by block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from featcache.audit.rows import AllRows
from featcache.heads.features import Doubles, Floats, Ints
from featcache.heads.solvers.knn import TEMPERATURE, nearest

# Robust deviations of the logarithm: of normal values, 3 in 100,000 lie farther out.
FAR = 4.0
# Equal features: cosines in float32 differ from 1 by less.
EQUAL = 1e-6
# Quantiles of a normal distribution, one deviation around the median.
LOW, HIGH = 0.158655, 0.841345


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighborhood:
    """The nearest train rows of every row, itself left out.

    Attributes:
        index: Train rows, nearest first, [N, k].
        cosine: Their similarity, [N, k].
    """

    index: Ints
    cosine: Floats


def neighborhood(rows: AllRows, k: int) -> Neighborhood:
    """Find the k nearest train rows of every row by cosine similarity.

    Args:
        rows: All rows.
        k: At most the number of train rows less one are found.
    """
    k = min(k, rows.num_train - 1)
    found = list(nearest(rows.X[: rows.num_train], rows.X, k + 1, "cosine"))
    index = np.concatenate([near.index for near in found])
    cosine = np.concatenate([near.log_votes for near in found]) * TEMPERATURE
    itself = index == np.arange(len(index))[:, None]
    others = np.argsort(itself, axis=1, kind="stable")[:, :k]
    return Neighborhood(
        index=np.take_along_axis(index, others, axis=1),
        cosine=np.take_along_axis(cosine, others, axis=1),
    )


def near_threshold(near: Neighborhood) -> float:
    """The cosine similarity from which two images count as near-duplicates.

    Most images have no near-duplicate. The distance (one less cosine) to the nearest train image is
    roughly log-normal over them, so its median, and the spread between median and upper 84 % of its
    logarithm, say what is usual; duplicates are in the other tail and move neither. A pair closer
    than FAR spreads below the median is closer than images come by chance.
    """
    distance = 1 - near.cosine[:, :1].astype(np.float64)
    distance = distance[distance > EQUAL]
    if not distance.size:
        return 1 - EQUAL
    logs = np.log(distance)
    median, high = np.quantile(logs, [0.5, HIGH])
    return 1 - max(math.exp(median - FAR * (high - median)), EQUAL)


def near_pairs(rows: AllRows, near: Neighborhood, threshold: float) -> tuple[Ints, Floats]:
    """Pairs of images above a threshold that are not identical, the most similar first.

    Only pairs with a train image are looked at, and of an image the k nearest.

    Returns:
        Row numbers [P, 2], the train image last, and cosines [P].
    """
    at, rank = np.nonzero(near.cosine >= threshold)
    pairs = np.stack([at, near.index[at, rank]], axis=1)
    cosine = near.cosine[at, rank]
    both = pairs[:, 0] < rows.num_train
    pairs[both] = np.sort(pairs[both], axis=1)[:, ::-1]
    _, first = np.unique(pairs, axis=0, return_index=True)
    differ = (rows.content[pairs[first, 0]] != rows.content[pairs[first, 1]]).any(axis=1)
    kept = first[differ]
    order = kept[np.lexsort((kept, -cosine[kept]))]
    return pairs[order], cosine[order]


def outliers(near: Neighborhood) -> tuple[Ints, Doubles]:
    """Rows that lie far from all train rows, the farthest first.

    The distance is one less the mean cosine to the k nearest train rows. Those more than FAR
    spreads above the median of its logarithm are given; the spread is that below the median.

    Returns:
        Row numbers [M], and the distance of every row [N].
    """
    distance = 1 - near.cosine.mean(axis=1, dtype=np.float64)
    logs = np.log(np.maximum(distance, EQUAL))
    low, median = np.quantile(logs, [LOW, 0.5])
    far = np.flatnonzero(logs > median + FAR * max(median - low, EQUAL))
    return far[np.argsort(-distance[far], kind="stable")], distance

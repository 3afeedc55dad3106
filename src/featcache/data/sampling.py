"""Seeded, stratified choice of samples.

Samples are ranked by a hash of seed and id, not by a random generator: the choice is the same on
every machine and version, and hardly moves when a dataset grows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.data.copies import same_content
from featcache.data.dataset import ImageSplit
from featcache.errors import UserError

Int64 = NDArray[np.int64]


def quotas(counts: Sequence[int], total: int) -> list[int]:
    """Share `total` among classes in proportion to `counts`, by largest remainder.

    Every share is within one of the exact proportion; the sum is `total`. Ties go to the class
    that comes first.
    """
    population = sum(counts)
    assert 0 <= total <= population
    exact = [count * total for count in counts]  # in units of 1 / population
    shares = [e // population for e in exact] if population else [0] * len(counts)
    by_remainder = sorted(
        range(len(counts)), key=lambda c: (-(exact[c] - shares[c] * population), c)
    )
    for label in by_remainder[: total - sum(shares)]:
        shares[label] += 1
    return shares


def stratified_rows(
    ids: Sequence[str], labels: Int64, total: int, *, seed: int, purpose: str
) -> Int64:
    """Choose exactly `total` rows with each class in proportion.

    Args:
        ids: Names of the samples, [N].
        labels: Class of each sample, int64 [N].
        total: How many to choose, at most N.
        seed: Other seeds choose other samples.
        purpose: Sets draws with the same seed apart.

    Returns:
        Row numbers, int64 [total], ascending.
    """
    counts = [int(n) for n in np.bincount(labels)]
    return _lowest_ranked(ids, labels, quotas(counts, total), f"{seed}\0{purpose}")


def split_off_test(every: ImageSplit, fraction: float, seed: int) -> dict[str, ImageSplit]:
    """Set a share of each class aside for testing, as `held_out_rows` does.

    Raises:
        UserError: There would be nothing to test on.
    """
    wanted = min(max(1, round(len(every) * fraction)), len(every))
    test = held_out_rows(every, wanted, seed=seed, purpose="test")
    if len(test) == 0:
        raise UserError(
            f"{len(every)} images are too few to set aside a test part: every class has to keep "
            "one to train on, and identical images stay together; add images"
        )
    train = np.setdiff1d(np.arange(len(every)), test)
    return {"train": every.subset(train, name="train"), "test": every.subset(test, name="test")}


def held_out_rows(split: ImageSplit, total: int, *, seed: int, purpose: str) -> Int64:
    """Choose about `total` rows with each class in proportion; every class keeps a row.

    Identical images stay together: they are taken in the order of their lowest rank, as long as
    that brings each of their classes closer to its share. The images are hashed for that.

    Args:
        split: The images.
        total: How many to choose, at most N.
        seed: Other seeds choose other images.
        purpose: Sets draws with the same seed apart.

    Returns:
        Row numbers, int64 [M], ascending; without copies, M is `total` less what classes keep.
    """
    counts = [int(n) for n in np.bincount(split.labels)]
    shares = [min(q, max(0, n - 1)) for q, n in zip(quotas(counts, total), counts, strict=True)]
    group_of, labels = same_content([split]).tolist(), split.labels.tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_of):
        members.setdefault(group, []).append(row)
    ranks = _ranks(split.ids, f"{seed}\0{purpose}")
    taken = [0] * len(counts)
    chosen: list[int] = []
    for first in sorted(range(len(split)), key=ranks.__getitem__):
        rows = members.pop(group_of[first], [])
        more = Counter([labels[row] for row in rows])
        if all(
            n < 2 * (shares[label] - taken[label]) and taken[label] + n < counts[label]
            for label, n in more.items()
        ):
            chosen += rows
            for label, n in more.items():
                taken[label] += n
    return np.array(sorted(chosen), dtype=np.int64)


def _lowest_ranked(ids: Sequence[str], labels: Int64, shares: list[int], salt: str) -> Int64:
    ranks = _ranks(ids, salt)
    chosen: list[int] = []
    for label, share in enumerate(shares):
        rows = [int(row) for row in np.flatnonzero(labels == label)]
        chosen += sorted(rows, key=lambda row: (ranks[row], row))[:share]
    return np.array(sorted(chosen), dtype=np.int64)


def _ranks(ids: Sequence[str], salt: str) -> list[bytes]:
    return [hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:16] for name in ids]

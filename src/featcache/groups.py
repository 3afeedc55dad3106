"""Rows that belong together, and how to divide rows without separating them.

Images of one patient, student or camera resemble each other in ways that say nothing about the
class. With some in train and others in test, a head scores by recognizing the patient. Identical
images are the extreme case. Both are kept on one side of every split that featcache makes: rows
are joined to units, which are taken whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
_NO_IMAGE = 31  # zero bytes that the digest of an unreadable file begins with


def same_content(content: NDArray[np.uint8]) -> Ints:
    """Number rows [N] so that rows with equal digests [N, B], and only they, have equal numbers.

    Of two digests the larger has the larger number. An unreadable file is equal to no other.
    """
    keys = np.ascontiguousarray(content).view(f"S{content.shape[1]}").ravel()
    # Numbers are sorted ten times as fast as texts, and different digests rarely begin alike.
    heads = np.ascontiguousarray(content[:, :8]).view(">u8").ravel().astype(np.uint64)
    order = np.argsort(heads)
    heads, ordered = heads[order], keys[order]
    differs = ordered[1:] != ordered[:-1]
    if (differs & (heads[1:] == heads[:-1])).any():
        numbers = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    else:
        numbers = np.empty(len(keys), np.int64)
        numbers[order] = np.cumsum(np.r_[False, differs][: len(keys)])
    unreadable = np.flatnonzero(~content[:, :_NO_IMAGE].any(axis=1))
    numbers[unreadable] = len(content) + unreadable
    return numbers


def is_copy(content: NDArray[np.uint8], others: Sequence[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """Which images [N] are also among others.

    Args:
        content: Their digests, [N, B].
        others: Digests of the others, each [M, B].
    """
    numbers = same_content(np.concatenate([content, *others]))
    return np.isin(numbers[: len(content)], numbers[len(content) :])


def kept_together(content: NDArray[np.uint8], groups: ArrayLike | None = None) -> Ints:
    """Number rows so that rows that must stay together have equal numbers: their unit's.

    A unit is what identical images and groups connect: two groups that share an image are one.

    Args:
        content: Digests of the images, [N, B].
        groups: Names of the groups, [N], if there are any.

    Returns:
        Units, [N].
    """
    same = same_content(content)
    if groups is None:
        return same
    units = np.arange(len(same))
    keys = [np.unique(key, return_inverse=True)[1] for key in (np.asarray(groups), same)]
    while True:
        before = units
        for key in keys:
            least = np.full(len(units), len(units))
            np.minimum.at(least, key, units)
            units = least[key]
        if np.array_equal(units, before):
            return np.asarray(units, np.int64)


def take_units(order: Iterable[int], units: Ints, labels: Ints, shares: Sequence[float]) -> Ints:
    """Take units as long as that brings the classes closer to their shares.

    Every class keeps at least one row. Closeness is the sum of the classes' differences from their
    shares, so units that are all of one class fill exactly that class's share.

    Args:
        order: Rows; a unit comes where its first row does. Units of rows that are missing here are
            not taken.
        units: The unit of each row, [N].
        labels: Class indices, [N].
        shares: How many rows to take of each class, [C].

    Returns:
        The rows taken, ascending.
    """
    unit_of, label_of = units.tolist(), labels.tolist()
    members: dict[int, list[int]] = {}
    for row, unit in enumerate(unit_of):
        members.setdefault(unit, []).append(row)
    counts = Counter(label_of)
    missing = list(shares)
    unfilled = {c for c, share in enumerate(shares) if share > 0.5}
    chosen: list[int] = []
    for first in order:
        if not unfilled:  # no unit brings any class closer to its share
            break
        rows = members.pop(unit_of[first], [])
        more = Counter([label_of[row] for row in rows])
        gain = sum(abs(missing[c]) - abs(missing[c] - n) for c, n in more.items())
        if gain > 0 and all(n < counts[c] for c, n in more.items()):
            chosen += rows
            for c, n in more.items():
                missing[c] -= n
                counts[c] -= n
                if missing[c] <= 0.5:
                    unfilled.discard(c)
    return np.array(sorted(chosen), dtype=np.int64)


def hold_out_units(order: Ints, units: Ints, labels: Ints, fraction: float) -> Ints:
    """Take units that have about this fraction of each class, and never a class's only one.

    Args:
        order: All rows; earlier ones are taken first.
        units: The unit of each row, [N].
        labels: Class indices, [N].
        fraction: The share of each class.

    Returns:
        The rows taken, ascending.
    """
    left = order[~is_only_unit(units, labels)[order]]
    shares = [max(1, round(fraction * count)) for count in np.bincount(labels).tolist()]
    return take_units(left.tolist(), units, labels, shares)


def assign_parts(
    labels: Ints,
    units: Ints,
    seed: int,
    *,
    fraction: float | None,
    num_parts: int,
    grouped: bool = False,
) -> Ints:
    """Deal rows to parts, class by class, keeping units together.

    Args:
        labels: Class indices [N].
        units: Rows with equal numbers [N] go to the same part.
        seed: Of the dealing.
        fraction: Share of each class that part 0 gets; every class with at least two units gives
            one and keeps one. None deals each class evenly to `num_parts` parts.
        num_parts: Number of parts when `fraction` is None.
        grouped: Whether units have rows of several classes. A class then cannot always give one.

    Returns:
        The part of each row, [N]; -1 for rows that are always fitted: a class's only unit.
    """
    random = np.random.default_rng([seed, 0x5E1EC7])
    if grouped:
        order = random.permutation(len(labels))
        if fraction is None:
            return deal_units(order, units, labels, num_parts)
        parts = np.full(len(labels), -1, np.int64)
        parts[hold_out_units(order, units, labels, fraction)] = 0
        return parts
    unique, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    part_of = np.full(len(unique), -1, np.int64)
    label_of = labels[first]
    offset = 0
    for label in np.unique(label_of):
        members = random.permutation(np.flatnonzero(label_of == label))
        if len(members) < 2:
            continue
        if fraction is None:
            # Each class continues where the last one ended, so that no part is always the largest.
            part_of[members] = (np.arange(len(members)) + offset) % num_parts
            offset += len(members)
        else:
            spared = min(max(round(fraction * len(members)), 1), len(members) - 1)
            part_of[members[:spared]] = 0
    return np.asarray(part_of[inverse], np.int64)


def deal_units(order: Ints, units: Ints, labels: Ints, num_parts: int) -> Ints:
    """Deal units to parts of about equal size and mix of classes.

    Args:
        order: All rows; earlier ones are dealt first.
        units: The unit of each row, [N].
        labels: Class indices, [N].
        num_parts: Number of parts.

    Returns:
        The part of each row, [N]; -1 for units that are a class's only one.
    """
    parts = np.where(is_only_unit(units, labels), -1, num_parts - 1)
    for part in range(num_parts - 1):
        left = parts == num_parts - 1
        shares = np.bincount(labels[left], minlength=labels.max() + 1) / (num_parts - part)
        rows = np.flatnonzero(left)
        place = np.full(len(units), -1)
        place[rows] = np.arange(len(rows))
        taken = take_units(
            place[order[left[order]]].tolist(), units[rows], labels[rows], shares.tolist()
        )
        parts[rows[taken]] = part
    return np.asarray(parts, np.int64)


def is_only_unit(units: Ints, labels: Ints) -> NDArray[np.bool_]:
    """Which rows [N] belong to a unit that is the only one of some class."""
    pairs = np.unique(np.stack([labels, units]), axis=1)
    lone = np.bincount(pairs[0]) == 1
    return np.isin(units, pairs[1][lone[pairs[0]]])


def whole_groups_first(groups: ArrayLike | None, order: Ints) -> Ints:
    """Reorder rows so that each group's come in one go, the group with the earliest row first.

    The first rows of the result thus come from few groups. Without groups the order stays.
    """
    if groups is None:
        return order
    _, numbers = np.unique(np.asarray(groups)[order], return_inverse=True)
    first = np.full(len(order), len(order))
    np.minimum.at(first, numbers, np.arange(len(order)))
    return order[np.argsort(first[numbers], kind="stable")]


def draw_shots(
    y: Ints, shots: int, seed: int, number: int, groups: ArrayLike | None = None
) -> Ints:
    """Draw rows of one few-shot sample.

    Args:
        y: Class indices [N].
        shots: Rows per class; a class with fewer gives all it has.
        seed: The run's seed.
        number: Which sample, from 0.
        groups: The group of each row [N], if there are any: a class takes one after the other, so
            that a small sample is one of few groups, as small datasets are.

    Returns:
        Row numbers, ascending.
    """
    random = np.random.default_rng([seed, 0x5407, number])
    if groups is None:
        drawn = [random.permutation(np.flatnonzero(y == label))[:shots] for label in np.unique(y)]
    else:
        order = whole_groups_first(groups, random.permutation(len(y)))
        drawn = [order[y[order] == label][:shots] for label in np.unique(y)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)

"""Rows that belong together are numbered alike, and no division separates them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.groups import (
    assign_parts,
    hold_out_units,
    kept_together,
    same_content,
    take_units,
    whole_groups_first,
)


def digests(numbers: list[int]) -> np.ndarray:
    """One digest per row; equal numbers are equal images, 0 is an unreadable file."""
    rows = [[n, *[7 * (n > 0)] * 30, 6] for n in numbers]
    return np.array(rows, np.uint8)


def test_equal_rows_share_a_number_and_unreadable_ones_do_not() -> None:
    numbers = same_content(digests([3, 1, 3, 0, 0])).tolist()
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 4
    assert numbers[1] < numbers[0]  # by digest, so that draws do not depend on the order of rows


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 31), min_size=3, max_size=3),
)
def test_numbers_are_in_the_order_of_all_bytes(kinds: list[int], places: list[int]) -> None:
    """Whether digests differ in their first bytes, in later ones, or only in the last."""
    digest_of = [bytes([7] * 32)]
    for place in places:
        digest = bytearray(digest_of[0])
        digest[place] += 1 + len(digest_of)
        digest_of.append(bytes(digest))
    rows = [digest_of[kind] for kind in kinds]
    numbers = same_content(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32))
    places_of = {digest: place for place, digest in enumerate(sorted(set(rows)))}
    assert numbers.tolist() == [places_of[row] for row in rows]


def test_an_image_in_two_groups_makes_them_one() -> None:
    #                         ann      bob      cid      dan
    content = digests([1, 2, 3, 2, 4, 5, 6, 7])
    groups = ["ann", "ann", "bob", "bob", "cid", "cid", "dan", "dan"]
    units = kept_together(content, groups).tolist()
    assert units[0] == units[1] == units[2] == units[3]
    assert units[4] == units[5] != units[6] == units[7]
    assert len(set(units)) == 3
    # A chain: each group shares an image with the next.
    chain = kept_together(digests([1, 2, 2, 3, 3, 4, 4, 5]), groups)
    assert len(set(chain.tolist())) == 1
    assert len(set(kept_together(content).tolist())) == 7


def test_parts_are_stratified_and_keep_copies_together() -> None:
    y = np.repeat([0, 1, 2], [50, 30, 1])
    units = np.arange(81)
    units[10] = units[11]
    held = assign_parts(y, units, 0, fraction=0.2, num_parts=1) == 0
    assert held[:50].sum() in (10, 11)
    assert held[50:80].sum() == 6
    assert not held[80]
    assert held[10] == held[11]
    folds = assign_parts(y, np.arange(81), 0, fraction=None, num_parts=5)
    assert np.bincount(folds[:80]).tolist() == [16] * 5
    assert np.bincount(folds[:50]).tolist() == [10] * 5
    assert folds[80] == -1


def test_units_of_all_classes_are_dealt_evenly() -> None:
    """Twenty students, each with the ten digits."""
    y, units = np.tile(np.arange(10), 20), np.repeat(np.arange(20), 10)
    folds = assign_parts(y, units, 0, fraction=None, num_parts=5, grouped=True)
    assert np.bincount(folds).tolist() == [40] * 5
    held = assign_parts(y, units, 0, fraction=0.2, num_parts=1, grouped=True) == 0
    assert held.sum() == 40
    for part in (folds, held):
        assert all(len(set(part[units == unit].tolist())) == 1 for unit in range(20))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=80))
def test_no_division_separates_a_unit_or_takes_all_of_a_class(rows: list[tuple[int, int]]) -> None:
    y, units = (np.array(column) for column in zip(*rows, strict=True))
    folds = assign_parts(y, units, 1, fraction=None, num_parts=3, grouped=True)
    held = assign_parts(y, units, 1, fraction=0.3, num_parts=1, grouped=True)
    for parts in (folds, held):
        for unit in set(units.tolist()):
            assert len(set(parts[units == unit].tolist())) == 1
        for label in set(y.tolist()):
            if len(set(units[y == label].tolist())) == 1:  # a class's only unit is always fitted
                assert set(parts[y == label].tolist()) == {-1}
    for label in set(y.tolist()):
        assert (held[y == label] == -1).any()


def test_taking_stops_near_the_shares_and_leaves_a_row_of_each_class() -> None:
    y, units = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 2, 3])
    # The first unit has three of class 0, of which two are wanted, and one of class 1.
    assert take_units(range(8), units, y, [2, 1]).tolist() == [0, 1, 2, 4]
    assert take_units(range(3, 8), units, y, [1, 1]).tolist() == [3, 5]
    assert take_units(range(8), np.zeros(8, int), y, [4, 4]).tolist() == []
    assert hold_out_units(np.arange(8), units, y, 0.25).tolist() == [3, 5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=30), st.data()
)
def test_every_unit_that_brings_classes_closer_is_taken(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    """As by asking about each unit in turn, however early no class wants more."""
    units, labels = np.array(rows).T
    shares = data.draw(st.lists(st.integers(0, 12), min_size=3, max_size=3))
    order = data.draw(st.permutations(range(len(rows))))
    taken: list[int] = []
    for unit in dict.fromkeys(units[order].tolist()):
        mine = np.flatnonzero(units == unit)
        left = np.array(shares) - np.bincount(labels[np.array(taken, int)], minlength=3)
        more = np.bincount(labels[mine], minlength=3)
        stay = np.bincount(np.delete(labels, np.array(taken, int)), minlength=3) - more
        if (abs(left) - abs(left - more)).sum() > 0 and (stay[more > 0] > 0).all():
            taken += mine.tolist()
    assert take_units(order, units, labels, shares).tolist() == sorted(taken)


def test_first_rows_come_from_few_groups() -> None:
    order = np.array([4, 0, 3, 1, 2])
    groups = np.array(["a", "b", "a", "b", "c"])
    assert whole_groups_first(groups, order).tolist() == [4, 0, 2, 3, 1]
    assert whole_groups_first(None, order) is order


@pytest.mark.parametrize("groups", [["x"] * 6, list("abcdef")])
def test_groups_alone_decide_where_images_differ(groups: list[str]) -> None:
    units = kept_together(digests([1, 2, 3, 4, 5, 6]), groups)
    assert len(set(units.tolist())) == len(set(groups))

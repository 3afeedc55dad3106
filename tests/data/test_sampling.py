"""Stratified choices: exact totals, proportional classes, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.data.dataset import ImageSplit
from featcache.data.sampling import quotas, split_off_test, stratified_rows
from featcache.data.sources import ArraySource
from featcache.errors import UserError

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda c: sum(c) > 0)


class Hashed(ArraySource):
    """Pictures that have hashes and are not to be read."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(lambda _: pytest.fail("not to be read"))
        self.numbers = numbers

    def content(self, position: int) -> bytes:
        return bytes([*self.numbers[position].to_bytes(4), *bytes(27), 6])


def split_with(counts: list[int], originals: Sequence[int] | None = None) -> ImageSplit:
    """Images of each class; each identical to that in the row that `originals` gives, if so."""
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = [f"s/{i:04d}" for i in range(len(labels))]
    numbers = range(len(labels)) if originals is None else originals
    return ImageSplit("all", ids, labels, Hashed([n + 1 for n in numbers]))


@settings(deadline=None)
@given(COUNTS, st.floats(0, 1))
def test_quotas_are_exact_in_sum_and_within_one_of_the_share(
    counts: list[int], part: float
) -> None:
    total = round(part * sum(counts))
    shares = quotas(counts, total)
    assert sum(shares) == total
    for count, share in zip(counts, shares, strict=True):
        assert 0 <= share <= count
        assert abs(share - count * total / sum(counts)) < 1


def test_quotas_by_hand() -> None:
    assert quotas([50, 30, 20], 10) == [5, 3, 2]
    assert quotas([1, 1, 1], 2) == [1, 1, 0]
    assert quotas([7, 2, 1], 5) == [4, 1, 0]  # 3.5, 1.0, 0.5: the tie goes to the first class


@settings(deadline=None)
@given(COUNTS, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_rows_are_sorted_distinct_and_proportional(
    counts: list[int], part: float, seed: int
) -> None:
    split = split_with(counts)
    total = round(part * len(split))
    rows = stratified_rows(split.ids, split.labels, total, seed=seed, purpose="train")
    assert rows.tolist() == sorted(set(rows.tolist()))
    chosen = np.bincount(split.labels[rows], minlength=len(counts)).tolist()
    assert chosen == quotas(counts, total)


def test_the_choice_is_fixed_for_ever() -> None:
    split = split_with([6, 6])
    rows = stratified_rows(split.ids, split.labels, 4, seed=42, purpose="train")
    assert rows.tolist() == [0, 5, 6, 8]
    other = stratified_rows(split.ids, split.labels, 4, seed=43, purpose="train")
    assert other.tolist() != [0, 5, 6, 8]


def test_a_larger_sample_contains_the_smaller_one() -> None:
    split = split_with([40, 40])
    small, large = (
        set(stratified_rows(split.ids, split.labels, n, seed=1, purpose="train").tolist())
        for n in (20, 40)
    )
    assert small < large


@settings(deadline=None)
@given(COUNTS, st.floats(0.01, 0.99), st.integers(0, 99))
def test_every_class_keeps_a_train_sample(counts: list[int], part: float, seed: int) -> None:
    split = split_with(counts)
    try:
        parts = split_off_test(split, part, seed)
    except UserError:
        assert max(counts) < 2 or round(part * len(split)) <= 1
        return
    assert sorted(parts["train"].ids + parts["test"].ids) == split.ids
    assert len(parts["test"]) >= 1
    for label, count in enumerate(counts):
        assert (count == 0) or (parts["train"].labels == label).any()


def test_too_few_to_set_aside() -> None:
    with pytest.raises(UserError, match="2 images are too few for a test split"):
        split_off_test(split_with([1, 1]), 0.5, 0)


def test_the_test_part_without_copies_is_fixed_for_ever() -> None:
    split = split_with([10, 10])
    ids = ["s/0000", "s/0004", "s/0006", "s/0011", "s/0013", "s/0016"]
    assert split_off_test(split, 0.3, 42)["test"].ids == ids


@settings(deadline=None)
@given(COUNTS, st.floats(0.01, 0.99), st.integers(0, 99), st.randoms())
def test_identical_images_stay_on_one_side(
    counts: list[int], part: float, seed: int, random: Random
) -> None:
    split = split_with(counts, [random.randrange(sum(counts)) for _ in range(sum(counts))])
    try:
        parts = split_off_test(split, part, seed)
    except UserError:
        return
    assert sorted(parts["train"].ids + parts["test"].ids) == split.ids
    train, test = ({row.tobytes() for row in parts[name].content} for name in ("train", "test"))
    assert not train & test
    for label, count in enumerate(counts):
        assert (count == 0) or (parts["train"].labels == label).any()


def test_every_image_twice_gives_the_same_share() -> None:
    split = split_with([200, 200], [row // 2 * 2 for row in range(400)])
    parts = split_off_test(split, 0.2, 42)
    assert np.bincount(parts["test"].labels).tolist() == [40, 40]


def test_unreadable_files_are_no_copies_of_each_other() -> None:
    split = split_with([4, 4], [-1] * 8)  # 31 zero bytes and the code of "missing"
    assert len(split_off_test(split, 0.5, 0)["test"]) == 4


def test_nothing_but_copies_cannot_be_divided() -> None:
    split = split_with([5, 5], [0] * 5 + [5] * 5)
    with pytest.raises(
        UserError, match="and identical images and groups stay together; add images"
    ):
        split_off_test(split, 0.4, 0)

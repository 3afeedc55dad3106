"""Stratified choices: exact totals, proportional classes, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.data.dataset import ImageSplit
from featcache.data.sampling import quotas, split_off_test, stratified_rows
from featcache.data.sources import ArraySource
from featcache.errors import UserError

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda c: sum(c) > 0)


def split_with(counts: list[int]) -> ImageSplit:
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = [f"s/{i:04d}" for i in range(len(labels))]
    return ImageSplit("all", ids, labels, ArraySource(lambda _: pytest.fail("not to be read")))


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
    with pytest.raises(UserError, match="2 images are too few to set aside a test part"):
        split_off_test(split_with([1, 1]), 0.5, 0)

"""Writing a cache: what goes in, resuming, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cache_helpers import (
    begin,
    copy_cache,
    expected,
    features_offset,
    fill,
    flip_bit,
    leave_unfinished,
    make_meta,
    make_split,
    make_splits,
    sound_bytes,
    synthetic_cache,
)
from featcache.cache import FeatureCache, SplitRows, part_path, verify
from featcache.errors import CacheError, StorageError, UserError


def test_pending_blocks_are_all_rows_once_in_order(path):
    with begin(path) as new:
        assert new.pending("train") == [range(64), range(64, 128), range(128, 150)]
        assert new.pending("test") == [range(64), range(64, 70)]
        assert new.num_resumed == new.num_reused == {"train": 0, "test": 0}


def test_two_undisturbed_runs_make_the_same_bytes(tmp_path):
    one, two = (synthetic_cache(tmp_path / name, num_views=2) for name in ("a.h5", "b.h5"))
    assert one.read_bytes() == two.read_bytes()


def test_resumed_run_makes_the_same_bytes(path, tmp_path):
    leave_unfinished(path, blocks=4)
    with begin(path) as again:
        assert again.num_resumed == {"train": 150, "test": 64}
        assert again.pending("test") == [range(64, 70)]
        fill(again)
        assert again.finish() == path
    assert path.read_bytes() == sound_bytes()
    assert not part_path(path).exists()


def test_blocks_may_be_written_in_any_order(path, tmp_path):
    with begin(path) as new:
        for split in ("test", "train"):
            for rows in reversed(new.pending(split)):
                values = expected(split, rows)
                new.write_block(split, rows, values, np.zeros(len(rows), np.uint8))
        new.finish()
    assert path.read_bytes() == sound_bytes()


def test_an_error_in_the_caller_keeps_what_was_written(path):
    with pytest.raises(KeyboardInterrupt), begin(path) as new:  # noqa: PT012
        fill(new, stop_after=1)
        raise KeyboardInterrupt
    with begin(path) as again:
        assert again.num_resumed == {"train": 64, "test": 0}


def test_block_damaged_in_the_unfinished_file_is_computed_again(path, tmp_path):
    part = leave_unfinished(path, blocks=3)
    whole = copy_cache(tmp_path / "whole.h5")
    flip_bit(part, features_offset(whole, row=70))
    report = verify(part)
    assert report.damaged == {"train": [range(64, 128)]}
    assert "unfinished: 3 of 5 blocks" in report.problems[-1]
    with begin(path) as again:
        assert again.pending("train") == [range(64, 128)]
        fill(again)
        again.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_finish_refuses_while_blocks_are_missing(path):
    with begin(path) as new:
        with pytest.raises(AssertionError, match="blocks are missing"):
            new.finish()


def test_finish_finds_what_the_disk_did_not_keep(path):
    with begin(path) as new:
        fill(new)
        extent = new.layout.extents["train/features"]
        flip_bit(part_path(path), extent.offset)
        with pytest.raises(StorageError, match=r"does not hold what was written.*rows 0 to 63"):
            new.finish()
    assert not path.exists()
    with begin(path) as again:
        assert again.pending("train") == [range(64)]
        fill(again)
        again.finish()


def changed(splits: list[SplitRows], **changes) -> list[SplitRows]:
    return [dataclasses.replace(splits[0], **changes), *splits[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": make_meta(weights="imagenet")}, "backbone.weights: cached 'random', requested"),
        ({"meta": make_meta(fingerprint="ef" * 32)}, "dataset.fingerprint: cached 'cdcd"),
        ({"meta": make_meta(dtype="float16")}, "dtype: cached 'float32', requested 'float16'"),
        ({"classes": ["cat", "dog", "fox"]}, "different class_names;"),
        ({"splits": changed(make_splits(), labels=np.zeros(150, int))}, "different train/labels;"),
        ({"splits": changed(make_splits(), ids=[f"{i}" for i in range(150)])}, "train/ids;"),
        ({"splits": changed(make_splits(), content=np.zeros((150, 32), "u1"))}, "train/content;"),
        ({"splits": make_splits(columns=True)}, "different test/groups, test/weights, train/gr"),
        ({"splits": make_splits({"train": 151, "test": 70})}, "train/crc32|train/content"),
        ({"splits": make_splits({"train": 150})}, "test/features"),
    ],
)
def test_unfinished_file_begun_differently_is_refused_by_field(path, change, said):
    part = leave_unfinished(path)
    before = part.read_bytes()
    with pytest.raises(CacheError, match=said) as caught:
        begin(path, **change)
    assert "--force" in str(caught.value)
    assert part.read_bytes() == before
    with begin(path, **change, force=True) as fresh:
        assert sum(fresh.num_resumed.values()) == 0


def test_damaged_unfinished_file_is_refused_not_believed(path):
    part = leave_unfinished(path)
    flip_bit(part, 100)
    with pytest.raises(CacheError, match="damaged in HDF5 structure: give --force"):
        begin(path)


def test_foreign_file_in_the_way_is_not_removed(path):
    part_path(path).write_text("my notes")
    with pytest.raises(CacheError, match="is not a cache, or its end is missing"):
        begin(path)
    assert part_path(path).read_text() == "my notes"


def test_finished_cache_is_replaced_only_by_force_and_only_at_the_end(path):
    before = copy_cache(path).read_bytes()
    reader = FeatureCache(path)
    with pytest.raises(CacheError, match="exists: give --force"):
        begin(path)
    with begin(path, meta=make_meta(weights="imagenet"), force=True) as new:
        fill(new)
        assert path.read_bytes() == before
        new.finish()
    assert FeatureCache(path).meta.backbone.weights == "imagenet"
    # Who had it open still reads the old one.
    assert np.array_equal(reader.split("train").X, expected("train", range(150))[0])
    assert reader.meta.backbone.weights == "random"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_feature_that_is_not_finite_names_the_image(path, value):
    with begin(path) as new:
        values = expected("train", range(64))
        values[0, 9, 2] = value
        with pytest.raises(UserError, match=r"'train/00009\.png' \(train\) are not finite"):
            new.write_block("train", range(64), values, np.zeros(64, np.uint8))
        assert new.pending("train")[0] == range(64)


def test_feature_too_large_for_float16_names_the_image_and_the_flag(path):
    with begin(path, meta=make_meta(dtype="float16")) as new:
        values = expected("train", range(64))
        values[0, 9, 2] = 65520.0
        with pytest.raises(UserError, match=r"'train/00009\.png'.*give --dtype float32"):
            new.write_block("train", range(64), values, np.zeros(64, np.uint8))


def test_skipped_rows_are_zeros_whatever_was_computed(path):
    with begin(path, splits=make_splits({"train": 64})) as new:
        values, status = expected("train", range(64)), np.zeros(64, np.uint8)
        values[0, 3], status[3] = np.nan, 2
        new.write_block("train", range(64), values, status)
        new.finish()
    assert FeatureCache(path).skipped == [("train", "train/00003.png", 2)]
    assert verify(path).ok


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.full(150, 3)}, "label 3 of 'train/00000.png'"),
        ({"labels": np.full(150, -1)}, "label -1 of"),
        ({"ids": ["same"] * 150}, "'same' is a duplicate"),
        ({"ids": ["", *make_splits()[0].ids[1:]]}, "id in train '' cannot be stored"),
        ({"ids": ["a\0b", *make_splits()[0].ids[1:]]}, "without NUL"),
        ({"ids": ["x" * 4097, *make_splits()[0].ids[1:]]}, "1 to 4096 bytes"),
        ({"ids": ["caf\udce9.png", *make_splits()[0].ids[1:]]}, "not valid Unicode: rename"),
        ({"weights": np.full(150, -1.0)}, "weight -1.0 of 'train/00000.png'"),
        ({"weights": np.full(150, np.nan)}, "give finite numbers"),
        ({"groups": ["", *["g"] * 149]}, "group in train '' cannot be stored: 1 to 4096 bytes"),
        ({"name": "../x"}, r"split name '\.\./x'"),
        ({"name": "layout"}, "split name 'layout'"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused_before_anything_is_written(path, change, said):
    with pytest.raises(UserError, match=said):
        begin(path, splits=changed(make_splits(), **change))
    assert list(path.parent.iterdir()) == []


def test_empty_split_and_no_classes_are_refused(path):
    empty = SplitRows("test", [], np.zeros(0, int), np.zeros((0, 32), np.uint8))
    with pytest.raises(UserError, match="split test has no samples"):
        begin(path, splits=[make_split("train", 3), empty])
    with pytest.raises(UserError, match="1 to 16 splits"):
        begin(path, classes=[])
    with pytest.raises(UserError, match="1 to 16 splits"):
        begin(path, splits=[make_split(f"s{i}", 1) for i in range(17)])


def test_sixteen_splits_of_long_names_fit(path):
    names = [f"s{i:02d}".ljust(32, "x") for i in range(16)]
    rows = dict.fromkeys(names, 3)
    with begin(path, splits=make_splits(rows, columns=True)) as new:
        fill(new)
        new.finish()
    assert FeatureCache(path).splits == rows
    assert verify(path).ok


def test_settings_that_cannot_be_printed_are_refused(path):
    with pytest.raises(UserError, match=r"^the settings cannot be stored: .*backbone\.weights"):
        begin(path, meta=make_meta(weights="\x1b[2Jowned"))
    assert list(path.parent.iterdir()) == []

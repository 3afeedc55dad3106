"""Updating a cache: rows of samples that an older one has are kept."""

from __future__ import annotations

import numpy as np
import pytest

from cache_helpers import (
    assert_train,
    begin,
    copy_cache,
    expected,
    features_offset,
    fill,
    flip_bit,
    make_meta,
    make_splits,
    synthetic_cache,
)
from featcache.cache import FeatureCache, SplitRows, part_path
from featcache.errors import CacheError


def test_update_computes_only_the_new_images_and_equals_a_full_run(path, tmp_path):
    synthetic_cache(path, {"train": 150, "test": 70})
    grown = {"train": 200, "test": 70}
    meta = make_meta(fingerprint="ee" * 32)
    with begin(path, meta=meta, splits=make_splits(grown), reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 150, "test": 70}
        assert new.pending("train") == [range(128, 192), range(192, 200)]
        assert new.pending("test") == []
        mask, kept = new.reused_rows("train", range(128, 192))
        assert mask.tolist() == [True] * 22 + [False] * 42
        assert (new.is_reused("train", range(128, 192)) == mask).all()
        assert (kept[:, :22] == expected("train", range(128, 150))).all()
        assert not kept[:, 22:].any()
        fill(new)
        new.finish()
    whole = tmp_path / "whole.h5"
    with begin(whole, meta=meta, splits=make_splits(grown)) as full:
        fill(full)
        full.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_update_follows_content_when_images_move_and_go(path):
    synthetic_cache(path, num_views=2)
    train, test = make_splits()
    # Reversed, the first ten removed, and one moved over from test.
    ids = [*train.ids[:9:-1], "train/moved.png"]
    content = np.concatenate([train.content[:9:-1], test.content[5:6]])
    moved = SplitRows("train", ids, np.zeros(141, int), content)
    with begin(path, meta=make_meta(num_views=2), splits=[moved], reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 141}
        assert new.pending("train") == []
        new.finish()
    X = FeatureCache(path).split("train").views
    assert (X[:, :140] == expected("train", range(150), 2)[:, :9:-1]).all()
    assert (X[:, 140] == expected("test", range(5, 6), 2)[:, 0]).all()


def test_update_never_keeps_skipped_or_damaged_rows(path):
    splits = make_splits({"train": 150})
    with begin(path, splits=splits) as new:
        for rows in new.pending("train"):
            status = np.zeros(len(rows), np.uint8)
            status[1] = 3
            new.write_block("train", rows, expected("train", rows), status)
        new.finish()
    flip_bit(path, features_offset(path, row=70))
    with begin(path, splits=splits, reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 63 + 21}
        assert not new.is_reused("train", range(64))[1]
        assert not new.is_reused("train", range(64, 128)).any()


def test_update_refuses_rows_made_with_different_settings(path):
    copy_cache(path)
    with pytest.raises(CacheError, match=r"different settings.*backbone\.weights: cached 'random'"):
        begin(path, meta=make_meta(weights="imagenet"), reuse=FeatureCache(path))
    assert not part_path(path).exists()
    begin(path, force=True).close()  # the lock is free


def test_killed_update_resumes_and_a_changed_one_keeps_its_rows(path):
    copy_cache(path)
    one = make_splits({"train": 300, "test": 70})
    meta = make_meta(fingerprint="11" * 32)
    with begin(path, meta=meta, splits=one, reuse=FeatureCache(path)) as new:
        fill(new, stop_after=2)  # rows 128 to 255
    with begin(path, meta=meta, splits=one, reuse=FeatureCache(path)) as new:
        assert new.num_resumed == {"train": 256, "test": 70}
        assert new.num_reused == {"train": 0, "test": 0}
    # The dataset grows once more before the update was finished.
    two = make_splits({"train": 310, "test": 70})
    meta = make_meta(fingerprint="22" * 32)
    with begin(path, meta=meta, splits=two, reuse=FeatureCache(path)) as new:
        assert new.num_resumed == {"train": 0, "test": 0}
        assert new.num_reused == {"train": 256, "test": 70}
        fill(new)
        new.finish()
    assert_train(path, 310)

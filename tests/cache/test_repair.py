"""Repairing a cache: only damaged blocks are computed again."""

from __future__ import annotations

import pytest

from cache_helpers import copy_cache, features_offset, fill, flip_bit
from featcache.cache import FeatureCache, prepare_repair, verify
from featcache.errors import CacheError


def test_repair_computes_only_damaged_blocks(path):
    whole = copy_cache(path).read_bytes()
    flip_bit(path, features_offset(path, row=70))
    flip_bit(path, features_offset(path, "test", row=65))
    report = verify(path)
    assert report.damaged == {"train": [range(64, 128)], "test": [range(64, 70)]}
    assert report.repairable
    damaged = path.read_bytes()
    with prepare_repair(path) as repair:
        assert repair.pending("train") == [range(64, 128)]
        assert repair.pending("test") == [range(64, 70)]
        assert path.read_bytes() == damaged
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


def test_killed_repair_resumes(path):
    whole = copy_cache(path).read_bytes()
    flip_bit(path, features_offset(path, row=70))
    flip_bit(path, features_offset(path, "test", row=65))
    with prepare_repair(path) as repair:
        fill(repair, stop_after=1)
    with prepare_repair(path) as repair:
        assert repair.pending("train") == []
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["train/crc32", "train/state", "digest", "structure"])
def test_repair_makes_marks_digest_and_hdf5_structure_new(path, name):
    whole = copy_cache(path).read_bytes()
    extents = FeatureCache(path).file.layout.extents
    flip_bit(path, 100 if name == "structure" else extents[name].offset)
    report = verify(path)
    assert not report.ok
    with prepare_repair(path) as repair:
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["train/labels", "test/ids", "class_names", "meta_json"])
def test_repair_refuses_when_more_than_features_is_damaged(path, name):
    copy_cache(path)
    flip_bit(path, FeatureCache(path).file.layout.extents[name].offset)
    assert not verify(path).repairable
    with pytest.raises(CacheError, match=f"{name} are damaged.*--force"):
        prepare_repair(path)

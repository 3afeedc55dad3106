"""Reading: arrays, streams, loaders, damage, and no HDF5 library."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score

from cache_helpers import (
    CLASSES,
    copy_cache,
    expected,
    fill,
    make_meta,
    make_splits,
    synthetic_cache,
)
from featcache.cache import (
    FeatureCache,
    FeatureDataset,
    info,
    open_writer,
    part_path,
    read_meta,
    verify,
)
from featcache.errors import CacheError


@pytest.fixture
def path(tmp_path) -> Path:
    return copy_cache(tmp_path / "x.h5")


@pytest.fixture
def skipping(tmp_path) -> Path:
    """Two views, every column; rows 3 and 64 to 127 of train (a whole block) are skipped."""
    path = tmp_path / "s.h5"
    meta, splits = make_meta(num_views=2), make_splits(columns=True)
    with open_writer(path, meta, CLASSES, splits) as new:
        for rows in new.pending("train"):
            status = np.zeros(len(rows), np.uint8)
            status[[i for i, row in enumerate(rows) if row == 3 or 64 <= row < 128]] = 1
            new.write_block("train", rows, expected("train", rows, 2), status)
        fill(new, num_views=2)
        new.finish()
    return path


def flip_feature(path: Path, row: int, split: str = "train") -> None:
    extent = FeatureCache(path).file.layout.extents[f"{split}/features"]
    with path.open("r+b") as file:
        file.seek(extent.offset + row * extent.shape[2] * np.dtype(extent.dtype).itemsize)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))


def owner_of(array: np.ndarray) -> object:
    """What holds the memory of an array."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_arrays_are_mapped_read_only_and_right(path):
    cache = FeatureCache(str(path))
    assert cache.splits == {"train": 150, "test": 70}
    assert cache.num_rows == {"train": (150, 0), "test": (70, 0)}
    assert cache.class_names == CLASSES
    assert cache.meta == make_meta()
    X, y = cache.split("train")
    assert isinstance(owner_of(X), mmap.mmap)
    assert not X.flags.writeable
    assert X.flags.c_contiguous
    assert np.array_equal(X, expected("train", range(150))[0])
    assert y.dtype == np.int64
    assert y.tolist() == [i % 3 for i in range(150)]
    train = cache.split("train")
    assert (len(train), train.dim, train.num_views) == (150, 5, 1)
    assert train.weights is train.groups is None
    assert train.ids[149] == "train/00149.png"
    assert train.content.tobytes() == make_splits()[0].content.tobytes()
    assert read_meta(path) == (cache.meta, CLASSES)


def test_rows_give_back_what_was_given_to_the_writer(skipping):
    rows, given = FeatureCache(skipping).rows("train"), make_splits(columns=True)[0]
    assert (rows.name, rows.ids) == (given.name, given.ids)
    for name in ("labels", "content", "weights", "groups"):
        assert np.array_equal(getattr(rows, name), getattr(given, name))


def test_skipped_rows_are_left_out_everywhere_and_nothing_shifts(skipping):
    cache = FeatureCache(skipping)
    good = np.array([0, 1, 2, *range(4, 64), *range(128, 150)])
    train = cache.split("train")
    X, y = train
    assert cache.splits == {"train": 85, "test": 70}
    assert cache.num_rows == {"train": (150, 65), "test": (70, 0)}
    assert np.array_equal(X, expected("train", range(150), 2)[0][good])
    assert np.array_equal(train.view(1), expected("train", range(150), 2)[1][good])
    assert train.views.shape == (2, 85, 5)
    assert not X.flags.writeable
    assert np.array_equal(y, good % 3)
    assert train.ids == [f"train/{i:05d}.png" for i in good]
    assert np.array_equal(train.weights, good / np.float32(4))
    assert train.groups.tolist() == [f"büro {i // 10}" for i in good]
    assert np.array_equal(train.rows, good)
    assert cache.skipped[0] == ("train", "train/00003.png", 1)
    assert len(cache.skipped) == 65
    dataset = FeatureDataset(skipping, view=1)
    assert len(dataset) == 85
    assert np.array_equal(dataset[3][0], expected("train", range(150), 2)[1][4])
    assert dataset[3][1] == 4 % 3


def test_a_subscript_picks_rows_of_features_and_labels(skipping):
    split = FeatureCache(skipping).split("train")
    X, y = np.array(split.X), split.y
    features, label = split[3]
    assert np.array_equal(features, X[3])
    assert label == y[3]
    assert np.array_equal(split[-1][0], X[-1])
    for rows in (slice(2, 9, 3), [5, 0, 5], y == 1, np.array([1])):
        assert np.array_equal(split[rows][0], X[rows])
        assert np.array_equal(split[rows][1], y[rows])
    with pytest.raises(IndexError):
        split[len(split)]


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 100, 5000])
def test_stream_gives_every_row_once_in_order(skipping, batch_rows):
    split = FeatureCache(skipping).split("train")
    parts = list(split.iter_blocks(batch_rows, view=1))
    assert max(len(X) for X, _ in parts) <= batch_rows
    assert np.array_equal(np.concatenate([X for X, _ in parts]), split.view(1))
    assert np.array_equal(np.concatenate([y for _, y in parts]), split.y)


def test_stream_holds_one_batch_in_memory(tmp_path):
    path = synthetic_cache(tmp_path / "x.h5", {"train": 20_000}, dim=64)  # 5 MB
    split = FeatureCache(path).split("train")
    tracemalloc.start()
    total = sum(len(X) for X, _ in split.iter_blocks(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000
    assert peak < 1_000_000


def test_damage_is_found_where_it_is_used_and_nowhere_else(path):
    flip_feature(path, 70)
    cache = FeatureCache(path)
    assert len(cache.split("test").X) == 70
    message = r"rows 64 to 127 of train \(from 'train/00064\.png'\).*verify .* --repair --dataset"
    with pytest.raises(CacheError, match=message):
        _ = cache.split("train").X
    stream = cache.split("train").iter_blocks(64)
    assert len(next(stream)[0]) == 64
    with pytest.raises(CacheError, match="rows 64 to 127"):
        next(stream)
    dataset = FeatureDataset(path)
    assert dataset[63][1] == 0
    with pytest.raises(CacheError, match="rows 64 to 127"):
        dataset[64]
    assert len(cache.split("train", check=False).X) == 150


def test_damage_elsewhere_is_found_when_opened(path):
    extents = FeatureCache(path).file.layout.extents
    data = path.read_bytes()
    for name in ("train/labels", "test/ids", "train/content", "meta_json", "test/crc32"):
        broken = bytearray(data)
        broken[extents[name].offset] ^= 1
        path.write_bytes(broken)
        part = "marks or checksums" if "crc32" in name else name
        with pytest.raises(CacheError, match=rf"damaged \({part}\): run featcache verify"):
            FeatureCache(path)


def test_unknown_split_names_the_known_ones(path):
    with pytest.raises(CacheError, match="no split 'val': it has train, test"):
        FeatureCache(path).split("val")
    with pytest.raises(CacheError, match="no view 1: it has 1"):
        FeatureDataset(path, view=1)


def test_unfinished_cache_is_refused_and_described(path):
    path.unlink()
    with open_writer(path, make_meta(), CLASSES, make_splits()) as new:
        fill(new, stop_after=3)
    part = part_path(path)
    with pytest.raises(CacheError, match="unfinished: rerun the same extract-features"):
        FeatureCache(part)
    os.rename(part, path)  # by hand, to cheat
    for read in (FeatureCache, read_meta):
        with pytest.raises(CacheError, match="unfinished"):
            read(path)
    about = info(path)
    assert not about["finished"]
    assert about["splits"]["train"]["num_blocks_done"] == 3
    assert not verify(path).finished


def test_info_says_what_is_there_and_where_it_came_from(skipping):
    about = info(skipping)
    assert about["finished"]
    assert about["meta"]["dataset"]["name"] == "toy"
    assert about["meta"]["backbone"]["weights_sha256"] == "ab" * 32
    assert (about["feature_dim"], about["num_views"], about["dtype"]) == (5, 2, "float32")
    train = about["splits"]["train"]
    assert (train["num_samples"], train["num_skipped"]) == (150, 65)
    assert train["skipped"][0] == {"id": "train/00003.png", "code": 1}
    assert sum(train["num_per_class"].values()) == 85
    assert train["weighted"]
    assert (train["num_groups"], about["splits"]["test"]["num_groups"]) == (15, 7)


def test_reading_never_loads_the_hdf5_library(path):
    script = (
        "import sys; from featcache.cache import *; c = FeatureCache(sys.argv[1])\n"
        "X, y = c.split('train'); info(sys.argv[1]); read_meta(c.path)\n"
        "assert verify(c.path, cross_check=False).ok; FeatureDataset(c.path)[0]\n"
        "print(sorted({'h5py', 'torch', 'sklearn', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_readers_keep_the_file_that_they_opened(path):
    cache = FeatureCache(path)
    with open_writer(path, make_meta(weights="x"), CLASSES, make_splits(), force=True) as new:
        for split in ("train", "test"):
            for rows in new.pending(split):
                zeros = np.zeros_like(expected(split, rows))
                new.write_block(split, rows, zeros, np.zeros(len(rows), np.uint8))
        new.finish()
    assert np.array_equal(cache.split("train").X, expected("train", range(150))[0])
    assert not FeatureCache(path).split("train").X.any()


@pytest.mark.slow
def test_features_travel_to_the_workers_of_joblib(path):
    X, y = FeatureCache(path).split("train")
    with joblib.parallel_config(backend="loky", max_nbytes=1):  # mapped, however small
        fitting = joblib.Parallel(n_jobs=2)
        wanted = expected("train", range(150))[0]
        for part, rows in (
            (X, slice(None)),
            (X[50:], slice(50, None)),
            (X[::2], slice(None, None, 2)),
        ):
            sums = fitting(joblib.delayed(np.sum)(part, axis=axis) for axis in (0, 1))
            assert np.array_equal(sums[0], wanted[rows].sum(axis=0))
            assert np.array_equal(sums[1], wanted[rows].sum(axis=1))
        clf = LogisticRegression()
        assert len(cross_val_score(clf, X, y, cv=3, n_jobs=2)) == 3
        search = GridSearchCV(clf, {"C": [0.1, 1.0]}, cv=3, n_jobs=2).fit(X, y)
        assert search.best_params_["C"] in (0.1, 1.0)


def test_features_travel_to_a_spawned_process(path):
    X = FeatureCache(path).split("train").X
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(np.negative, (X,)), -X)


# --- loaders


def check_rows(dataset: FeatureDataset) -> int:
    wanted = expected("train", range(150))[0]
    right = [np.array_equal(dataset[i][0], wanted[i]) for i in range(150)]
    return sum(right)


def test_dataset_travels_as_a_path(path):
    dataset = FeatureDataset(path)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert check_rows(pickle.loads(data)) == 150
    with pytest.raises(IndexError):
        dataset[150]
    assert np.array_equal(dataset[-1][0], expected("train", range(149, 150))[0, 0])
    assert dataset[0][0].dtype == np.float32


def test_dataset_notices_that_the_file_was_replaced(path):
    dataset = pickle.dumps(FeatureDataset(path))
    synthetic_cache(path.with_name("y.h5"), fingerprint="ff" * 32).replace(path)
    with pytest.raises(CacheError, match="was replaced while it was in use"):
        pickle.loads(dataset)[0]


def test_dataset_in_a_spawned_process(path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(check_rows, (FeatureDataset(path),)) == 150


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_with_two_workers(path, start):
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(
        FeatureDataset(path), batch_size=32, num_workers=2, multiprocessing_context=start
    )
    batches = list(loader)
    X = torch.cat([features for features, _ in batches])
    y = torch.cat([labels for _, labels in batches])
    assert np.array_equal(X.numpy(), expected("train", range(150))[0])
    assert y.tolist() == [i % 3 for i in range(150)]

"""Small caches with known rows, for the tests of heads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from featcache.cache import SplitRows, open_writer
from featcache.config import BackboneInfo, CacheMeta, DatasetInfo, Preprocessing, Views


def cache_meta(feature_dim, num_views=1, dtype="float32"):
    kinds = {1: Views(), 2: Views(kind="flip", num=2)}
    return CacheMeta(
        backbone=BackboneInfo(
            backbone="resnet18",
            weights="random",
            weights_sha256="0" * 64,
            feature_dim=feature_dim,
            preprocessing=Preprocessing(image_px=64, resize="squash", resize_px=64),
        ),
        dataset=DatasetInfo(
            name="toy",
            kind="folder",
            fingerprint="f" * 64,
            num_train=None,
            num_test=None,
            test_fraction=None,
            seed=42,
        ),
        views=kinds.get(num_views, Views(kind="random", num=num_views)),
        dtype=dtype,
        precision="float32",
        engine="torch",
        versions={},
    )


def make_cache(path: Path, splits, class_names, *, dtype="float32", weights=None):
    """A cache of given rows: `splits` maps a name to (features [N, D] or [V, N, D], labels)."""
    views = {n: (X if X.ndim == 3 else X[None], np.asarray(y)) for n, (X, y) in splits.items()}
    num_views, _, dim = next(iter(views.values()))[0].shape
    plans = [
        SplitRows(
            name=name,
            ids=[f"{name}/{i:05d}" for i in range(len(y))],
            labels=y.astype(np.int64),
            content=np.stack([digest(row) for row in X[0]]),
            weights=None if weights is None else weights.get(name),
        )
        for name, (X, y) in views.items()
    ]
    meta = cache_meta(dim, num_views, dtype)
    with open_writer(path, meta, list(class_names), plans) as writer:
        for name, (X, _) in views.items():
            for rows in writer.pending(name):
                block = np.ascontiguousarray(X[:, rows.start : rows.stop], np.float32)
                writer.write_block(name, rows, block, np.zeros(len(rows), np.uint8))
        writer.finish()
    return path


def digest(row):
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest(), np.uint8)


def blobs(num_rows, dim=8, num_classes=3, *, spread=2.0, seed=0):
    """Gaussian classes with overlapping means: features [N, D] float32, labels [N]."""
    random = np.random.default_rng(seed)
    means = np.random.default_rng(1234).normal(size=(num_classes, dim)) * 1.2
    y = np.arange(num_rows) % num_classes
    X = means[y] + spread * random.normal(size=(num_rows, dim))
    return X.astype(np.float32), y


def toy_cache(path: Path, **kwargs):
    """240 train and 90 test rows of three classes, eight features."""
    splits = {"train": blobs(240, seed=1), "test": blobs(90, seed=2)}
    return make_cache(path, splits, ["ape", "bee", "cat"], **kwargs)

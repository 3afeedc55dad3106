"""Small synthetic caches, in milliseconds and without a network, for every test that needs one.

`synthetic_cache(path)` writes one; `copy_cache(path)` is the default one, made once. `expected`
computes any row again from its place. `begin`, `fill` and `leave_unfinished` write step by step;
`flip_bit` damages. `rows_cache` writes rows that the test gives, `toy_cache` three classes of them.
(A cache that extract-features made of images: trained_helpers.)
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path

import numpy as np

from featcache.cache import CacheWriter, FeatureCache, SplitRows, open_writer, part_path
from featcache.config import BackboneInfo, CacheMeta, DatasetInfo, Preprocessing, Views

CLASSES = ["cat", "dog", "føx"]
ROWS = {"train": 150, "test": 70}  # blocks of 64: three (one short) and two
DIM = 5


def make_meta(
    *, dim: int = DIM, dtype: str = "float32", num_views: int = 1, **changes
) -> CacheMeta:
    kind = {1: "none", 2: "flip"}.get(num_views, "random")
    prep = Preprocessing(image_px=32, resize="squash", resize_px=32)
    return CacheMeta(
        backbone=BackboneInfo(
            backbone="resnet18",
            weights=changes.get("weights", "random"),
            weights_sha256="ab" * 32,
            feature_dim=dim,
            preprocessing=prep,
            stages=changes.get("stages"),
        ),
        dataset=DatasetInfo(
            name="toy",
            kind="folder",
            fingerprint=changes.get("fingerprint", "cd" * 32),
            num_train=None,
            num_test=None,
            test_fraction=None,
            seed=42,
            task=changes.get("task", "multiclass"),
        ),
        views=Views(kind=kind, num=num_views, seed=0),
        dtype=dtype,
        precision="float32",
        engine="torch",
        versions={"torch": "2.6"},
    )


def make_split(name: str, num: int, *, columns: bool = False, prefix: str = "") -> SplitRows:
    """Rows of a split; `columns`: with every optional column."""
    ids = [f"{name}/{prefix}{i:05d}.png" for i in range(num)]
    content = [list(hashlib.sha256(sample.encode()).digest()) for sample in ids]
    return SplitRows(
        name=name,
        ids=ids,
        labels=np.arange(num) % len(CLASSES),
        content=np.array(content, np.uint8),
        weights=np.arange(num, dtype=np.float32) / 4 if columns else None,
        groups=[f"büro {i // 10}" for i in range(num)] if columns else None,
    )


def make_splits(rows: dict[str, int] = ROWS, *, columns: bool = False) -> list[SplitRows]:
    return [make_split(name, num, columns=columns) for name, num in rows.items()]


def expected(split: str, rows: range, num_views: int = 1, dim: int = DIM) -> np.ndarray:
    """Features [V, n, D]: a number that says split, view, row and column; exact in float16."""
    view, row, column = np.ogrid[:num_views, rows.start : rows.stop, :dim]
    values = (row * 7 + column * 3 + view * 11 + len(split)) % 1999 - 1000
    return (values / 4).astype(np.float32)


def fill(writer: CacheWriter, *, num_views: int = 1, dim: int = DIM, stop_after: int | None = None):
    """Write pending blocks (at most `stop_after`); returns how many."""
    written = 0
    for split in writer.layout.splits:
        for rows in writer.pending(split):
            if written == stop_after:
                return written
            good = np.zeros(len(rows), np.uint8)
            writer.write_block(split, rows, expected(split, rows, num_views, dim), good)
            written += 1
    return written


def synthetic_cache(
    path: Path, rows: dict[str, int] = ROWS, *, num_views=1, dim=DIM, **meta
) -> Path:
    """A finished cache whose rows are `expected`; `meta` as for `make_meta`."""
    settings = make_meta(dim=dim, num_views=num_views, **meta)
    with open_writer(path, settings, CLASSES, make_splits(rows)) as writer:
        fill(writer, num_views=num_views, dim=dim)
        return writer.finish()


@functools.cache
def sound_bytes() -> bytes:
    """The file that `synthetic_cache(path)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        return synthetic_cache(Path(folder, "x.h5")).read_bytes()


def copy_cache(path: Path) -> Path:
    """As `synthetic_cache(path)`, in no time."""
    path.write_bytes(sound_bytes())
    return path


def begin(path: Path, *, meta=None, classes=CLASSES, splits=None, **options) -> CacheWriter:
    """A writer of the default synthetic cache, or of one with a part changed."""
    return open_writer(path, meta or make_meta(), classes, splits or make_splits(), **options)


def leave_unfinished(path: Path, blocks: int = 2, **options) -> Path:
    """Write some blocks and stop; returns the unfinished file."""
    with begin(path, **options) as half:
        fill(half, stop_after=blocks)
    return part_path(path)


def flip_bit(path: Path, offset: int) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def features_offset(path: Path, split: str = "train", row: int = 0) -> int:
    """Where a row's features lie in a finished float32 cache."""
    cache = FeatureCache(path)
    return cache.file.layout.features(split).offset + row * cache.split(split).dim * 4


def assert_train(path: Path, num_rows: int) -> None:
    """The train split holds the right features."""
    wanted = expected("train", range(num_rows))[0]
    assert np.array_equal(FeatureCache(path).split("train").X, wanted)


def rows_cache(
    path: Path, splits, class_names, *, dtype="float32", weights=None, groups=None, stages=None
):
    """A cache of given rows: `splits` maps a name to (features [N, D] or [V, N, D], labels).

    Labels [N, C] of 0 and 1 make a multilabel cache, floats [N] one for regression.
    `weights` and `groups` map a split's name to what is known of its rows.
    """
    views = {n: (X if X.ndim == 3 else X[None], np.asarray(y)) for n, (X, y) in splits.items()}
    num_views, _, dim = next(iter(views.values()))[0].shape
    plans = [
        SplitRows(
            name=name,
            ids=[f"{name}/{i:05d}" for i in range(len(y))],
            labels=y.astype(np.int64) if task_of(y) == "multiclass" else np.zeros(len(y), np.int64),
            content=np.stack([_digest(row) for row in X[0]]),
            weights=None if weights is None else weights.get(name),
            groups=None if groups is None else groups.get(name),
            targets=None if task_of(y) == "multiclass" else y,
        )
        for name, (X, y) in views.items()
    ]
    task = task_of(next(iter(views.values()))[1])
    meta = make_meta(dim=dim, num_views=num_views, dtype=dtype, stages=stages, task=task)
    with open_writer(path, meta, list(class_names), plans) as writer:
        for name, (X, _) in views.items():
            for rows in writer.pending(name):
                block = np.ascontiguousarray(X[:, rows.start : rows.stop], np.float32)
                writer.write_block(name, rows, block, np.zeros(len(rows), np.uint8))
        writer.finish()
    return path


def task_of(y: np.ndarray) -> str:
    if y.ndim == 2:
        return "multilabel"
    return "regression" if y.dtype.kind == "f" else "multiclass"


def _digest(row):
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
    return rows_cache(path, splits, ["ape", "bee", "cat"], **kwargs)

"""Heads on a cache too large for memory: rate and peak memory; for bench_heads.py."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import SplitRows, open_writer
from featcache.config import BackboneInfo, CacheMeta, DatasetInfo, Preprocessing, Views
from featcache.display import say
from featcache.errors import UserError

NUM_CLASSES = 10
TEST_ROWS = 10_000
READ_BYTES = 4 << 20
SOLVERS = ("ridge", "logistic", "adam")


def run(work_dir: Path, num_rows: int, dim: int) -> dict[str, Any]:
    """Make a cache, fit each solver in a process of its own, say rates and peak memory."""
    size = num_rows * dim * 2
    free = shutil.disk_usage(work_dir).free
    if free < 1.2 * size:
        raise UserError(f"{work_dir} has {free / 1e9:.0f} GB free, {1.2 * size / 1e9:.0f} needed: "
                        "give --work-dir or fewer --stream-rows")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        path = Path(folder) / "large.h5"
        start = time.perf_counter()
        make_large_cache(path, num_rows, dim)
        say(f"made {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")
        rows = [{"name": "plain read, cold", **read_rate(path)}]
        say(f"plain sequential read of the same file: {rows[0]['gb_per_s']:.2f} GB/s")
        for solver in SOLVERS:
            rows.append(fit(path, solver, size))
            say(line(rows[-1]))
    return {"rows": rows, "num_rows": num_rows, "feature_dim": dim, "summary": []}


def line(row: dict[str, Any]) -> str:
    """One solver in words."""
    return (
        f"{row['name']}: {row['passes']} passes over the file in {row['fit_seconds']:.0f} s, "
        f"{row['gb_per_s']:.2f} GB/s, peak memory {row['peak_mb']:.0f} MB, "
        f"test accuracy {row['test_top1']:.3f}"
    )


def fit(path: Path, solver: str, size: int) -> dict[str, Any]:
    """One `train-head --stream on` process, with the peak of its resident memory."""
    drop_from_memory(path)
    command = [
        sys.executable, __file__, str(path), "--solver", solver, "--stream", "on", "--epochs", "1",
        "--cache-dir", str(path.parent), "--batch-size", "256",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    report = json.loads(done.stdout)
    # Every solver reads all rows once to begin with; for ridge that is all.
    passes = 1 if solver == "ridge" else 1 + report["num_passes"]
    return {
        "name": solver, "passes": passes, "fit_seconds": report["fit_seconds"],
        "gb_per_s": passes * size / report["fit_seconds"] / 1e9, "peak_mb": report["peak_mb"],
        "test_top1": report["test_top1"], "seconds_total": report["seconds_total"],
    }  # fmt: skip


def child(argv: list[str]) -> None:
    """In a process of its own: train, print the report's figures and the peak memory."""
    from featcache.cli import parse
    from featcache.config import TrainHeadConfig
    from featcache.heads import train_head

    report = train_head(parse("train-head", TrainHeadConfig, argv))
    names = ("num_passes", "fit_seconds", "seconds_total", "test_top1")
    print(json.dumps({**{name: report[name] for name in names}, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Peak resident memory of this program alone, in MB of 2^20 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent from before this program was loaded
        lines = status.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def read_rate(path: Path) -> dict[str, float]:
    """What the disk gives to a program that only reads."""
    drop_from_memory(path)
    start, count = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            count += len(block)
    return {"gb_per_s": count / (time.perf_counter() - start) / 1e9}


def drop_from_memory(path: Path) -> None:
    """Ask the system to forget the file's pages, so that the disk is read."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_large_cache(path: Path, num_rows: int, dim: int) -> None:
    """Write a float16 cache block by block; rows are drawn as they are written."""
    fixed = np.random.default_rng(1)
    means = fixed.normal(size=(NUM_CLASSES, dim)).astype(np.float32) * 0.1
    pool = fixed.standard_normal((65_536, dim), dtype=np.float32)

    def block(start: int, count: int, labels: Any) -> Any:
        noise = pool.take(np.arange(start, start + count) * 7 % len(pool), axis=0)
        return np.maximum(means[labels] + noise + 0.5, 0)[None]

    splits = {"train": num_rows, "test": TEST_ROWS}
    names = [f"c{i}" for i in range(NUM_CLASSES)]
    plans = [rows_of(name, count) for name, count in splits.items()]
    with open_writer(path, meta_of(dim, "float16"), names, plans) as writer:
        for name, count in splits.items():
            labels = labels_of(name, count)
            for rows in writer.pending(name):
                features = block(rows.start, len(rows), labels[rows.start : rows.stop])
                writer.write_block(name, rows, features, np.zeros(len(rows), np.uint8))
        writer.finish()


def labels_of(name: str, count: int) -> Any:
    """Random classes, [count] int64."""
    return np.random.default_rng(len(name)).integers(NUM_CLASSES, size=count)


def rows_of(name: str, count: int) -> SplitRows:
    """The fixed part of a split: ids and digests that differ."""
    content = np.zeros((count, 32), np.uint8)
    content[:, :8] = np.arange(count, dtype=np.int64).view(np.uint8).reshape(count, 8)
    content[:, 8] = len(name)
    return SplitRows(
        name=name, ids=[f"{i:x}" for i in range(count)], labels=labels_of(name, count),
        content=content, weights=None,
    )  # fmt: skip


def meta_of(dim: int, dtype: Any) -> CacheMeta:
    """Metadata of made features."""
    return CacheMeta(
        backbone=BackboneInfo(
            backbone="resnet18", weights="random", weights_sha256="0" * 64, feature_dim=dim,
            preprocessing=Preprocessing(image_px=64, resize="squash", resize_px=64),
        ),
        dataset=DatasetInfo(
            name="made", kind="folder", fingerprint="0" * 64, num_train=None, num_test=None,
            test_fraction=None, seed=0,
        ),
        views=Views(), dtype=dtype, precision="float32", engine="torch", versions={},
    )  # fmt: skip


def make_cache(
    path: Path, splits: dict[str, tuple[Any, Any]], num_classes: int, groups: Any = None
) -> None:
    """A small float32 cache of given rows: (features [N, D], labels [N]) by split.

    `groups` has the groups of each split's rows [N] by its name, if there are any.
    """
    dim = next(iter(splits.values()))[0].shape[1]
    plans = []
    for name, (X, y) in splits.items():
        digests = np.zeros((len(y), 32), np.uint8)
        digests[:, :8] = np.arange(len(X), dtype=np.int64).view(np.uint8).reshape(-1, 8)
        ids = [f"{name}/{i}" for i in range(len(y))]
        own = groups[name] if groups else None
        plans.append(
            SplitRows(name=name, ids=ids, labels=y, content=digests, weights=None, groups=own)
        )
    names = [f"c{i}" for i in range(num_classes)]
    with open_writer(path, meta_of(dim, "float32"), names, plans) as writer:
        for name, rows in _pending(writer, splits):
            features = np.ascontiguousarray(
                splits[name][0][None, rows.start : rows.stop], np.float32
            )
            writer.write_block(name, rows, features, np.zeros(len(rows), np.uint8))
        writer.finish()


def _pending(writer: Any, splits: dict[str, Any]) -> Iterator[tuple[str, range]]:
    return ((name, rows) for name in splits for rows in writer.pending(name))


if __name__ == "__main__":
    child(sys.argv[1:])

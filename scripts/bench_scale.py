"""What breaks first as datasets grow, and what several processes cost.

    python scripts/bench_scale.py               # every step on 10 million made rows, no network
    python scripts/bench_scale.py --num-rows 1000000
    python scripts/bench_scale.py --overhead    # two ranks of one thread, one process of two

Each step runs in a process of its own, which has made the rows before the clock starts: seconds are
the step's, peak memory includes the rows. The merge joins four shards. With --overhead, both ways
extract the same images in turns, start-up included; the median of the rounds counts.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_memory import _small_images as small_images
from featcache import cli
from featcache.cache import CacheWriter, FeatureCache, SplitRows, open_writer, part_path, verify
from featcache.cache.parallel import Job, Plan, Share, merge_shards, open_shard
from featcache.config import (
    BackboneInfo,
    CacheMeta,
    DatasetInfo,
    OutputConfig,
    Preprocessing,
    Views,
    config_json,
)
from featcache.data import ImageDataset, ImageSplit
from featcache.display import say
from featcache.errors import FeatcacheError
from featcache.files import write_json
from featcache.runtime import environment

NUM_SHARDS = 4
CLASSES = [f"class{i}" for i in range(1000)]
MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(OutputConfig):
    """Time every step but the network on made rows, or the overhead of several processes."""

    num_rows: int = 10_000_000
    """Rows of the made dataset."""
    dim: int = 16
    """Features per row."""
    overhead: bool = False
    """Compare two ranks of one thread with one process of two threads instead."""
    num_images: int = 5_000
    """Images of --overhead."""
    image_px: int = 64
    """Side of the network's input in --overhead."""
    rounds: int = 5
    """How many times --overhead measures both ways."""
    folder: Path = Path("cache/bench-scale")
    """Where files and the JSON report go; what is made is removed at the end."""


def bench(config: ScaleConfig) -> dict[str, Any]:
    """Run the mode that was asked for; returns its JSON report."""
    config.folder.mkdir(parents=True, exist_ok=True)
    report = overhead(config) if config.overhead else steps(config)
    report |= {"settings": config_json(config), "environment": environment()}
    write_json(config.folder / f"{report['command']}.json", report)
    return report


class MadeSource:
    """Samples without images: their hashes are made up."""

    def content(self, index: int) -> bytes:
        """As `featcache.data.sources.Source`."""
        return np.random.default_rng(index).bytes(32)

    def finish(self) -> None:
        """Nothing to keep."""


def made_rows(config: ScaleConfig) -> tuple[CacheMeta, list[SplitRows]]:
    """Names like those of a big folder, labels and hashes."""
    num = config.num_rows
    content = np.random.default_rng(0).integers(0, 256, (num, 32), np.uint8)
    ids = [f"class{i % 1000}/{i:012d}.jpg" for i in range(num)]
    prep = Preprocessing(image_px=224, resize="squash", resize_px=224)
    meta = CacheMeta(
        backbone=BackboneInfo(
            backbone="resnet18",
            weights="random",
            weights_sha256="ab" * 32,
            feature_dim=config.dim,
            preprocessing=prep,
        ),
        dataset=DatasetInfo(
            name="made",
            kind="folder",
            fingerprint="cd" * 32,
            num_train=None,
            num_test=None,
            test_fraction=None,
            seed=0,
        ),
        views=Views(),
        dtype="float32",
        precision="float32",
        engine="torch",
        versions={"torch": "2"},
    )
    return meta, [SplitRows("train", ids, np.arange(num) % 1000, content)]


def steps(config: ScaleConfig) -> dict[str, Any]:
    """Every step in a process of its own."""
    whole, merged = config.folder / "whole.h5", config.folder / "merged.h5"
    measured: dict[str, dict[str, float]] = {}
    for name, step in (
        ("make rows", lambda: _timed(made_rows, config)),
        ("index", lambda: index(config)),
        ("layout", lambda: layout(config, whole)),
        ("write, finish", lambda: write(config, whole)),
        ("verify", lambda: _timed(verify, whole)),
        ("open", lambda: _timed(open_cache, whole)),
        ("write shards", lambda: write_shards(config, merged)),
        ("merge", lambda: _timed(merge_shards, merged)),
    ):
        measured[name] = _in_child(step)
        say(f"{name}: {measured[name]}")
    assert whole.read_bytes()[:4096] == merged.read_bytes()[:4096]
    size = whole.stat().st_size
    for file in (whole, merged):
        for left in config.folder.glob(f"{file.name}*"):
            left.unlink()
    lines = [
        f"{name:14} {found['seconds']:8.1f} s  peak {found['peak_mb']:8,.0f} MB"
        for name, found in measured.items()
    ]
    per_row = (size - 4 * config.dim * config.num_rows) / config.num_rows
    lines.append(f"file: {size / 1e6:,.0f} MB, {per_row:.0f} bytes a row beside its features")
    return {"command": "bench-scale", "steps": measured, "file_bytes": size, "summary": lines}


def _timed(step: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    step(argument)
    return time.perf_counter() - start


def index(config: ScaleConfig) -> float:
    """A dataset of hashed samples, and its fingerprint."""
    _, (rows,) = made_rows(config)
    start = time.perf_counter()
    split = ImageSplit(rows.name, rows.ids, rows.labels, MadeSource())  # type: ignore[arg-type]
    split._content = rows.content
    assert ImageDataset("made", "folder", {"train": split}, CLASSES).fingerprint
    return time.perf_counter() - start


def layout(config: ScaleConfig, path: Path) -> float:
    """Check the rows and lay the file out."""
    meta, rows = made_rows(config)
    start = time.perf_counter()
    open_writer(path, meta, CLASSES, rows, force=True).close()
    return time.perf_counter() - start


def write(config: ScaleConfig, path: Path) -> float:
    """Open the file again, write every block, check and name it."""
    meta, rows = made_rows(config)
    start = time.perf_counter()
    with open_writer(path, meta, CLASSES, rows) as writer:
        fill(writer)
        writer.finish()
    return time.perf_counter() - start


def fill(writer: CacheWriter) -> None:
    """Write all blocks of the one split."""
    dim = writer.layout.features("train").shape[2]
    features = np.random.default_rng(0).normal(size=(1, 64, dim)).astype(np.float32)
    status = np.zeros(64, np.uint8)
    for rows in writer.pending("train"):
        writer.write_block("train", rows, features[:, : len(rows)], status[: len(rows)])


def open_cache(path: Path) -> None:
    """What a head needs: features mapped and checked, labels and names."""
    split = FeatureCache(path).split("train")
    assert len(split.ids) == len(split.y) == len(split.X)


def write_shards(config: ScaleConfig, path: Path) -> float:
    """The shards of a job, one after the other."""
    meta, rows = made_rows(config)
    start = time.perf_counter()
    Plan(meta, {"train": config.num_rows}, "shards", "bench_scale").agree(path)
    for share in (Share(i, NUM_SHARDS) for i in range(NUM_SHARDS)):
        writer = open_shard(Job(path, meta, CLASSES, rows, share))
        assert writer is not None
        with writer:
            fill(writer)
            writer.finish()
    return time.perf_counter() - start


def _in_child(step: Callable[[], float]) -> dict[str, float]:
    """Seconds that `step` returns, and the peak memory of its process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(writing, json.dumps(step()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise FeatcacheError(f"a step ended with {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": json.loads(text), "peak_mb": usage.ru_maxrss * unit / MEGABYTE}


def overhead(config: ScaleConfig) -> dict[str, Any]:
    """Both ways in turns."""
    images = small_images(config.folder / f"small-{config.num_images}", config.num_images)
    ranks = [{"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": str(i)} for i in range(2)]
    ways = {"one process": ([{}], 2), "two ranks": (ranks, 1)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    _extract(config, images, [{}], 2)  # hashes of the files are remembered from here on
    for _ in range(config.rounds):
        for name, (processes, workers) in ways.items():
            found[name].append(_extract(config, images, processes, workers))
        say(", ".join(f"{name} {runs[-1][0]:.1f} s" for name, runs in found.items()))
    wall = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    cpu = {name: statistics.median(seconds for _, seconds in runs) for name, runs in found.items()}
    ratio = wall["two ranks"] / wall["one process"]
    return {
        "command": "bench-scale-overhead",
        "seconds": {name: [seconds for seconds, _ in runs] for name, runs in found.items()},
        "processor_seconds": cpu,
        "ratio": ratio,
        "summary": [
            *(f"{name:11} {wall[name]:6.1f} s, processor {cpu[name]:6.1f} s" for name in ways),
            f"two ranks take {ratio:.3f} of one process's time for {config.num_images:,} images",
        ],
    }


def _extract(
    config: ScaleConfig, images: Path, ranks: list[dict[str, str]], workers: int
) -> tuple[float, float]:
    """Seconds until all ranks have ended, and their processor seconds; a new cache each time."""
    path = config.folder / "overhead.h5"
    for left in (path, part_path(path)):
        left.unlink(missing_ok=True)
    words = ["-m", "featcache", "extract-features", str(images), "--weights", "random"]
    words += ["--engine", "torch", "--image-px", str(config.image_px), "--workers", str(workers)]
    words += ["--output", str(path), "--cache-dir", str(config.folder), "--device", "cpu"]
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD"))}
    before, start = _processor_s(), time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, *words], env=plain | more, stderr=subprocess.DEVNULL)  # noqa: S603
        for more in ranks
    ]
    if sum(process.wait() != 0 for process in running):  # waits for all
        raise FeatcacheError("extract-features failed")
    return time.perf_counter() - start, _processor_s() - before


def _processor_s() -> float:
    """Processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    return list(report["summary"])


if __name__ == "__main__":
    sys.exit(cli.run("bench_scale.py", ScaleConfig, bench, summary=summary_lines))

"""What many files cost besides the network: listing, hashing, index, hit check, at growing numbers.

The files are hard links to a thousand small images, so a million of them need little disk. Each
number is measured in a process of its own, whose peak of memory only grows from step to step.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from featcache import cli
from featcache.config import ExtractConfig, OutputConfig
from featcache.config.settings import settings
from featcache.display import say
from featcache.errors import FeatcacheError
from featcache.file_hashes import SETTLE_S
from featcache.files import write_json
from featcache.runtime import environment

KINDS, CLASSES, SIDE_PX = 1000, 100, 32
MEGABYTE = 2**20
Steps = dict[str, tuple[float, float, float]]
"""By step: wall seconds, processor seconds, and the peak of memory so far in MB."""


@settings
class BenchConfig(OutputConfig):
    """What to measure."""

    nums: tuple[int, ...] = (100_000, 200_000)
    """Numbers of files, ascending."""
    folder: Path = Path("many-files")
    """Where files, caches and bench-index.json go. Files and caches are removed afterwards."""
    keep: bool = False
    """Keep the files, so that the next run with this flag need not make them."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the figures to bench-index.json."""
    found: dict[int, Steps] = {}
    for num in config.nums:
        place = config.folder.resolve() / f"files-{num}"
        shutil.rmtree(place / "cache", ignore_errors=True)  # of a run that was interrupted
        try:
            if not (place / "images").exists():
                say(f"linking {num:,} files")
                link_files(place / "images", num)
                time.sleep(SETTLE_S + 0.5)  # or hashes of files that changed just now are not kept
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
                found[num] = pool.submit(first_run, place).result()
            found[num]["hit check, whole command"] = _hit_check(place)
        finally:
            shutil.rmtree(place / "cache" if config.keep else place, ignore_errors=True)
    report = {
        "command": "bench-index",
        "steps": {str(num): steps for num, steps in found.items()},
        "growth": growth(found),
        "environment": environment(),
        "summary": _table(found),
    }
    write_json(config.folder / "bench-index.json", report)
    return report


def link_files(root: Path, num: int) -> None:
    """`num` files in class folders of train and test, a tenth of them for testing."""
    from PIL import Image

    kinds, draft = root.parent / "kinds", root.with_suffix(".part")
    for folder in (kinds, draft):
        shutil.rmtree(folder, ignore_errors=True)  # likewise
        folder.mkdir(parents=True)
    for kind in range(KINDS):
        noise = np.random.default_rng(kind).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
        Image.fromarray(noise).save(kinds / f"{kind}.png")
    for i in range(num):
        split = "test" if i % 10 == 9 else "train"
        folder = f"{draft}/{split}/class{i // 10 % CLASSES:03d}"
        if i < 10 * CLASSES:
            os.makedirs(folder, exist_ok=True)
        os.link(f"{kinds}/{i % KINDS}.png", f"{folder}/{i:08d}.png")
    draft.rename(root)


def _config(place: Path) -> ExtractConfig:
    return ExtractConfig(
        dataset=str(place / "images"), weights="bundled", dtype="float16", cache_dir=place / "cache"
    )


def first_run(place: Path) -> Steps:
    """What a first run does besides computing features; the rows that it writes are zeros."""
    from featcache.cache import open_writer
    from featcache.data import find_copies, load_dataset
    from featcache.extract.extraction import split_rows
    from featcache.extract.request import Request

    steps: Steps = {}
    config = _config(place)
    with _measured(steps, "listing"):
        dataset = load_dataset(config)
    with _measured(steps, "hashing"):
        for split in dataset.splits.values():
            assert len(split.content) == len(split)
    with _measured(steps, "fingerprint"):
        request = Request.of(config, dataset)
    with _measured(steps, "copies"):
        find_copies(dataset.splits)
    rows = [split_rows(split) for split in dataset.splits.values()]
    with _measured(steps, "laying out"):
        writer = open_writer(request.path, request.meta, dataset.class_names, rows)
    with writer:
        with _measured(steps, "writing"):
            for name in dataset.splits:
                for block in writer.pending(name):
                    features = np.zeros((1, len(block), 512), np.float16)
                    writer.write_block(name, block, features, np.zeros(len(block), np.uint8))
        with _measured(steps, "finishing"):
            writer.finish()
    return steps


@contextmanager
def _measured(steps: Steps, name: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    seconds = time.perf_counter() - wall, time.process_time() - processor
    steps[name] = (*seconds, _megabytes(resource.getrusage(resource.RUSAGE_SELF)))


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MEGABYTE


def _hit_check(place: Path) -> tuple[float, float, float]:
    """extract-features once more, in a process of its own; it must find the cache."""
    config = _config(place)
    words = ["extract-features", config.dataset, "--weights", "bundled", "--dtype", "float16"]
    words += ["--cache-dir", str(config.cache_dir)]
    start = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "featcache", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or "already cached" not in answer:
        raise FeatcacheError(f"not a hit but {process.returncode}: {answer:.200}")
    wall = time.perf_counter() - start
    return wall, usage.ru_utime + usage.ru_stime, _megabytes(usage)


def growth(found: dict[int, Steps]) -> dict[str, float]:
    """By step: processor seconds per file at the largest number over those at the smallest."""
    (few, before), (many, after) = min(found.items()), max(found.items())
    return {name: (after[name][1] / many) / max(before[name][1] / few, 1e-9) for name in after}


def _table(found: dict[int, Steps]) -> list[str]:
    grown = growth(found)
    head = " | ".join(f"{num:,} files" for num in found)
    lines = [
        f"| step | {head} | per file, last to first |",
        "| --- |" + " ---: |" * (len(found) + 1),
    ]
    for name in next(iter(found.values())):
        cells = (
            f"{s[name][0]:.1f} s ({s[name][1]:.1f}), {s[name][2]:.0f} MB" for s in found.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {grown[name]:.2f} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-index", BenchConfig, bench, argv, lambda report: report["summary"])


if __name__ == "__main__":
    sys.exit(main())

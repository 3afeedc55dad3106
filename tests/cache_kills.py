"""Runs cache writers and kills them at random moments; a program of its own for the tests.

One process loads the libraries once and forks a writer per round, so that a round costs
milliseconds and the kills (SIGKILL, real) land in the work and not in the imports. After every kill
the files are examined; a writer that survives to its end is compared with an undisturbed run.

    python cache_kills.py KIND NUM_KILLS SEED FOLDER    # prints one JSON object
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py  # noqa: F401 - here, so that no fork spends its time on it
import numpy as np

from cache_helpers import CLASSES, expected, make_meta, make_splits, synthetic_cache
from featcache.cache import (
    CacheWriter,
    FeatureCache,
    open_writer,
    part_path,
    prepare_repair,
    verify,
)
from featcache.cache.storage import CacheFile

ROWS = {"train": 1500, "test": 500}
GROWN = {"train": 2000, "test": 600}
DIM = 16


def open_extraction(path: Path) -> CacheWriter:
    return open_writer(path, make_meta(dim=DIM), CLASSES, make_splits(ROWS))


def open_update(path: Path) -> CacheWriter:
    meta = make_meta(dim=DIM, fingerprint="ef" * 32)
    return open_writer(path, meta, CLASSES, make_splits(GROWN), reuse=FeatureCache(path))


KINDS: dict[str, Callable[[Path], CacheWriter]] = {
    "extract": open_extraction,
    "update": open_update,
    "repair": prepare_repair,
}


@functools.cache
def older_cache(folder: Path) -> bytes:
    return synthetic_cache(folder / "older.h5", ROWS, dim=DIM).read_bytes()


def prepare(kind: str, path: Path) -> None:
    """What is there before the first run."""
    for leftover in path.parent.glob(f"{path.name}*"):
        leftover.unlink()
    if kind == "extract":
        return
    path.write_bytes(older_cache(path.parent))
    if kind == "repair":
        data = bytearray(path.read_bytes())
        extent = FeatureCache(path).file.layout.extents["train/features"]
        for block in range(0, 23, 2):
            data[extent.offset + block * 64 * DIM * 4] ^= 1
        path.write_bytes(data)


def work(kind: str, path: Path, reports: int) -> None:
    """One run to its end, reporting through a pipe which blocks it has written."""
    with KINDS[kind](path) as writer:
        for number, split in enumerate(writer.layout.splits):
            for rows in writer.pending(split):
                time.sleep(0.001)  # stands for the network, so that kills land among the blocks
                values = expected(split, rows, dim=DIM)
                writer.write_block(split, rows, values, np.zeros(len(rows), np.uint8))
                os.write(reports, bytes([number, rows.start // 64]))
        writer.finish()


def run(kind: str, path: Path, kill_after: float | None) -> tuple[bool, set[tuple[int, int]]]:
    """Fork a run; returns whether it ended by itself, and the blocks that it reported."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            work(kind, path, writing)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a {kind} run failed")
    return not os.WIFSIGNALED(status), set(zip(written[::2], written[1::2], strict=True))


def blocks_done(path: Path) -> set[tuple[int, int]]:
    """Blocks of an unfinished file that are marked and sound; a kill alone damages none."""
    report = verify(path, cross_check=False)
    assert all(problem.startswith("unfinished") for problem in report.problems), report.problems
    file = CacheFile(path)
    return {
        (number, int(block))
        for number, split in enumerate(file.layout.splits)
        for block in np.flatnonzero(file.good_blocks(split))
    }


def main() -> None:
    kind, num_kills, seed, folder = sys.argv[1:]
    path, moments = Path(folder, "x.h5"), random.Random(int(seed))
    prepare(kind, path)
    start = time.perf_counter()
    run(kind, path, None)
    seconds = time.perf_counter() - start
    whole = path.read_bytes()
    counts = dict.fromkeys(("kills", "finished", "lost_blocks", "wrong_files", "parts_seen"), 0)
    while counts["kills"] < int(num_kills):
        prepare(kind, path)
        before = path.read_bytes() if path.exists() else None
        done, reported = False, set()
        while not done:
            done, written = run(kind, path, moments.uniform(0, 1.1 * seconds))
            counts["kills"] += not done
            reported |= written
            if done or (path.exists() and path.read_bytes() == whole):
                done = True
            elif part_path(path).exists():
                counts["parts_seen"] += 1
                counts["lost_blocks"] += len(reported - blocks_done(part_path(path)))
            if not done and before != (path.read_bytes() if path.exists() else None):
                counts["wrong_files"] += 1
        counts["finished"] += 1
        counts["wrong_files"] += path.read_bytes() != whole
        counts["wrong_files"] += not verify(path, cross_check=False).ok
    print(json.dumps(counts))


if __name__ == "__main__":
    main()

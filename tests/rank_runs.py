"""Runs the ranks of a job on a synthetic cache, and kills, stops or misleads them.

A program of its own for the tests: it loads the libraries once and forks every rank, so that a
round costs milliseconds and the kills (SIGKILL, real) land in the work.

    python rank_runs.py WRITE NUM_KILLS SEED FOLDER    # prints one JSON object
"""

from __future__ import annotations

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
from featcache.cache import verify
from featcache.cache.parallel import (
    MERGING,
    Job,
    Plan,
    Share,
    claims,
    join_shards,
    join_writers,
    merge_if_last,
    open_shard,
    remove_shards,
)

ROWS = {"train": 900, "test": 300}  # 15 blocks and 5
DIM = 16
META = make_meta(dim=DIM)
SPLITS = make_splits(ROWS)
BLOCK_S = 0.001
"""Stands for the network, so that kills land among the blocks."""


def values(split: str, rows: range) -> np.ndarray:
    return expected(split, rows, dim=DIM)


def work(write: str, path: Path, share: Share, **changes) -> str | None:
    """What one rank does, as `extract-features` does it; returns what is left to others."""
    meta = changes.get("meta", META)
    by = f"rank {share.index} of {share.size}"
    mine = Plan(meta, dict(ROWS), write, by)
    mine.agree(path).check_same(path, mine)
    if write == "shards":
        return work_on_shard(path, meta, share)
    writer = join_writers(Job(path, meta, CLASSES, SPLITS, share), helps=changes.get("helps", True))
    if writer is None:
        return "the cache is finished"
    with writer:
        for others in writer.turns():
            for split in ROWS:
                for rows in writer.take(split, others=others):
                    time.sleep(BLOCK_S)
                    good = np.zeros(len(rows), np.uint8)
                    writer.write_block(split, rows, values(split, rows), good)
        if writer.leave() is None:
            return "left to others"
    remove_shards(path)
    return None


def work_on_shard(path: Path, meta, share: Share) -> str | None:
    job = Job(path, meta, CLASSES, SPLITS, share)
    lock = join_shards(job)
    if lock is None:
        return MERGING
    writer = open_shard(job)
    if writer is not None:
        with writer:
            for split, first in writer.first_rows.items():
                for rows in writer.pending(split):
                    time.sleep(BLOCK_S)
                    features = values(split, range(first + rows.start, first + rows.stop))
                    writer.write_block(split, rows, features, np.zeros(len(rows), np.uint8))
            writer.finish()
    return merge_if_last(job, lock)


def fork(run: Callable[[], object]) -> int:
    """Run in a child; its exit code is 1 where it raised, with the message on stderr."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def wait(pids: list[int]) -> list[int]:
    """Exit codes, negative for signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def start(write: str, path: Path, size: int) -> list[int]:
    return [fork(lambda i=i: work(write, path, Share(i, size))) for i in range(size)]


def whole(folder: Path) -> bytes:
    """The file that one process writes."""
    return synthetic_cache(folder / "whole.h5", ROWS, dim=DIM).read_bytes()


def clear(path: Path) -> None:
    for left in path.parent.glob(f"{path.name}*"):
        left.unlink()


def main(write: str, num_kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Jobs of changing size, of which ranks are killed at random moments until all is done."""
    choose, path, wanted = random.Random(seed), folder / "x.h5", whole(folder)
    counts = dict.fromkeys(("kills", "rounds", "finished", "failed", "wrong"), 0)
    while counts["kills"] < num_kills:
        clear(path)
        while not path.exists():
            counts["rounds"] += 1
            pids = start(write, path, choose.choice((1, 2, 3, 5, 30)))
            if counts["rounds"] % 4:  # every fourth round is left alone
                for pid in choose.sample(pids, choose.randint(1, len(pids))):
                    time.sleep(choose.uniform(0, 0.05 / len(pids)))
                    os.kill(pid, signal.SIGKILL)
            codes = wait(pids)
            counts["kills"] += sum(code == -signal.SIGKILL for code in codes)
            counts["failed"] += sum(code > 0 for code in codes)
        wait(start(write, path, 1))  # removes what a kill left beside the finished file
        counts["finished"] += 1
        counts["wrong"] += path.read_bytes() != wanted
        # A rank killed as it writes the plan leaves an empty folder, as every atomic write does.
        left = {f.name for f in folder.iterdir() if not f.name.startswith(".x.h5.plan.")}
        counts["wrong"] += bool(left - {"x.h5", "x.h5.lock", "whole.h5", "whole.h5.lock"})
        counts["wrong"] += not verify(path, cross_check=False).ok
    return counts


if __name__ == "__main__":
    claims.LEASE_S = 20.0
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))

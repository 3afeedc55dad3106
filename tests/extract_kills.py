"""Kill a real extraction again and again; run as a script by extract/test_kill.py.

The network and the libraries are loaded once; every extraction is a fork that is killed at a
random moment after it wrote a random number of blocks, or left to finish. A killed run may only
lose the block it was writing, and every finished file must equal, byte for byte, that of an
undisturbed run.

Usage: extract_kills.py FOLDER WORK NUM_KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  (loaded before the forks)

from featcache.cache import CacheWriter, part_path, verify
from featcache.config import ExtractConfig
from featcache.engine import choose_engine  # noqa: F401
from featcache.extract import extract


def run_forked(config: ExtractConfig, kill: tuple[int, float] | None) -> bool:
    """Extract in a child, killed some seconds after it wrote a number of blocks.

    Args:
        config: What to extract.
        kill: Blocks to wait for, and the seconds from then on; None lets the run finish.

    Returns:
        Whether it finished.
    """
    progress, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            report_blocks(written)
            extract(config)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    os.close(written)
    if kill is not None:
        num_blocks, seconds = kill
        for _ in range(num_blocks):
            os.read(progress, 1)  # returns at once where the run has ended
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(progress)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an undisturbed run failed"
    return not os.WIFSIGNALED(status)


def report_blocks(pipe: int) -> None:
    """Write a byte into a pipe after every block that this process writes from now on."""
    write_block = CacheWriter.write_block

    def reported(self: CacheWriter, *args: Any) -> None:
        write_block(self, *args)
        os.write(pipe, b".")

    CacheWriter.write_block = reported  # type: ignore[method-assign]


def blocks_done(path: Path) -> int:
    """Blocks that the unfinished file holds, checked against their checksums."""
    part = part_path(path)
    if not part.exists():
        return 0
    report = verify(part, cross_check=False)
    assert not report.damaged, report.problems
    return report.num_blocks_done


def main(folder: str, work: str, num_kills: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)

    def settings(place: str) -> ExtractConfig:
        return ExtractConfig(
            dataset=folder,
            backbone="squeezenet1_1",
            weights="random",
            image_px=32,
            workers=1,
            batch_size=8,
            views="flip",
            output=Path(work) / place / "cache.h5",
            cache_dir=Path(work),
        )

    torch.set_num_threads(1)
    start = time.perf_counter()
    run_forked(settings("undisturbed"), None)
    whole_s = time.perf_counter() - start
    undisturbed = Path(work) / "undisturbed" / "cache.h5"
    wanted, block_s = undisturbed.read_bytes(), whole_s / verify(undisturbed).num_blocks
    config = settings("killed")
    path = config.output
    assert path is not None
    counts = {"kills": 0, "finished": 0, "kills_with_progress": 0, "lost_blocks": 0, "wrong": 0}
    while counts["kills"] < num_kills:
        before = blocks_done(path)
        # Half of the kills come at any moment, half only after the run made progress.
        moments = [(0, rng.uniform(0, whole_s)), (rng.choice([1, 2]), rng.uniform(0, block_s))]
        finished = run_forked(config, moments[counts["kills"] % 2])
        if finished:
            counts["finished"] += 1
            counts["wrong"] += path.read_bytes() != wanted
            path.unlink()
            continue
        counts["kills"] += 1
        if path.exists():  # killed after the rename
            counts["wrong"] += path.read_bytes() != wanted
            path.unlink()
            continue
        after = blocks_done(path)
        counts["lost_blocks"] += max(0, before - after)
        counts["kills_with_progress"] += after > before
    run_forked(config, None)
    counts["finished"] += 1
    counts["wrong"] += path.read_bytes() != wanted
    return counts


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))

"""Part of bench_extract.py: peak memory of extraction does not grow with the number of images."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.display import say
from featcache.errors import FeatcacheError

if TYPE_CHECKING:
    from bench_extract import BenchConfig

FEW, MANY = 2_500, 25_000
SIDE_PX = 32
MEGABYTE = 2**20


def compare_memory(config: BenchConfig) -> dict[str, Any]:
    """Extract both numbers of small images in turns, each in a process of its own."""
    rounds: dict[int, list[int]] = {FEW: [], MANY: []}
    for _ in range(config.rounds):
        for num, found in rounds.items():
            found.append(_peak_bytes(config, num))
    # The allocator's luck moves a peak by up to a tenth either way.
    peaks = {num: int(statistics.median(found)) for num, found in rounds.items()}
    difference = (peaks[MANY] - peaks[FEW]) / MEGABYTE
    return {
        "command": "bench-memory",
        "peak_bytes": {str(num): found for num, found in rounds.items()},
        "difference_mb": difference,
        "summary": [
            *(
                f"{num:6} images: peak {peaks[num] / MEGABYTE:.0f} MB "
                f"({min(found) / MEGABYTE:.0f} to {max(found) / MEGABYTE:.0f})"
                for num, found in rounds.items()
            ),
            f"difference of the medians {difference:+.0f} MB",
        ],
    }


def _peak_bytes(config: BenchConfig, num: int) -> int:
    """Peak resident memory of extract-features on `num` images."""
    folder = _small_images(config.folder / f"small-{num}", num)
    words = ["-m", "featcache", "extract-features", str(folder), "--weights", config.weights]
    words += ["--image-px", str(SIDE_PX), "--engine", config.engine]
    words += ["--precision", config.precision, "--cache-dir", str(config.folder / "cache")]
    say(f"extracting {num} images")
    process = subprocess.Popen([sys.executable, *words, "--force"])  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise FeatcacheError(f"extract-features ended with {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _small_images(root: Path, num: int) -> Path:
    """Write `num` different small images, a tenth of them for testing, unless they are there."""
    from PIL import Image

    for i in range(num):
        split = "test" if i % 10 == 9 else "train"
        path = root / split / f"class{i // 10 % 2}" / f"{i:05d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
            Image.fromarray(noise).save(path, compress_level=0)
    return root

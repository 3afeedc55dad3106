"""What a command costs before it does anything: whole processes, and a line of a dialog.

Commands take turns, so that other load on the machine meets all of them alike. With `--before`,
each is also run with another version of the source.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache import cli
from featcache.config import OutputConfig
from featcache.config.settings import settings
from featcache.display import say
from featcache.errors import FeatcacheError
from featcache.files import write_json
from featcache.runtime import environment

NUM_PICTURES, SIDE_PX = 100, 256
NUM_LINES = 20
Seconds = tuple[float, float]
"""Wall and processor."""


@settings
class BenchConfig(OutputConfig):
    """What to measure."""

    before: Path | None = None
    """The folder src of another version, to compare with."""
    weights: str = "bundled"
    """As in extract-features."""
    rounds: int = 5
    """Processes of each command; their median counts."""
    folder: Path = Path("startup")
    """Where pictures, caches and bench-startup.json go."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the figures to bench-startup.json."""
    pictures = _pictures(config.folder / "pictures")
    sources = {"now": Path(featcache.__file__).parents[1]}
    if config.before is not None:
        sources = {"before": config.before.resolve(), **sources}
    one = str(next(iter(sorted((pictures / "test").rglob("*.png")))))
    commands = {v: _commands(config, pictures, one, v) for v in sources}
    for version, source in sources.items():  # what the others need; not timed
        made = commands[version]
        _run(source, *made["extract-features, cached"])
        _run(source, *made.pop("train-head"))
    found: dict[str, list[Seconds]] = {}
    for _ in range(config.rounds):
        for name in commands["now"]:
            for version, source in sources.items():
                seconds = _run(source, *commands[version][name])
                found.setdefault(f"{name} ({version})", []).append(seconds)
    lines = _dialog(sources["now"], commands["now"]["predict, 1 picture"][:-1], one)
    medians = {
        name: [statistics.median(column) for column in zip(*seconds, strict=True)]
        for name, seconds in found.items()
    }
    report = {
        "command": "bench-startup",
        "seconds": found,
        "medians": medians,
        "dialog_line_s": lines,
        "environment": environment(),
        "summary": [
            *(
                f"{name}: {wall:.3f} s, {processor:.3f} s of processor time"
                for name, (wall, processor) in medians.items()
            ),
            f"predict -, a further line: {statistics.median(lines):.3f} s",
        ],
    }
    write_json(config.folder / "bench-startup.json", report)
    return report


def _commands(config: BenchConfig, pictures: Path, one: str, version: str) -> dict[str, list[str]]:
    """Words for Python by name; each version has files of its own."""
    cache, head = (str(config.folder / f"{version}.{kind}") for kind in ("h5", "safetensors"))
    extract = ["-m", "featcache", "extract-features", str(pictures), "--weights", config.weights]
    again = str(config.folder / f"{version}-again.h5")
    return {
        "import torch": ["-c", "import torch"],
        "predict, 1 picture": ["-m", "featcache", "predict", head, one],
        f"extract-features, {NUM_PICTURES} pictures": [*extract, "--output", again, "--force"],
        "extract-features, cached": [*extract, "--output", cache],
        "--help": ["-m", "featcache", "--help"],
        "train-head": ["-m", "featcache", "train-head", cache, "--output", head],
    }


def _pictures(root: Path) -> Path:
    """Two classes of different noise, a fifth of them for testing."""
    from PIL import Image

    for i in range(NUM_PICTURES):
        split = "test" if i % 5 == 4 else "train"
        path = root / split / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 128, (SIDE_PX, SIDE_PX, 3), np.uint8)
        Image.fromarray(noise + 100 * (i % 2)).save(path)
    return root


def _run(source: Path, *words: str) -> Seconds:
    say(f"running {' '.join(words)[:60]}")
    start = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise FeatcacheError(f"python {' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def _dialog(source: Path, predict: list[str], picture: str) -> list[float]:
    """Wall seconds until a line is answered, for the lines after the first of one process."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, *predict, "-", "--format", "jsonl"],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seconds = []
        for _ in range(1 + NUM_LINES):
            start = time.perf_counter()
            process.stdin.write(f"{picture}\n")
            process.stdin.flush()
            if not process.stdout.readline():
                raise FeatcacheError("predict - ended early")
            seconds.append(time.perf_counter() - start)
        process.stdin.close()
    return seconds[1:]


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-startup", BenchConfig, bench, argv, lambda report: report["summary"])


if __name__ == "__main__":
    sys.exit(main())

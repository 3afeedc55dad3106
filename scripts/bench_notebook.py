"""Part of bench_extract.py: the notebook's job done by the notebook's loop and by featcache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbone import BUNDLED_FILE
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import say

if TYPE_CHECKING:
    from bench_extract import BenchConfig

EPOCHS = 3


def compare_with_notebook(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Run both as whole processes, in turns; the shortest time of each counts."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise UserError(f"--notebook {folder}: give a folder that has train/ and test/")
    loops, ours = [], []
    for number in range(config.rounds):
        loops.append(_notebook(config, folder))
        ours.append(_featcache(config, folder))
        say(
            f"round {number + 1}: notebook {loops[-1]['wall_s']:.1f} s, "
            f"featcache {ours[-1]['wall_s']:.1f} s"
        )
    loop, our = (min(found, key=lambda one: one["wall_s"]) for found in (loops, ours))
    epoch = min(e["seconds"] for e in loop["epochs"])
    further = min(e["seconds"] for e in our["epochs"])
    speedup = {"total": loop["wall_s"] / our["wall_s"], "further_epoch": epoch / further}
    return {
        "command": "bench-notebook",
        "notebook": loop,
        "featcache": our,
        "wall_s_rounds": [[a["wall_s"], b["wall_s"]] for a, b in zip(loops, ours, strict=True)],
        "speedup": speedup,
        "summary": [
            f"notebook:  {loop['wall_s']:6.1f} s, one epoch {epoch:.1f} s, "
            f"test accuracy {loop['epochs'][-1]['test_top1']:.3f}",
            f"featcache: {our['wall_s']:6.1f} s (extract-features {our['extract_wall_s']:.1f} s, "
            f"train-head {our['train_wall_s']:.1f} s), one epoch {1000 * further:.1f} ms, "
            f"test accuracy {our['epochs'][-1]['test_top1']:.3f}",
            f"{speedup['total']:.1f} times faster; "
            f"each further epoch {speedup['further_epoch']:.0f} times",
        ],
    }


def _notebook(config: BenchConfig, folder: Path) -> dict[str, Any]:
    weights = BUNDLED_FILE if config.weights == "bundled" else config.weights
    loop = Path(__file__).with_name("notebook_loop.py")
    report, wall = _timed([str(loop), str(folder), str(weights), str(EPOCHS)])
    return {"wall_s": wall, **report}


def _featcache(config: BenchConfig, folder: Path) -> dict[str, Any]:
    place = config.folder / "notebook"
    shutil.rmtree(place, ignore_errors=True)
    flags = f"--image-px 224 --resize squash --normalize half --views {config.views} --json"
    chosen = f"--engine {config.engine} --precision {config.precision}"
    places = ["--weights", config.weights, "--cache-dir", str(place)]
    extract = ["-m", "featcache", "extract-features", str(folder), *places]
    extraction, extract_wall = _timed([*extract, *flags.split(), *chosen.split()])
    train = ["-m", "featcache", "train-head", extraction["cache"], "--json"]
    adam = f"--solver adam --epochs {EPOCHS} --lr 1e-3"
    head, train_wall = _timed([*train, *adam.split()])
    return {
        "wall_s": extract_wall + train_wall,
        "extract_wall_s": extract_wall,
        "train_wall_s": train_wall,
        "stage_seconds": extraction["stage_seconds"],
        "engine": extraction["engine"],
        "epochs": head["epochs"],
        "test_top1": head["test_top1"],
    }


def _timed(words: list[str]) -> tuple[dict[str, Any], float]:
    """Run a Python program that prints one JSON object; returns it and the wall seconds."""
    start = time.perf_counter()
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wall = time.perf_counter() - start
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise FeatcacheError(f"{' '.join(words[:3])} failed: {last}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report, wall

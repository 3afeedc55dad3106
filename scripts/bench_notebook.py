"""Part of bench_extract.py: the notebook's job done by the notebook's loop and by featcache."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbone import BUNDLED_FILE
from featcache.display import say
from featcache.engine.openvino_cpu import is_installed
from featcache.errors import FeatcacheError, UserError

if TYPE_CHECKING:
    from bench_extract import BenchConfig

EPOCHS = 3


@dataclass(frozen=True)
class Variant:
    """One way for featcache to do the job: the views that it caches, and the precision."""

    views: str
    precision: str

    @property
    def name(self) -> str:
        """For the summary."""
        views = "images and mirror images" if self.views == "flip" else "images only"
        return f"featcache, {views}, {self.precision}"


def variants() -> list[Variant]:
    """What can be run here; mirror images correspond to the loop's random mirroring."""
    found = [Variant("flip", "float32"), Variant("none", "float32")]
    if is_installed("openvino", "nncf"):
        found += [Variant("flip", "int8"), Variant("none", "int8")]
    return found


def compare_with_notebook(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Run all as whole processes: every variant, the loop, every variant again, and so on."""
    if config.weights in ("imagenet", "random"):
        raise UserError(
            f"--notebook --weights {config.weights}: give bundled or a .safetensors file, which "
            "the loop can read too"
        )
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise UserError(f"--notebook {folder}: give a folder that has train/ and test/")
    loops: list[dict[str, Any]] = []
    ours: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants()}
    for turn in range(2 * config.rounds + 1):
        if turn % 2:
            loops.append(_notebook(config, folder))
            say(f"notebook {loops[-1]['wall_s']:.1f} s")
            continue
        for variant in variants():
            ours[variant.name].append(_featcache(config, folder, variant))
            say(f"{variant.name} {ours[variant.name][-1]['wall_s']:.1f} s")
    speedups, lines = summarize(loops, ours)
    return {
        "command": "bench-notebook",
        "notebook": loops,
        "featcache": ours,
        "speedup": speedups,
        "summary": lines,
    }


def summarize(
    loops: list[dict[str, Any]], ours: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """How many times as fast each variant is, by medians; and lines that say so."""
    loop_wall = statistics.median(run["wall_s"] for run in loops)
    epoch = statistics.median(e["seconds"] for run in loops for e in run["epochs"])
    # The loop's epochs include scoring the test images, so ours do too.
    lines = [
        f"notebook's loop: {loop_wall:.1f} s, one epoch {epoch:.1f} s, "
        f"test accuracy {loops[-1]['epochs'][-1]['test_top1']:.3f}"
    ]
    speedups = {}
    for name, runs in ours.items():
        wall, extract_wall = (
            statistics.median(r[key] for r in runs) for key in ("wall_s", "extract_wall_s")
        )
        further = statistics.median(
            e["seconds"] + e["eval_seconds"] for run in runs for e in run["epochs"]
        )
        speedups[name] = {"total": loop_wall / wall, "further_epoch": epoch / further}
        lines.append(
            f"{name}: {wall:.1f} s (extract-features {extract_wall:.1f} s), "
            f"{speedups[name]['total']:.1f} times as fast; one epoch {1000 * further:.1f} ms, "
            f"{speedups[name]['further_epoch']:.0f} times as fast; "
            f"test accuracy {runs[-1]['test_top1']:.3f}"
        )
    return speedups, lines


def _notebook(config: BenchConfig, folder: Path) -> dict[str, Any]:
    weights = BUNDLED_FILE if config.weights == "bundled" else config.weights
    loop = Path(__file__).with_name("notebook_loop.py")
    # As in a notebook: only featcache's own commands let OpenMP's waiting threads sleep.
    usual = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    report, wall = timed([str(loop), str(folder), str(weights), str(EPOCHS)], usual)
    return {"wall_s": wall, **report}


def _featcache(config: BenchConfig, folder: Path, variant: Variant) -> dict[str, Any]:
    place = config.folder / "notebook"
    shutil.rmtree(place, ignore_errors=True)
    flags = f"--image-px 224 --resize squash --normalize half --views {variant.views} --json"
    engine = config.engine if variant.precision == "float32" else "auto"
    chosen = f"--device cpu --engine {engine} --precision {variant.precision}"
    places = ["--weights", config.weights, "--cache-dir", str(place)]
    extract = ["-m", "featcache", "extract-features", str(folder), *places]
    extraction, extract_wall = timed([*extract, *flags.split(), *chosen.split()])
    train = ["-m", "featcache", "train-head", extraction["cache"], "--json"]
    adam = f"--solver adam --epochs {EPOCHS} --lr 1e-3"
    head, train_wall = timed([*train, *adam.split()])
    return {
        "wall_s": extract_wall + train_wall,
        "extract_wall_s": extract_wall,
        "train_wall_s": train_wall,
        "stage_seconds": extraction["stage_seconds"],
        "engine": extraction["engine"],
        "epochs": head["epochs"],
        "test_top1": head["test_top1"],
    }


def timed(words: list[str], env: dict[str, str] | None = None) -> tuple[dict[str, Any], float]:
    """Run a Python program that prints one JSON object; returns it and the wall seconds."""
    start = time.perf_counter()
    command = [sys.executable, *words]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, env=env, check=False
    )
    wall = time.perf_counter() - start
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise FeatcacheError(f"{' '.join(words[:3])} failed: {last}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report, wall

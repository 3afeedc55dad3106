"""Fine-tuning the whole network by featcache and by the notebook's plain PyTorch loop.

    python scripts/bench_finetune.py ../shared/data/cifar10-2500 --image-px 64 --per-class 80 20

Whole processes in turns, on the same images: Adam, batches of 32, random mirroring, accuracy on
test after every epoch. Both with BatchNorm in train mode and with its statistics frozen.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import tyro

from bench_extract import as_text, fill
from bench_notebook import timed
from featcache import cli
from featcache.backbone import BUNDLED_FILE
from featcache.config import OutputConfig
from featcache.config.settings import settings
from featcache.display import say
from featcache.files import write_json
from featcache.runtime import environment


@settings
class BenchConfig(OutputConfig):
    """What to measure."""

    dataset: tyro.conf.Positional[Path]
    """A folder with train/ and test/, and class folders in both."""
    image_px: int = 64
    """Side of the network's input."""
    per_class: tuple[int, int] = (200, 50)
    """Images of each class to train and to test on."""
    epochs: int = 2
    """Epochs of each run."""
    rounds: int = 3
    """Runs of each."""
    folder: Path = Path("cache/bench-finetune")
    """Where images, models and the JSON report go."""
    docs: Path | None = None
    """Put the figures into this Markdown file, between its markers for them."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run all in turns, and write the figures to bench-finetune-PX.json."""
    images = _part(config)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(config.rounds):
        for mode in ("all", "all-bn-eval"):
            for name in ("loop", "featcache"):
                run = _loop(config, images, mode) if name == "loop" else _ours(config, images, mode)
                runs.setdefault(f"{name} {mode}", []).append(run)
                say(f"round {number + 1}: {name} {mode}: {run['wall_s']:.1f} s")
    report = {
        "command": f"bench-finetune-{config.image_px}",
        "runs": runs,
        "summary": _summary(runs),
        "environment": environment(),
    }
    write_json(config.folder / f"{report['command']}.json", report)
    if config.docs is not None:
        fill(config.docs, report["command"], as_text(report["summary"], report))
    return report


def _part(config: BenchConfig) -> Path:
    """A folder with the first images of every class."""
    part = config.folder / "images"
    shutil.rmtree(part, ignore_errors=True)
    for split, num in zip(("train", "test"), config.per_class, strict=True):
        for source in sorted((config.dataset / split).iterdir()):
            (part / split / source.name).mkdir(parents=True)
            for file in sorted(source.iterdir())[:num]:
                shutil.copy(file, part / split / source.name)
    return part


def _loop(config: BenchConfig, images: Path, mode: str) -> dict[str, Any]:
    # As in a notebook: only featcache's own commands let OpenMP's waiting threads sleep.
    usual = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    script = Path(__file__).with_name("notebook_loop.py")
    words = [str(script), str(images), str(BUNDLED_FILE), str(config.epochs)]
    return _measured([*words, str(config.image_px), mode], usual)


def _ours(config: BenchConfig, images: Path, mode: str) -> dict[str, Any]:
    model = config.folder / "model.safetensors"
    flags = f"--image-px {config.image_px} --epochs {config.epochs} --bn-eval {mode != 'all'}"
    usual = "--weights bundled --resize squash --normalize half --device cpu --no-resume --json"
    words = ["-m", "featcache", "finetune", str(images), *flags.split(), *usual.split()]
    return _measured([*words, "--cache-dir", str(config.folder), "--output", str(model)])


def _measured(words: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Seconds of a whole process, and of its epochs with scoring."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    report, wall = timed(words, env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "epoch_s": [e["seconds"] + e.get("eval_seconds", 0.0) for e in report["epochs"]],
        "test_top1": report["epochs"][-1]["test_top1"],
    }


def _summary(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians of both, and their ratios."""
    lines = []
    for mode, told in (("all", "BatchNorm trains"), ("all-bn-eval", "BatchNorm frozen")):
        loop, ours = (
            {
                "in all": statistics.median(run["wall_s"] for run in runs[f"{name} {mode}"]),
                "processor": statistics.median(run["cpu_s"] for run in runs[f"{name} {mode}"]),
                "epoch": statistics.median(
                    s for run in runs[f"{name} {mode}"] for s in run["epoch_s"]
                ),
            }
            for name in ("loop", "featcache")
        )
        ratios = ", ".join(
            f"{what} {loop[what]:.1f} s against {ours[what]:.1f} s ({loop[what] / ours[what]:.2f} "
            "times as fast)"
            for what in loop
        )
        scores = [runs[f"{name} {mode}"][-1]["test_top1"] for name in ("loop", "featcache")]
        lines.append(f"{told}: {ratios}; test accuracy {scores[0]:.3f}, {scores[1]:.3f}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-finetune", BenchConfig, bench, argv, lambda report: report["summary"])


if __name__ == "__main__":
    sys.exit(main())

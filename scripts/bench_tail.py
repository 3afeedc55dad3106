"""An epoch of the tail from cached activations against the same tail, and all layers, in the loop.

Epochs take turns in one process, so that other load on the machine meets all of them alike.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from featcache import cli
from featcache.config import FinetuneConfig, OutputConfig
from featcache.config.settings import settings
from featcache.display import say
from featcache.files import write_json
from featcache.runtime import environment


@settings
class BenchConfig(OutputConfig):
    """What to measure."""

    dataset: tyro.conf.Positional[str]
    """As in finetune."""
    weights: str = "bundled"
    """As in finetune."""
    from_stage: str = "layer4"
    """As in finetune, for networks whose stages are modules of their own, as a ResNet's are."""
    image_px: int | None = None
    """As in finetune."""
    num_train: int | None = None
    """Use only this many train images, as in finetune."""
    rounds: int = 3
    """Epochs of each; the fastest counts."""
    cache_dir: Path = Path("cache")
    """Where activations are cached and bench-tail.json goes."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the figures to bench-tail.json."""
    from featcache.finetune.loop import train_epoch
    from featcache.finetune.setup import prepare

    names = ("dataset", "weights", "image_px", "num_train", "cache_dir", "from_stage")
    tail = FinetuneConfig(**{name: getattr(config, name) for name in names}, recipe="good")
    whole = dataclasses.replace(tail, from_stage=None)
    stages = ["layer1", "layer2", "layer3", "layer4"]
    following = ",".join(stages[stages.index(config.from_stage) :])
    ways = {
        f"tail from {config.from_stage}, cached": tail,
        f"tail from {config.from_stage}, in the loop": dataclasses.replace(
            whole, unfreeze=following
        ),
        "all layers": whole,
    }
    runs = {name: prepare(way) for name, way in ways.items()}
    optimizers = {name: run.trainable.make_optimizer() for name, run in runs.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(config.rounds):
        for name, run in runs.items():
            start = time.process_time()
            _, wall, _ = train_epoch(
                run.trainable, optimizers[name], run.train, run.placement, turn
            )
            seconds[name].append((wall, time.process_time() - start))
            say(f"{name}: {wall:.1f} s, {seconds[name][-1][1]:.1f} s of processor time")
    fastest = {name: [min(times) for times in zip(*s, strict=True)] for name, s in seconds.items()}
    wall, processor = fastest[next(iter(ways))]
    stage_cache = runs[next(iter(ways))].stage_cache
    assert stage_cache is not None
    report = {
        "seconds": seconds,
        "fastest": fastest,
        "ratios": {name: [w / wall, p / processor] for name, (w, p) in fastest.items()},
        "activations": stage_cache.describe(),
        "environment": environment(),
    }
    write_json(config.cache_dir / "bench-tail.json", report)
    return report


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    return [
        f"{name}: {report['fastest'][name][0]:.2f} s an epoch, {wall:.1f} times the cached tail's "
        f"({processor:.1f} times its processor time)"
        for name, (wall, processor) in report["ratios"].items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-tail", BenchConfig, bench, argv, summary_lines)


if __name__ == "__main__":
    sys.exit(main())

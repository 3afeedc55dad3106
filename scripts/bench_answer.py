#!/usr/bin/env python
"""Cached heads against fine-tuning: how much of the gap each closes, on several datasets.

For each dataset: heads on the last layer, on all stages, on a network with adapted BatchNorm
statistics, and on both; the one of these four that held-out train rows prefer; and fine-tuning with
the notebook's settings at two rates and with the good recipe. The test split scores each once.

    python scripts/bench_answer.py digits ../shared/data/cifar10-2500 ../shared/data/sign-digits

A folder with a groups.csv (path,label,group) is split by group: no group is in train and in test.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from featcache.config import ExtractConfig, FinetuneConfig, TrainHeadConfig
from featcache.extract import extract
from featcache.finetune import finetune
from featcache.heads import train_head
from featcache.results import RunReport
from featcache.results.metrics import mcnemar

CACHED = {
    "head, last layer": {},
    "head, all stages": {"layers": "stages"},
    "head, adapted BatchNorm": {"batchnorm": "adapt"},
    "head, all stages, adapted BatchNorm": {"layers": "stages", "batchnorm": "adapt"},
}
BEST = "best cached head, chosen on train"
TUNED: dict[str, dict[str, Any]] = {
    "fine-tune, lr 1e-3": {},
    "fine-tune, lr 1e-4": {"lr": 1e-4},
    "fine-tune, good recipe": {"recipe": "good"},
}
TEST_SHARE = 0.24


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """What to run."""

    datasets: tyro.conf.Positional[tuple[str, ...]]
    """Datasets as extract-features takes them; folders with groups.csv are split by group."""
    tune: bool = True
    """Whether to fine-tune too, which takes most of the time."""
    weights: str = "bundled"
    """As in extract-features."""
    folder: Path = Path("cache/answer")
    """Where caches, models and answer.json go."""
    seed: int = 42
    """Of every command, and of the split by group."""


def main(config: AnswerConfig) -> None:
    """Run everything, print a table per dataset, write answer.json and answer.md."""
    config.folder.mkdir(parents=True, exist_ok=True)
    results = [run_dataset(name, config) for name in config.datasets]
    (config.folder / "answer.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(table(result) for result in results) + "\n"
    (config.folder / "answer.md").write_text(text)
    print(text)


def run_dataset(name: str, config: AnswerConfig) -> dict[str, Any]:
    """Every mode on one dataset."""
    folder = config.folder / Path(name).stem
    groups = Path(name) / "groups.csv"
    dataset = str(split_by_group(groups, folder, config.seed)) if groups.is_file() else name
    shared = {"dataset": dataset, "weights": config.weights, "seed": config.seed}
    if groups.is_file():
        shared["image_root"] = Path(name)
    runs: dict[str, RunReport] = {}
    rows = []
    for mode, changes in CACHED.items():
        report, seconds = run_cached(ExtractConfig(**shared, **changes, cache_dir=folder), folder)
        runs[mode] = report
        rows.append(row(mode, report, seconds))
    best = max(rows, key=lambda r: r["held_out_top1"])
    runs[BEST] = runs[best["mode"]]
    spent = sum(r["seconds"] for r in rows)  # choosing takes all four
    rows.append({**best, "mode": BEST, "chosen": best["mode"], "seconds": spent})
    for mode, changes in TUNED.items() if config.tune else ():
        start = time.perf_counter()
        output = folder / f"{mode.replace(', ', '-').replace(' ', '-')}.safetensors"
        settings = FinetuneConfig(**shared, **changes, cache_dir=folder, output=output, flip=False)
        finetune(dataclasses.replace(settings, resume=False))
        runs[mode] = RunReport.load(output.with_suffix(".json"))
        rows.append(row(mode, runs[mode], time.perf_counter() - start))
    # Without fine-tuning, the plain head is what the others are compared with.
    rivals = TUNED if config.tune else [next(iter(CACHED))]
    tuned = max(rivals, key=lambda mode: runs[mode].test_top1)
    for each in rows:
        each["p_value"] = paired(runs[each["mode"]], runs[tuned]) if each["mode"] != tuned else None
    return {"dataset": name, "compared_with": tuned, "rows": rows}


def split_by_group(groups: Path, folder: Path, seed: int) -> Path:
    """A manifest in which every group is in train or in test; about TEST_SHARE of rows in test."""
    with groups.open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = sorted({line["group"] for line in lines})
    sizes = {name: sum(line["group"] == name for line in lines) for name in names}
    test, num = set(), 0
    for place in np.random.default_rng(seed).permutation(len(names)):
        if num >= TEST_SHARE * len(lines):
            break
        test.add(names[place])
        num += sizes[names[place]]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"{groups.parent.name}-by-group.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for line in lines:
            split = "test" if line["group"] in test else "train"
            writer.writerow([line["path"], line["label"], split])
    return manifest


def run_cached(config: ExtractConfig, folder: Path) -> tuple[RunReport, float]:
    """Cache the features afresh and fit train-head's default; seconds of both."""
    start = time.perf_counter()
    report = extract(dataclasses.replace(config, force=True))
    head = Path(train_head(TrainHeadConfig(cache=Path(report["cache"])))["head"])
    seconds = time.perf_counter() - start
    return RunReport.load(head.with_suffix(".json")), seconds


def row(mode: str, report: RunReport, seconds: float) -> dict[str, Any]:
    """One line of the table, as JSON."""
    return {
        "mode": mode,
        "test_top1": report.test_top1,
        "test_interval": list(report.test_interval),
        "held_out_top1": report.more.get("val_top1"),
        "trainable_params": report.trainable_params,
        "seconds": seconds,
    }


def paired(one: RunReport, other: RunReport) -> float:
    """The paired test of two runs on the same test images."""
    assert one.test is not None
    assert other.test is not None
    right = dict(zip(other.test.ids, other.test.correct(), strict=True))
    return mcnemar(one.test.correct(), [right[name] for name in one.test.ids])


def table(result: dict[str, Any]) -> str:
    """One dataset's rows in Markdown."""
    lines = [
        f"**{result['dataset']}** (p: paired test against {result['compared_with']})",
        "",
        "| mode | held-out | test top-1 | seconds | p |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in result["rows"]:
        low, high = each["test_interval"]
        held = each["held_out_top1"]
        p = each["p_value"]
        mode = each["mode"] + (f" ({each['chosen']})" if "chosen" in each else "")
        lines.append(
            f"| {mode} | {'' if held is None else f'{held:.3f}'} "
            f"| {each['test_top1']:.3f} [{low:.3f}, {high:.3f}] | {each['seconds']:.0f} "
            f"| {'' if p is None else f'{p:.2g}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(AnswerConfig))

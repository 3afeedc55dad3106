"""Cached heads against fine-tuning: how much of the gap each closes, on several datasets.

For each dataset: heads on the last layer, on all stages, on a network with adapted BatchNorm
statistics, and on both; of the two on all stages (which may use the last layer alone), the one that
held-out train rows prefer; the tail of the network trained from cached activations, with a head on
the last layer and, on the network that the best cached head has, with one on all stages; and full
fine-tuning with the notebook's settings at two rates and with the good recipe, for eight epochs as
the tail. The test split scores each once.

    python scripts/bench_answer.py digits ../shared/data/cifar10-2500 ../shared/data/sign-digits

A folder with a manifest groups.csv (path,label,group) is split by group: none is in train and test.
Finished rows are kept in --folder, and the same command goes on from them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from bench_extract import fill
from benchmark import BenchmarkConfig, warm_up
from featcache.config import ExtractConfig, FinetuneConfig, TrainHeadConfig
from featcache.data.torchvision_sets import TORCHVISION_SETS
from featcache.extract import extract
from featcache.files import write_json
from featcache.finetune import finetune_report
from featcache.finetune.trainable import TAIL_OF_GOOD
from featcache.heads import train_head
from featcache.results import RunReport
from featcache.results.metrics import mcnemar

Kind = Literal["cached", "tail", "notebook", "good"]
LAST = "head, last layer"
STAGES, ADAPTED = "head, all stages", "head, all stages, adapted BatchNorm"
WIDE_TAIL = "tail from layer4, all stages"
# By kind of training and name: the settings of extract-features, or of finetune.
MODES: dict[Kind, dict[str, dict[str, Any]]] = {
    "cached": {
        LAST: {},
        STAGES: {"layers": "stages"},
        "head, adapted BatchNorm": {"batchnorm": "adapt"},
        ADAPTED: {"layers": "stages", "batchnorm": "adapt"},
    },
    "tail": {
        "tail from layer4": {"from_stage": "layer4"},
        "tail from layer3": {"from_stage": "layer3"},
        WIDE_TAIL: {"from_stage": "layer4", "layers": "stages"},
    },
    "notebook": {
        "fine-tune, notebook's recipe, lr 1e-3": {},
        "fine-tune, notebook's recipe, lr 1e-4": {"lr": 1e-4},
    },
    "good": {
        # As long, and at the rates, as tails have by default.
        "fine-tune, good recipe": {"recipe": "good", **TAIL_OF_GOOD},
    },
}
FULL: tuple[Kind, ...] = ("notebook", "good")
BEST = "best cached head, chosen on train"
TEST_SHARE = 0.24
# Of torchvision's datasets, which are much larger than the others.
NUM_TRAIN, NUM_TEST = 2000, 1000


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """What to run."""

    datasets: tyro.conf.Positional[tuple[str, ...]]
    """Datasets as extract-features takes them; folders with groups.csv are split by group."""
    kinds: tuple[Kind, ...] = tuple(MODES)
    """Which rows to run; fine-tuning takes most of the time."""
    weights: str = "bundled"
    """As in extract-features."""
    folder: Path = Path("cache/answer")
    """Where caches, models, finished rows and answer.md go."""
    seed: int = 42
    """Of every command, and of the split by group."""
    docs: Path | None = None
    """Put the tables into this Markdown file, between its markers for them."""


def main(config: AnswerConfig) -> None:
    """Run what is missing, print a table per dataset, write answer.json and answer.md."""
    config.folder.mkdir(parents=True, exist_ok=True)
    results = [run_dataset(name, config) for name in config.datasets]
    write_json(config.folder / "answer.json", results)
    text = "\n\n".join(table(result) for result in results) + "\n"
    if config.docs is not None:
        fill(config.docs, "answer", ["", text])
    (config.folder / "answer.md").write_text(text)
    print(text)


def run_dataset(name: str, config: AnswerConfig) -> dict[str, Any]:
    """Every mode on one dataset."""
    folder = config.folder / Path(name).stem
    shared = dataset_settings(name, config.seed)
    shared |= {"weights": config.weights, "cache_dir": folder}
    warm_up(BenchmarkConfig(**shared))
    rows = []
    for kind, modes in MODES.items():
        for mode, changes in modes.items():
            stem = "-".join(mode.replace(",", "").replace("'", "").split())
            finished = folder / f"{stem}.row.json"
            if not finished.exists() and kind in config.kinds:
                run = run_cached if kind == "cached" else run_tuned
                on = {"weights": best_network(rows, folder)} if mode == WIDE_TAIL else {}
                row = run(shared | changes | on, stem)
                write_json(finished, {"kind": kind, "mode": mode} | row)
            if finished.exists():
                rows.append(scored(json.loads(finished.read_text())))
    return {"dataset": name, **judged(rows)}


def best_network(rows: list[dict[str, Any]], folder: Path) -> str:
    """The weights of the best cached head; adapted ones are a file beside its cache."""
    info = RunReport.load(Path(best_cached(rows)["report"])).provenance["backbone"]
    adapted = folder / info["weights"]
    return str(adapted) if adapted.is_file() else str(info["weights"])


def dataset_settings(name: str, seed: int) -> dict[str, Any]:
    """The settings of a dataset: its name, its split by group, and how much of it."""
    groups = Path(name) / "groups.csv"
    if groups.is_file():
        return {"dataset": str(groups), "test_fraction": TEST_SHARE, "seed": seed}
    if name.lower() in TORCHVISION_SETS:
        return {"dataset": name, "num_train": NUM_TRAIN, "num_test": NUM_TEST, "seed": seed}
    return {"dataset": name, "seed": seed}


def run_cached(settings: dict[str, Any], stem: str) -> dict[str, Any]:
    """Cache the features afresh and fit train-head's default."""
    start, spent = time.perf_counter(), time.process_time()
    report = extract(ExtractConfig(**settings, force=True))
    head = settings["cache_dir"] / f"{stem}.safetensors"
    train_head(TrainHeadConfig(cache=Path(report["cache"]), output=head))
    return cost(head, start, spent)


def run_tuned(settings: dict[str, Any], stem: str) -> dict[str, Any]:
    """Fine-tune on images, mirrored at random unless they are characters."""
    start, spent = time.perf_counter(), time.process_time()
    flip = mirrored(settings["dataset"])
    model = settings["cache_dir"] / f"{stem}.safetensors"
    finetune_report(FinetuneConfig(**settings, flip=flip, output=model, score="end", resume=False))
    return cost(model, start, spent)


def mirrored(dataset: str) -> bool:
    """Whether train images are mirrored at random, as benchmark.py decides it."""
    return BenchmarkConfig(dataset=dataset, weights="bundled").flips


def cost(output: Path, start: float, spent: float) -> dict[str, Any]:
    """Where a run's report is, its seconds, and its processor's, which a busy machine keeps."""
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - spent
    report = str(output.with_suffix(".json"))
    return {"report": report, "seconds": seconds, "cpu_seconds": cpu_seconds}


def scored(row: dict[str, Any]) -> dict[str, Any]:
    """A finished row with the scores of its report."""
    report = RunReport.load(Path(row["report"]))
    return row | {
        "test_top1": report.test_top1,
        "test_interval": list(report.test_interval),
        "held_out_top1": report.more.get("val_top1"),
        "trainable_params": report.trainable_params,
        "num_train": report.more["num_train"],
        "num_test": report.more["num_test"],
    }


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with that of the best cached head, and what sets it against full fine-tuning.

    The best cached head has the better held-out accuracy of the two on all stages, and costs what
    both cost. The best fine-tune has the best test accuracy, which favors fine-tuning.
    """
    best = best_cached(rows)
    after = sum(row["kind"] == "cached" for row in rows)
    rows = [*rows[:after], best, *rows[after:]]
    for row in rows:
        row["p_value"] = paired(row, best)
    tuned = [row for row in rows if row["kind"] in FULL]
    if not tuned:
        return {"rows": rows}
    full = max(tuned, key=lambda row: row["test_top1"])
    base = next(row["test_top1"] for row in rows if row["mode"] == LAST)
    gap = full["test_top1"] - base
    for row in rows:
        row["closed"] = (row["test_top1"] - base) / gap if gap > 0 else None
        row["cost_share"] = row["cpu_seconds"] / full["cpu_seconds"]
        row["p_value_full"] = paired(row, full)
    return {"rows": rows, "best_tuned": full["mode"], "gap": gap}


def best_cached(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best cached head; see `judged`."""
    choices = [row for row in rows if row["mode"] in (STAGES, ADAPTED)]
    best = max(choices, key=lambda row: row["held_out_top1"])
    spent = {name: sum(row[name] for row in choices) for name in ("seconds", "cpu_seconds")}
    return best | spent | {"mode": BEST, "chosen": best["mode"]}


def paired(row: dict[str, Any], against: dict[str, Any]) -> float | None:
    """The paired test of two rows on the same test images; None for a row and itself."""
    if row["report"] == against["report"]:
        return None
    one, other = (RunReport.load(Path(each["report"])) for each in (row, against))
    assert one.test is not None
    assert other.test is not None
    right = dict(zip(other.test.ids, other.test.correct(), strict=True))
    return mcnemar(one.test.correct(), [right[name] for name in one.test.ids])


def table(result: dict[str, Any]) -> str:
    """One dataset's rows in Markdown."""
    lines = [
        f"**{Path(result['dataset']).name}** ({num_images(result['rows'][0])})",
        "",
        "| mode | held-out | test top-1 | gap closed | seconds | processor s "
        "| p, best head | p, best fine-tune |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        low, high = row["test_interval"]
        held, closed = row.get("held_out_top1"), row.get("closed")
        p_values = (row.get(name) for name in ("p_value", "p_value_full"))
        mode = row["mode"] + (f" ({row['chosen'].partition(', ')[2]})" if "chosen" in row else "")
        lines.append(
            f"| {mode} | {'' if held is None else f'{held:.3f}'} "
            f"| {row['test_top1']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {'' if closed is None else f'{closed:.0%}'} | {row['seconds']:.0f} "
            f"| {row['cpu_seconds']:.0f} "
            + " ".join(f"| {'' if p is None else f'{p:.2g}'}" for p in p_values)
            + " |"
        )
    return "\n".join([*lines, *verdict(result)])


def num_images(row: dict[str, Any]) -> str:
    """The sizes of the splits, in words."""
    return f"{row['num_train']:,} train and {row['num_test']:,} test images"


def verdict(result: dict[str, Any]) -> list[str]:
    """The best cached head against the best fine-tune, in a sentence."""
    if "best_tuned" not in result:
        return []
    best = next(row for row in result["rows"] if row["mode"] == BEST)
    cost = f"{best['cost_share']:.0%} of its processor time"
    if best["closed"] is None:
        return ["", f"No fine-tune beats the last layer's head; the best cached head takes {cost}."]
    closed = f"{best['closed']:.0%} of the gap to {result['best_tuned']!r}"
    return ["", f"The best cached head closes {closed} in {cost}."]


if __name__ == "__main__":
    main(tyro.cli(AnswerConfig))

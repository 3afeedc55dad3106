"""Single runs of a comparison: do one, keep it as a report file, find it again."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache, lock_path
from featcache.compare.budget import Pace, pace_of, tuning_pace
from featcache.compare.extraction import Extraction
from featcache.compare.plan import Ints, Spec, nested_rows
from featcache.config import CompareConfig, FinetuneConfig, TrainHeadConfig
from featcache.data import ImageDataset
from featcache.errors import UserError
from featcache.finetune import finetune_report
from featcache.finetune.trainable import resolve_recipe
from featcache.heads import train_head
from featcache.results import RunReport, cell_of, config_json
from featcache.runtime import say

CHECKPOINT_S = 60.0
"""A small train set's epoch takes less time than writing the network's state."""
TIMED_BATCHES, TIMED_EPOCHS = 2, 2
"""Of a fine-tune that is only timed: the first epoch warms up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all runs share.

    Attributes:
        config: The command's settings.
        output: The comparison's folder.
        dataset: Without the pictures that could not be read; its rows are the cache's.
        cache: The features; its train and test rows are the dataset's.
        extraction: What the features cost.
    """

    config: CompareConfig
    output: Path
    dataset: ImageDataset
    cache: FeatureCache
    extraction: Extraction

    def report_path(self, spec: Spec) -> Path:
        """Where a finished run is kept."""
        return self.output / "runs" / f"{spec.name}.json"


def load_finished(bench: Bench, spec: Spec) -> RunReport | None:
    """A run that an earlier start finished with the same settings; None otherwise."""
    path = bench.report_path(spec)
    if not path.is_file():
        return None
    try:
        report = RunReport.load(path)
        cell = report.more["cell"]
        right = cell["key"] == spec.key
        cell_of(report)
        pace_of(report)
    except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # damaged, or of another version: it is made anew
    return report if right else None


def do_run(bench: Bench, spec: Spec) -> RunReport:
    """Make one run and keep it.

    Raises:
        UserError: Wrong input.
        StorageError: The report could not be written.
    """
    start = time.perf_counter()
    make = _train_head if spec.mode == "cached" else _finetune
    report, cost, trial = make(bench, spec)
    cell = {
        "key": spec.key,
        "mode": spec.mode,
        "size": spec.size,
        "draw": spec.draw,
        "seed": spec.seed,
        "cost_seconds": cost,
        "trial_seconds": trial,
        "spent_seconds": time.perf_counter() - start,
    }
    report = dataclasses.replace(report, more={**report.more, "cell": cell})
    report.save(bench.report_path(spec))
    return report


def warm_up(bench: Bench, spec: Spec) -> None:
    """Fit a head without keeping it, so that the first run's time holds no loading of libraries."""
    with tempfile.TemporaryDirectory() as folder:
        config = head_config(bench, spec)
        path = Path(folder) / "head.safetensors"
        train_head(dataclasses.replace(config, output=path), spec.rows)


def time_tuning(bench: Bench) -> Pace:
    """Fine-tune on a few images without keeping anything, to tell what whole runs will take.

    It also loads fine-tuning's libraries, which the first run would pay for.
    """
    import featcache.heads.estimator  # noqa: F401 - the linear probe's, before the clock runs

    config, splits = bench.config, bench.dataset.splits
    tuning = finetune_config(config, None, config.seed)
    tuning = dataclasses.replace(tuning, epochs=TIMED_EPOCHS)
    say("timing a few steps of fine-tuning, to know which runs fit into the budget")
    wanted = TIMED_BATCHES * tuning.batch_size
    start = time.perf_counter()
    few = {}
    for name in ("train", "test"):
        labels = splits[name].labels
        each = math.ceil(wanted / len(np.unique(labels)))
        rows = nested_rows(splits[name].ids, labels, each, config.seed)
        places = np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(np.int64)
        few[name] = rows[places]
    report = _tune(bench, tuning, "timing", **few)
    return tuning_pace(report, time.perf_counter() - start)


def head_config(bench: Bench, spec: Spec) -> TrainHeadConfig:
    """The settings of train-head that a cached run stands for."""
    return TrainHeadConfig(
        cache=Path(bench.extraction.cache),
        solver=bench.config.solver,
        seed=spec.seed,
        cache_dir=bench.config.cache_dir,
        output=bench.report_path(spec).with_suffix(".safetensors"),
    )


def _train_head(bench: Bench, spec: Spec) -> tuple[RunReport, float, float]:
    """Fit a head on the cached features of some train images; head and report are written."""
    path = bench.report_path(spec)
    # An earlier start's report of other settings must not stand beside the new head.
    path.unlink(missing_ok=True)
    train_head(head_config(bench, spec), spec.rows)
    report = RunReport.load(path)
    fitting = float(report.more["fit_seconds"])
    return report, bench.extraction.seconds_per_image * len(spec.rows) + fitting, fitting


def finetune_config(config: CompareConfig, num_train: int | None, seed: int) -> FinetuneConfig:
    """The settings of finetune that a fine-tuning run stands for.

    Args:
        config: The comparison's.
        num_train: Train images; few get more epochs. None leaves the epochs as they are.
        seed: Of training.
    """
    ours = {field.name for field in dataclasses.fields(CompareConfig)}
    theirs = {field.name for field in dataclasses.fields(FinetuneConfig)}
    shared = (ours & theirs) - {"json", "verbose", "output", "seed"}
    values: dict[str, Any] = {name: getattr(config, name) for name in shared}
    # Random weights are drawn from the seed: every run has to start from those of the cache.
    seed = config.seed if config.weights == "random" else seed
    tuning = FinetuneConfig(**values, seed=seed, score="end")
    if num_train is None:
        return tuning
    plan = resolve_recipe(tuning)
    per_epoch = math.ceil(num_train / plan.batch_size)
    epochs = max(plan.epochs, math.ceil(config.min_steps / per_epoch))
    return dataclasses.replace(tuning, epochs=epochs)


def _finetune(bench: Bench, spec: Spec) -> tuple[RunReport, float, float]:
    """Fine-tune on some train images; the model itself is not kept."""
    config = finetune_config(bench.config, len(spec.rows), spec.seed)
    test = np.arange(len(bench.dataset.splits["test"]))
    report = _tune(bench, config, spec.name, train=spec.rows, test=test)
    cost = _tuning_seconds(report)
    return report, cost, cost


def _tune(bench: Bench, config: FinetuneConfig, name: str, **rows: Ints) -> RunReport:
    """Fine-tune on these rows of train, score on these of test; only the report is kept."""
    model = bench.output / "work" / f"{name}.safetensors"
    config = dataclasses.replace(config, output=model)
    splits = {split: whole.subset(rows[split]) for split, whole in bench.dataset.splits.items()}
    dataset = dataclasses.replace(bench.dataset, splits=splits)
    report = finetune_report(config, dataset, checkpoint_s=CHECKPOINT_S, replace=True)
    kept = {name: value for name, value in report.more.items() if name != "model"}
    model.unlink(missing_ok=True)
    model.with_suffix(".json").unlink(missing_ok=True)
    lock_path(model).unlink(missing_ok=True)  # nobody else writes this comparison
    return dataclasses.replace(report, more=kept, config=config_json(config))


def _tuning_seconds(report: RunReport) -> float:
    """Seconds from labelled images to a classifier, without reading and scoring the test split."""
    scoring = sum(float(epoch.get("eval_seconds", 0.0)) for epoch in report.epochs)
    num_train, num_test = int(report.more["num_train"]), int(report.more["num_test"])
    reading = float(report.more["read_seconds"]) * num_test / (num_train + num_test)
    return max(report.seconds_total - scoring - reading, 0.0)

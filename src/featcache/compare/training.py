"""Single runs of a comparison: train one and save its report, or load it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache, lock_path
from featcache.compare.alternatives import Network, train_best_head
from featcache.compare.budget import FinishedRun, Pace, finetune_pace
from featcache.compare.extraction import Extraction, over_budget, record_name, shared_cache
from featcache.compare.planned_runs import Ints, PlannedRun, nested_rows
from featcache.compare.shifted import ShiftedTest
from featcache.config import (
    CacheMeta,
    CompareConfig,
    FinetuneConfig,
    TrainHeadConfig,
    config_json,
)
from featcache.config.settings import carried_over
from featcache.data import ImageDataset
from featcache.display import say
from featcache.errors import UserError
from featcache.extract.request import Request
from featcache.finetune import finetune_report
from featcache.finetune.activations import extraction_config
from featcache.finetune.trainable import resolve_recipe
from featcache.heads import train_head_report
from featcache.heads.train import provenance_of
from featcache.results import RunReport
from featcache.results.learning_curve import CurveMode
from featcache.runtime import numeric_versions

CHECKPOINT_S = 60.0
"""An epoch over few images takes less time than writing a checkpoint."""
MAX_TAIL_BYTES = 2_000_000_000
"""Of activations that nobody asked for by the name of their stage."""
TIMED_BATCHES, TIMED_EPOCHS = 2, 2
"""For a fine-tune that is only timed: the first epoch warms up."""


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The stage from which the tail trains, and what caching its input cost."""

    stage: str
    activations: Extraction


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparisonSetup:
    """What all runs share.

    Attributes:
        config: The command's settings.
        output: The comparison's folder.
        dataset: Without the images that could not be read; its rows are the cache's.
        caches: The features of each network; their train and test rows are the dataset's.
        extractions: What the features of each cost.
        shifted: The second test set, if there is one.
        tail: The stage from which the tail trains, if there is a tail.
    """

    config: CompareConfig
    output: Path
    dataset: ImageDataset
    caches: dict[Network, FeatureCache]
    extractions: dict[Network, Extraction]
    shifted: ShiftedTest | None = None
    tail: Tail | None = None

    def tuning(self, mode: CurveMode, num_train: int | None, seed: int) -> FinetuneConfig:
        """The settings of finetune for a run in this mode; see `finetune_config`."""
        stage = self.tail.stage if self.tail is not None and mode == "tail" else None
        return finetune_config(self.config, num_train, seed, stage)

    @property
    def cache(self) -> FeatureCache:
        """The first network's."""
        return next(iter(self.caches.values()))

    @property
    def seconds_per_image(self) -> float:
        """Of all extractions that the choice among networks needs."""
        return sum(extraction.seconds_per_image for extraction in self.extractions.values())

    def report_path(self, planned: PlannedRun) -> Path:
        """The report file of a run."""
        return self.output / "runs" / f"{planned.name}.json"


def decisive(setup: ComparisonSetup) -> dict[CurveMode, dict[str, Any]]:
    """What decides a run's outcome besides its samples and seed, by mode."""
    config = setup.config
    provenance = provenance_of(setup.cache)
    same = {
        "backbone": provenance["backbone"],
        "cache": provenance["cache_digest"],
        "versions": numeric_versions(config.backbone),
    }
    if setup.shifted is not None:
        same["shifted"] = setup.shifted.digest

    def tuning(mode: CurveMode) -> dict[str, Any]:
        plan = resolve_recipe(setup.tuning(mode, None, config.seed)).to_dict()
        del plan["seed"]
        return {**same, "plan": plan, "min_steps": config.min_steps}

    digests = [cache.digest.hex() for cache in setup.caches.values()]
    facts: dict[CurveMode, dict[str, Any]] = {
        "cached": {**same, "caches": digests, "solver": config.solver},
        "finetune": tuning("finetune"),
    }
    if setup.tail is not None:
        facts["tail"] = {**tuning("tail"), "activations": setup.tail.activations.cache_digest}
    return facts


def load_finished(setup: ComparisonSetup, planned: PlannedRun) -> FinishedRun | None:
    """The run that an earlier start finished with the same settings, if there is one."""
    try:
        run = FinishedRun.from_report(RunReport.load(setup.report_path(planned)))
    except UserError:
        return None  # missing, damaged, or of another version
    return run if run.report.more["cell"].get("key") == planned.key else None


def train_and_save(setup: ComparisonSetup, planned: PlannedRun) -> FinishedRun:
    """Train one run, and save its report.

    Raises:
        UserError: Wrong input.
        StorageError: The report could not be written.
    """
    start = time.perf_counter()
    report, cost, trial = TRAINERS[planned.mode](setup, planned)
    cell = {
        "key": planned.key,
        "mode": planned.mode,
        "size": planned.size,
        "draw": planned.draw,
        "seed": planned.seed,
        "cost_seconds": cost,
        "trial_seconds": trial,
        "spent_seconds": time.perf_counter() - start,
    }
    report = dataclasses.replace(report, more={**report.more, "cell": cell})
    report.save(setup.report_path(planned))
    return FinishedRun.from_report(report)


def warm_up(setup: ComparisonSetup, planned: PlannedRun) -> None:
    """Fit a head and discard it, so that loading libraries is not in the first run's time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.safetensors"
        for config in head_configs(setup, planned).values():
            train_head_report(dataclasses.replace(config, output=path), planned.rows)


def time_finetuning(setup: ComparisonSetup) -> Pace:
    """Fine-tune on a few images and discard the model, to estimate what whole runs will take.

    This also loads the libraries of fine-tuning, outside the time of the first run.
    """
    import featcache.heads.estimator  # noqa: F401 - the linear probe's, before the clock runs

    config, splits = setup.config, setup.dataset.splits
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
    report = _tune(setup, tuning, "timing", None, **few)
    return finetune_pace(report, time.perf_counter() - start)


def head_configs(setup: ComparisonSetup, planned: PlannedRun) -> dict[Network, TrainHeadConfig]:
    """The settings of train-head for a run on each cache."""
    output = setup.report_path(planned).with_suffix(".safetensors")
    return {
        network: TrainHeadConfig(
            cache=Path(extraction.cache),
            solver=setup.config.solver,
            seed=planned.seed,
            cache_dir=setup.config.cache_dir,
            output=output,
        )
        for network, extraction in setup.extractions.items()
    }


def _train_head(setup: ComparisonSetup, planned: PlannedRun) -> tuple[RunReport, float, float]:
    """Fit a head on cached features of some train images; head and report are written.

    With features of several networks, held-out rows among these images choose; choosing and all
    extractions count.
    """
    # An old report with different settings must not remain beside the new head.
    setup.report_path(planned).unlink(missing_ok=True)
    report = train_best_head(head_configs(setup, planned), planned.rows)
    fitting = sum(float(each["fit_seconds"]) for each in report.more["alternatives"])
    if setup.shifted is not None:
        shifted = {"shifted": setup.shifted.score_head(report)}
        report = dataclasses.replace(report, more=report.more | shifted)
    return report, setup.seconds_per_image * len(planned.rows) + fitting, fitting


def shared_tail(
    config: CompareConfig, dataset: ImageDataset, extraction: Extraction, output: Path
) -> Tail | None:
    """Cache what the tail trains from, or find it; None without a tail.

    Args:
        config: The command's settings.
        dataset: What they name.
        extraction: What the features of the frozen network cost.
        output: The comparison's folder.

    Raises:
        UserError: The network has no such stage. With `tail="auto"` the tail is left out instead.
        StorageError: The cache could not be written.
    """
    from featcache.backbone.tail import last_stage

    if config.tail == "none":
        return None
    try:
        stage = last_stage(config.backbone) if config.tail == "auto" else config.tail
        tuning = finetune_config(config, None, config.seed, stage)
        wanted = extraction_config(tuning, flip=resolve_recipe(tuning).flip)
        if config.tail == "auto":
            _check_affordable(config, Request.of(wanted, dataset).meta, extraction)
        found = shared_cache(wanted, dataset, output / record_name("tail"))
        return Tail(stage=stage, activations=found)
    except UserError as error:
        said = str(error).replace("--from-stage", "--tail")
        if config.tail != "auto":
            raise UserError(said) from error
        say(f"leaving out the tail: {said}")
        return None


def _check_affordable(config: CompareConfig, meta: CacheMeta, extraction: Extraction) -> None:
    """Refuse a stage's input that would take too much of the budget, or of the disk."""
    assert meta.backbone.stage_input is not None
    num_rows = meta.views.num * extraction.num_images
    if too_long := over_budget(config, extraction.seconds_per_image * num_rows):
        raise UserError(f"caching the input of its stage would {too_long}")
    num_bytes = num_rows * meta.backbone.feature_dim * np.dtype(meta.dtype).itemsize
    if num_bytes > MAX_TAIL_BYTES:
        raise UserError(
            f"caching the input of its stage would take {num_bytes / 1e9:.1f} GB; "
            f"--tail {meta.backbone.stage_input.stage} does it all the same"
        )


def finetune_config(
    config: CompareConfig, num_train: int | None, seed: int, stage: str | None = None
) -> FinetuneConfig:
    """The settings of finetune for a run.

    Args:
        config: The comparison's.
        num_train: Train images; with few, epochs are added. None keeps the number of epochs.
        seed: Of training.
        stage: The stage from which the tail trains; None for all layers.
    """
    from featcache.backbone.tail import tail_layers

    but = ("json", "verbose", "output", "seed", "layers")
    values = carried_over(config, FinetuneConfig, but=but)
    if stage is not None and config.layers != "last" and config.recipe == "good":
        values["layers"] = tail_layers(config.backbone)
    # Random weights come from the seed: every run must start from the weights of the cache.
    seed = config.seed if config.weights == "random" else seed
    tuning = FinetuneConfig(**values, seed=seed, score="end", from_stage=stage)
    if num_train is None:
        return tuning
    recipe = resolve_recipe(tuning)
    per_epoch = math.ceil(num_train / recipe.batch_size)
    epochs = max(recipe.epochs, math.ceil(config.min_steps / per_epoch))
    return dataclasses.replace(tuning, epochs=epochs)


def _finetune(setup: ComparisonSetup, planned: PlannedRun) -> tuple[RunReport, float, float]:
    """Fine-tune all layers, or the tail, on some train images; the model is not saved."""
    config = setup.tuning(planned.mode, len(planned.rows), planned.seed)
    test = np.arange(len(setup.dataset.splits["test"]))
    report = _tune(setup, config, planned.name, setup.shifted, train=planned.rows, test=test)
    cost = _finetune_seconds(report)
    if setup.tail is None or planned.mode != "tail":
        return report, cost, cost
    cost -= report.more["activations"]["extract_seconds"] or 0.0  # of all images
    extracting = setup.tail.activations.seconds_per_image * len(planned.rows)
    return report, cost + extracting, cost


def _tune(
    setup: ComparisonSetup,
    config: FinetuneConfig,
    name: str,
    shifted: ShiftedTest | None,
    **rows: Ints,
) -> RunReport:
    """Fine-tune on these rows of train and score on these of test; return only the report."""
    model = setup.output / "work" / f"{name}.safetensors"
    config = dataclasses.replace(config, output=model)
    splits = {split: whole.subset(rows[split]) for split, whole in setup.dataset.splits.items()}
    dataset = dataclasses.replace(setup.dataset, splits=splits)
    tail = setup.tail if config.from_stage else None
    report = finetune_report(
        config,
        dataset,
        checkpoint_s=CHECKPOINT_S,
        replace=True,
        activations=Path(tail.activations.cache) if tail else None,
    )
    kept = {name: value for name, value in report.more.items() if name != "model"}
    if shifted is not None:
        kept["shifted"] = shifted.score_model(model, setup.config)
    model.unlink(missing_ok=True)
    model.with_suffix(".json").unlink(missing_ok=True)
    lock_path(model).unlink(missing_ok=True)  # the folder is locked
    return dataclasses.replace(report, more=kept, config=config_json(config))


def _finetune_seconds(report: RunReport) -> float:
    """Seconds from labeled images to a classifier, without reading and scoring the test split."""
    scoring = sum(float(epoch.get("eval_seconds", 0.0)) for epoch in report.epochs)
    num_train, num_test = int(report.more["num_train"]), int(report.more["num_test"])
    reading = float(report.more["read_seconds"]) * num_test / (num_train + num_test)
    return max(report.seconds_total - scoring - reading, 0.0)


# By mode, what trains a run: its report, its seconds from labeled images on, a further trial's.
TRAINERS: dict[CurveMode, Callable[[ComparisonSetup, PlannedRun], tuple[RunReport, float, float]]]
TRAINERS = {"cached": _train_head, "tail": _finetune, "finetune": _finetune}

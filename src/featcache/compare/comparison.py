"""`compare`: extract once, train what the budget allows, and advise from the results.

The protocol: both modes share every draw of train images, and draws are nested (a size's images
are among those of the next); settings of the head are chosen on a held-out part of exactly those
images; the test split is scored once per run and chooses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from featcache.cache import sole_writer
from featcache.compare.alternatives import Network
from featcache.compare.budget import Budget, FinishedRun
from featcache.compare.extraction import MINUTE, extract_configs, record_name, shared_caches
from featcache.compare.planned_runs import PlannedRun, plan_runs
from featcache.compare.shifted import ShiftedTest, shifted_images
from featcache.compare.training import (
    ComparisonSetup,
    decisive,
    load_finished,
    shared_tail,
    time_finetuning,
    train_and_save,
    warm_up,
)
from featcache.config import (
    CompareConfig,
    JsonObject,
    ReportConfig,
    TrainHeadConfig,
    config_json,
    flatten,
)
from featcache.data import ImageDataset, load_dataset
from featcache.display import say
from featcache.errors import UserError
from featcache.files import check_outputs, check_writable, read_regular, write_json
from featcache.finetune.trainable import resolve_recipe
from featcache.heads.train import provenance_of
from featcache.heads.training_data import open_cache
from featcache.html_report.provenance import command_line
from featcache.results import report_marks
from featcache.results.curve_advice import crossing, curve_advice
from featcache.results.curve_json import curve_from_json, curve_to_json
from featcache.results.forecast import forecasts
from featcache.results.learning_curve import CurveMode, CurvePoint, curve_points
from featcache.results.runs import MAX_BYTES
from featcache.results.tables import curve_text, seconds_text
from featcache.runtime import environment, load_optimizers

NETWORKS: dict[Network, str] = {"frozen": "", "adapt": "with adapted BatchNorm statistics "}
MODES: tuple[CurveMode, ...] = ("cached", "finetune")
"""Those that are tested against each other."""


def compare(config: CompareConfig) -> JsonObject:
    """Draw the learning curve of the cached head and of fine-tuning.

    Args:
        config: The command's settings.

    Returns:
        The report as `--json` prints it; it is also written to the comparison's folder, beside
        the reports of its runs.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
        StorageError: A file could not be written.
    """
    start = time.perf_counter()
    dataset = load_dataset(config)
    if dataset.task != "multiclass":
        raise UserError(
            f"{config.dataset} has several labels or a number per image: compare is for one class; "
            "train-head and finetune report their scores"
        )
    for note in dataset.notes:
        say(note)
    shifted = shifted_images(config, dataset.class_names)
    output = config.output or config.cache_dir / _folder_name(config, dataset)
    with _claimed(config, output, dataset.name):
        setup = prepare(config, dataset, shifted, output)
        return _compare(setup, start)


@contextlib.contextmanager
def _claimed(config: CompareConfig, output: Path, dataset_name: str) -> Iterator[None]:
    """Lock the comparison's folder, and refuse one with different settings.

    Raises:
        UserError: The folder has different settings, or another program's file would be replaced.
        StorageError: Another run is writing to it, or it cannot be written.
    """
    marks = re.compile(report_marks("compare").pattern + rb'|\A\{\s*"cache": |\A\{\s*"settings": ')
    names = ("compare.json", *map(record_name, (*get_args(Network), "tail")), "settings.json")
    check_outputs(dict.fromkeys((output / name for name in names), marks), [config.weights])
    check_writable(output / "compare.json")
    with sole_writer(output / "compare.json"):
        asked = {**_asked(config), "dataset_name": dataset_name}
        there = _asked_before(output)
        differ = [name for name in asked if name in there and there[name] != asked[name]]
        if differ:
            said = ", ".join(f"{n} {there[n]!s:.40} there, {asked[n]!s:.40} here" for n in differ)
            raise UserError(
                f"{output} holds a comparison with different settings ({said}): give another "
                "--output"
            )
        write_json(output / "settings.json", {"settings": asked})
        yield


def _asked_before(output: Path) -> JsonObject:
    """Settings of the comparison in a folder; empty if there is none."""
    for name, key in (("settings.json", "settings"), ("compare.json", "config")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            asked = dict(json.loads(read_regular(output / name, MAX_BYTES))[key])
            asked.pop("output", None)
            return asked
    return {}


def _compare(setup: ComparisonSetup, start: float) -> JsonObject:
    """Run the comparison and write its report; the folder is locked."""
    train = setup.dataset.splits["train"]
    planned = plan_runs(setup.config, train.ids, train.labels, decisive(setup), train.groups)
    load_optimizers()  # outside the time of the first fine-tune
    report = _report(setup, _run_all(setup, planned))
    report["seconds_total"] = time.perf_counter() - start
    write_json(setup.output / "compare.json", report)
    with contextlib.suppress(OSError):
        (setup.output / "work").rmdir()  # not empty if a killed run can be resumed
    return report


def prepare(
    config: CompareConfig, dataset: ImageDataset, shifted: ImageDataset | None, output: Path
) -> ComparisonSetup:
    """Extract or find the caches, and keep the images that both modes can use.

    Args:
        config: The command's settings.
        dataset: Train and test images.
        shifted: The second test set, if there is one.
        output: The comparison's folder.

    Raises:
        UserError: Wrong input, or images that changed between two extractions.
    """
    extractions = shared_caches(config, dataset, output)
    caches = {
        network: open_cache(TrainHeadConfig(cache=Path(extraction.cache), solver=config.solver))
        for network, extraction in extractions.items()
    }
    first, *others = caches.values()
    usable = {}
    for name in ("train", "test"):
        rows = first.split(name).rows
        if any(not np.array_equal(other.split(name).rows, rows) for other in others):
            raise UserError("images became unreadable during the run: run the same command again")
        usable[name] = dataset.splits[name].subset(rows)
        # Both modes learn from the same images: those that the features were made from.
        for cache in caches.values():
            usable[name].record(cache.rows(name).content[rows])
    return ComparisonSetup(
        config=config,
        output=output,
        dataset=dataclasses.replace(dataset, splits=usable),
        caches=caches,
        extractions=extractions,
        shifted=ShiftedTest.cached(config, shifted, dataset, list(caches)) if shifted else None,
        tail=shared_tail(config, dataset, next(iter(extractions.values())), output),
    )


def _folder_name(config: CompareConfig, dataset: ImageDataset) -> str:
    """A folder per dataset and settings; more seeds, sizes or minutes resume in the same one."""
    text = json.dumps(_asked(config), sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    weights = Path(config.weights).stem
    backbone = config.backbone.replace("/", "-")
    return f"{dataset.name}-{backbone}-{weights}-compare-{tag}"


def _asked(config: CompareConfig) -> JsonObject:
    """The settings that identify a comparison."""
    extraction = next(iter(extract_configs(config).values()))
    asked = flatten(config_json(extraction)) | {"dtype": extraction.stored_dtype}
    asked |= {"layers": config.layers, "batchnorm": config.batchnorm}
    if config.layers == "last":
        del asked["layers"], asked["pool"]  # as in version 0.1.0
    if config.batchnorm == "frozen":
        del asked["batchnorm"]
    if config.test_shifted is not None:
        asked["test_shifted"] = config.test_shifted.name
    if config.group_from is None:
        del asked["group_from"]
    del asked["from_stage"]
    if config.tail != "none":
        asked["tail"] = config.tail
    asked |= {"solver": config.solver, "lr": config.lr}
    asked |= {"recipe": config.recipe, "epochs": config.epochs, "min_steps": config.min_steps}
    places = ("cache_dir", "data_root", "dataset", "image_root", "allow_outside", "strict")
    for name in (*places, "json", "verbose", "workers", "device"):
        asked.pop(name, None)
    return asked


@dataclass(frozen=True, kw_only=True)
class SkippedRun:
    """A run that the budget does not allow; `left_out` in the report."""

    mode: CurveMode
    size: str
    num_train: int
    draw: int
    estimated_seconds: float | None
    title: str


@dataclass(kw_only=True)
class Schedule:
    """All runs in the order of their importance, those that are finished, and the budget."""

    setup: ComparisonSetup
    planned: list[PlannedRun]
    budget: Budget
    done: dict[PlannedRun, FinishedRun] = field(default_factory=dict)

    def finish(self, planned: PlannedRun, run: FinishedRun) -> None:
        """Note a finished run."""
        self.done[planned] = run
        self.budget.add(planned.mode, run.pace, run.spent_seconds)

    def estimate(self, planned: PlannedRun) -> float | None:
        """Seconds that a run will take; None if nothing is known yet."""
        epochs = 1
        if planned.mode != "cached":
            config = self.setup.tuning(planned.mode, len(planned.rows), planned.seed)
            epochs = resolve_recipe(config).epochs
        return self.budget.estimate(planned.mode, len(planned.rows), epochs)

    def next_run(self) -> PlannedRun | None:
        """The most important run that the budget still allows.

        Runs that were too long are reconsidered after every run, as estimates improve. Without one
        size in both modes there is nothing to compare, so the smallest is run even if over budget.
        """
        pending = [planned for planned in self.planned if planned not in self.done]
        for planned in pending:
            if self.budget.allows(self.estimate(planned)):
                return planned
        finished = {mode: {(p.size, p.draw) for p in self.done if p.mode == mode} for mode in MODES}
        if set.intersection(*finished.values()):
            return None
        needed = [planned for planned in pending if planned.mode in MODES]
        return min(needed, key=lambda planned: (planned.draw, len(planned.rows)), default=None)

    def finished(self) -> dict[PlannedRun, FinishedRun]:
        """The finished runs, in the order of the plan."""
        return {planned: self.done[planned] for planned in self.planned if planned in self.done}

    def skipped(self) -> list[SkippedRun]:
        """The runs that are not finished."""
        return [
            SkippedRun(
                mode=planned.mode,
                size=planned.size,
                num_train=len(planned.rows),
                draw=planned.draw,
                estimated_seconds=self.estimate(planned),
                title=planned.title,
            )
            for planned in self.planned
            if planned not in self.done
        ]


def _run_all(setup: ComparisonSetup, planned: list[PlannedRun]) -> Schedule:
    """Find or train every run that the budget allows."""
    num_test = len(setup.dataset.splits["test"])
    extractions = [*setup.extractions.values(), *([setup.tail.activations] if setup.tail else [])]
    spent = sum(extraction.spent_seconds for extraction in extractions)
    budget = Budget(setup.config.budget * MINUTE, num_test, spent)
    schedule = Schedule(setup=setup, planned=planned, budget=budget)
    for one in planned:
        run = load_finished(setup, one)
        if run is not None:
            schedule.finish(one, run)
    done = schedule.done
    if done:
        say(f"{len(done)} of {len(planned)} runs were finished earlier")
    if len(done) < len(planned):
        warm_up(setup, min(planned, key=lambda one: len(one.rows)))
    if not any(one.mode == "finetune" for one in done):
        budget.add("finetune", time_finetuning(setup))
    while (chosen := schedule.next_run()) is not None:
        estimate = schedule.estimate(chosen)
        about = "" if estimate is None else f", about {seconds_text(estimate)}"
        say(f"[{len(done) + 1}/{len(planned)}] {chosen.title}{about}")
        run = train_and_save(setup, chosen)
        say(f"    test accuracy {run.report.test_top1:.3f}")
        schedule.finish(chosen, run)
    return schedule


def _report(setup: ComparisonSetup, schedule: Schedule) -> JsonObject:
    """The command's report, as plain JSON values."""
    config, num_test = setup.config, len(setup.dataset.splits["test"])
    done, skipped, spent = schedule.finished(), schedule.skipped(), schedule.budget.spent
    points = curve_points(run.curve_run for run in done.values())
    report = {
        "command": "compare",
        "output": str(setup.output),
        "dataset": setup.cache.meta.dataset.name,
        "points": curve_to_json(points),
        "crossing": dataclasses.asdict(crossing(points)),
        "forecast": [dataclasses.asdict(found) for found in forecasts(points)],
        "advice": curve_advice(points, config.price_per_hour),
        "left_out": [dataclasses.asdict(run) for run in skipped],
        "notes": _notes(setup, points, skipped, spent),
        "runs": [f"runs/{planned.name}.json" for planned in done],
        "num_planned": len(schedule.planned),
        "spent_seconds": spent,
        "extractions": {name: dataclasses.asdict(e) for name, e in setup.extractions.items()},
        "activations": setup.tail and dataclasses.asdict(setup.tail.activations),
        "shifted": setup.shifted and setup.shifted.describe(),
        "num_test": num_test,
        "scored_on": f"test ({num_test} images), once per run",
        "chosen_on": "a held-out part of each run's own train images",
        "config": config_json(config),
        "provenance": provenance_of(setup.cache),
        "environment": environment(),
    }
    plain: JsonObject = json.loads(json.dumps(report))
    return plain


def _notes(
    setup: ComparisonSetup, points: list[CurvePoint], skipped: list[SkippedRun], spent: float
) -> list[str]:
    """What a reader needs to judge the results."""
    config = setup.config
    notes = [
        f"Extraction {NETWORKS[name]}runs at {1 / extraction.seconds_per_image:,.0f} images per "
        f"second, {extraction.how}."
        for name, extraction in setup.extractions.items()
    ]
    if setup.shifted is not None and setup.shifted.num_in_train:
        notes.append(
            f"{setup.shifted.num_in_train:,} images of the second test set are train images too: "
            "remove them from either."
        )
    draws = [len(p.cached.top1_by_seed) for p in points if p.cached]
    if draws and min(draws) < 2:
        notes.append(
            "Sizes with one seed do not show how much the choice of train images matters: "
            "give a larger --budget or --num-seeds."
        )
    if skipped:
        needed = spent + sum(run.estimated_seconds or 0.0 for run in skipped)
        others = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        notes.append(
            f"Skipped for lack of time: {skipped[0].title}{others}; rerun the same command with "
            f"--budget {max(1, round(needed / MINUTE * 1.1 + 0.5))} to include them (now "
            f"{config.budget:g} minutes)."
        )
    return notes


def summary_lines(report: JsonObject) -> list[str]:
    """The report for people."""
    return [
        *curve_text(curve_from_json(report["points"])).splitlines(),
        "",
        *report["advice"],
        *report["notes"],
        f"report: {Path(report['output']) / 'compare.json'}",
        f"next: {_report_command(report)}",
    ]


def _report_command(report: JsonObject) -> str:
    """The command that writes the HTML report, with images."""
    names = {field.name for field in dataclasses.fields(ReportConfig)} - {"output"}
    shared = {name: value for name, value in report["config"].items() if name in names}
    return command_line("report", {**shared, "runs": report["output"]})

"""`compare`: extract once, make the runs that the budget allows, say what follows from them.

The protocol: every draw of train images is shared by both modes and nested (a size's images are
among those of the next); settings of the head are chosen on a held-out part of exactly those
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
from pathlib import Path
from typing import Any, get_args

from featcache.cache import sole_writer
from featcache.compare.budget import Budget
from featcache.compare.cells import (
    Bench,
    do_run,
    finetune_config,
    load_finished,
    time_tuning,
    warm_up,
)
from featcache.compare.extraction import extract_config, shared_cache
from featcache.compare.plan import Spec, make_plan
from featcache.config import CompareConfig, ReportConfig, TrainHeadConfig, flatten
from featcache.data import ImageDataset, load_dataset
from featcache.errors import UserError
from featcache.files import check_outputs, check_writable, read_regular, write_json
from featcache.finetune.trainable import resolve_recipe
from featcache.heads.data import open_cache
from featcache.heads.train import check_settings, provenance_of
from featcache.html_report.provenance import command_line
from featcache.results import (
    Mode,
    Point,
    RunReport,
    cell_of,
    config_json,
    crossing,
    curve_advice,
    curve_points,
    curve_text,
    points_from_json,
    points_json,
    report_marks,
)
from featcache.results.runs import MAX_BYTES
from featcache.results.tables import seconds_text
from featcache.runtime import environment, load_optimizers, numeric_versions, say

MINUTE = 60.0


def compare(config: CompareConfig) -> dict[str, Any]:
    """Draw the learning curve of the cached head and of fine-tuning.

    Args:
        config: The command's settings.

    Returns:
        The report as `--json` prints it; it is also written to the comparison's folder, beside
        the reports of the single runs.

    Raises:
        UserError: Wrong input, or an unreadable picture under `on_error="fail"`.
        StorageError: A file could not be written.
    """
    start = time.perf_counter()
    check_settings(TrainHeadConfig(cache=Path("unused"), solver=config.solver))
    dataset = load_dataset(config)
    output = config.output or config.cache_dir / _folder_name(config, dataset)
    with _claimed(config, output, dataset.name):
        return _compare(config, dataset, output, start)


@contextlib.contextmanager
def _claimed(config: CompareConfig, output: Path, dataset_name: str) -> Iterator[None]:
    """Keep others out of the comparison's folder, and out of one with other settings.

    Raises:
        UserError: It is of other settings, or a stranger's file would be replaced.
        StorageError: Another run is writing it, or it cannot be written.
    """
    marks = re.compile(report_marks("compare").pattern + rb'|\A\{\s*"cache": |\A\{\s*"settings": ')
    names = ("compare.json", "extraction.json", "settings.json")
    check_outputs(dict.fromkeys((output / name for name in names), marks), [config.weights])
    check_writable(output / "compare.json")
    with sole_writer(output / "compare.json"):
        asked = {**_asked(config), "dataset_name": dataset_name}
        there = _asked_before(output)
        differ = [name for name in asked if name in there and there[name] != asked[name]]
        if differ:
            said = ", ".join(f"{n} {there[n]!s:.40} there, {asked[n]!s:.40} here" for n in differ)
            raise UserError(
                f"{output} is of a comparison with other settings ({said}): give another --output"
            )
        write_json(output / "settings.json", {"settings": asked})
        yield


def _asked_before(output: Path) -> dict[str, Any]:
    """Settings of the comparison that a folder holds; none where it holds none."""
    for name, key in (("settings.json", "settings"), ("compare.json", "config")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            asked = dict(json.loads(read_regular(output / name, MAX_BYTES))[key])
            asked.pop("output", None)
            return asked
    return {}


def _compare(
    config: CompareConfig, dataset: ImageDataset, output: Path, start: float
) -> dict[str, Any]:
    """Make and write the comparison in its folder, which nobody else writes."""
    bench = prepare(config, dataset, output)
    train = bench.dataset.splits["train"]
    plan = make_plan(config, train.ids, train.labels, _decisive(bench))
    load_optimizers()  # or the first fine-tune alone would pay for it
    done, left_out, spent = _run_all(bench, plan)
    report = _report(bench, plan, done, left_out, spent)
    report["seconds_total"] = time.perf_counter() - start
    write_json(bench.output / "compare.json", report)
    with contextlib.suppress(OSError):
        (bench.output / "work").rmdir()  # empty, unless a killed run may still go on from it
    return report


def prepare(config: CompareConfig, dataset: ImageDataset, output: Path) -> Bench:
    """Extract or find the cache, and see which images both modes can use."""
    extraction = shared_cache(config, output)
    head = TrainHeadConfig(cache=Path(extraction.cache), solver=config.solver)
    cache = open_cache(head)
    usable = {}
    for name in ("train", "test"):
        rows = cache.split(name).rows
        usable[name] = dataset.splits[name].subset(rows)
        # Both modes learn from the same pictures: those that the features were made from.
        usable[name].record(cache.rows(name).content[rows])
    return Bench(
        config=config,
        output=output,
        dataset=dataclasses.replace(dataset, splits=usable),
        cache=cache,
        extraction=extraction,
    )


def _folder_name(config: CompareConfig, dataset: ImageDataset) -> str:
    """A folder per dataset and settings; more draws, sizes or minutes go on in the same one."""
    text = json.dumps(_asked(config), sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    weights = Path(config.weights).stem
    return f"{dataset.name}-{config.backbone}-{weights}-compare-{tag}"


def _asked(config: CompareConfig) -> dict[str, Any]:
    """The settings that make a comparison another one."""
    asked = flatten(config_json(extract_config(config)))
    asked |= {"solver": config.solver, "lr": config.lr}
    asked |= {"recipe": config.recipe, "epochs": config.epochs, "min_steps": config.min_steps}
    places = ("cache_dir", "data_root", "dataset", "image_root", "allow_outside")
    for name in (*places, "json", "verbose", "workers", "device"):
        asked.pop(name, None)
    return asked


def _decisive(bench: Bench) -> dict[Mode, dict[str, Any]]:
    """What decides a run's outcome besides its samples and seed."""
    config = bench.config
    provenance = provenance_of(bench.cache)
    same = {
        "backbone": provenance["backbone"],
        "cache": provenance["cache_digest"],
        "versions": numeric_versions(),
    }
    tuning = dataclasses.asdict(resolve_recipe(finetune_config(config, None, config.seed)))
    del tuning["seed"]
    return {
        "cached": {**same, "solver": config.solver},
        "finetune": {**same, "plan": tuning, "min_steps": config.min_steps},
    }


Done = dict[Spec, RunReport]


def _run_all(bench: Bench, plan: list[Spec]) -> tuple[Done, list[dict[str, Any]], float]:
    """Make or find every run that the budget allows; also what was left out, and seconds spent."""
    num_test = len(bench.dataset.splits["test"])
    budget = Budget(bench.config.budget * MINUTE, num_test, bench.extraction.spent_seconds)
    done: Done = {}
    for spec in plan:
        report = load_finished(bench, spec)
        if report is not None:
            budget.add(report)
            done[spec] = report
    if done:
        say(f"{len(done)} of {len(plan)} runs were there from an earlier start")
    if len(done) < len(plan):
        warm_up(bench, min(plan, key=lambda spec: len(spec.rows)))
    if not any(spec.mode == "finetune" for spec in done):
        budget.learn("finetune", time_tuning(bench))
    while (chosen := _next(bench, plan, done, budget)) is not None:
        estimate = _estimate(bench, chosen, budget)
        about = "" if estimate is None else f", about {seconds_text(estimate)}"
        say(f"[{len(done) + 1}/{len(plan)}] {chosen.title}{about}")
        done[chosen] = do_run(bench, chosen)
        say(f"    test accuracy {done[chosen].test_top1:.3f}")
        budget.add(done[chosen])
    left_out = [_left_out(s, _estimate(bench, s, budget)) for s in plan if s not in done]
    return {spec: done[spec] for spec in plan if spec in done}, left_out, budget.spent


def _next(bench: Bench, plan: list[Spec], done: Done, budget: Budget) -> Spec | None:
    """The most important run that the budget allows; None: there is none.

    What was too long is looked at again after every run, as estimates get better. One size is made
    in both modes in any case, the smallest if no other fits, since there is nothing to say without.
    """
    pending = [spec for spec in plan if spec not in done]
    for spec in pending:
        if budget.allows(_estimate(bench, spec, budget)):
            return spec
    made = {mode: {(s.size, s.draw) for s in done if s.mode == mode} for mode in get_args(Mode)}
    if set.intersection(*made.values()):
        return None
    return min(pending, key=lambda spec: (spec.draw, len(spec.rows)), default=None)


def _estimate(bench: Bench, spec: Spec, budget: Budget) -> float | None:
    """Seconds of a run, as far as can be known."""
    epochs = 1
    if spec.mode == "finetune":
        tuning = finetune_config(bench.config, len(spec.rows), spec.seed)
        epochs = resolve_recipe(tuning).epochs
    return budget.estimate(spec.mode, len(spec.rows), epochs)


def _left_out(spec: Spec, estimate: float | None) -> dict[str, Any]:
    return {
        "mode": spec.mode,
        "size": spec.size,
        "num_train": len(spec.rows),
        "draw": spec.draw,
        "estimated_seconds": estimate,
        "title": spec.title,
    }


def _report(
    bench: Bench, plan: list[Spec], done: Done, left_out: list[dict[str, Any]], spent: float
) -> dict[str, Any]:
    """Everything that was found, as plain JSON values."""
    config, num_test = bench.config, len(bench.dataset.splits["test"])
    points = curve_points(cell_of(report) for report in done.values())
    report = {
        "command": "compare",
        "output": str(bench.output),
        "dataset": bench.cache.meta.dataset.name,
        "points": points_json(points),
        "crossing": dataclasses.asdict(crossing(points)),
        "advice": curve_advice(points),
        "left_out": left_out,
        "notes": _notes(bench, points, left_out, spent),
        "runs": [f"runs/{spec.name}.json" for spec in done],
        "num_planned": len(plan),
        "spent_seconds": spent,
        "extraction": dataclasses.asdict(bench.extraction),
        "num_test": num_test,
        "scored_on": f"test ({num_test} images), once per run",
        "chosen_on": "a held-out part of each run's own train images",
        "config": config_json(config),
        "provenance": provenance_of(bench.cache),
        "environment": environment(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


def _notes(
    bench: Bench, points: list[Point], left_out: list[dict[str, Any]], spent: float
) -> list[str]:
    """What a reader has to know to judge the figures."""
    config, rate = bench.config, 1 / bench.extraction.seconds_per_image
    notes = [f"Extraction runs at {rate:,.0f} images per second, {bench.extraction.how}."]
    draws = [len(p.cached.top1_by_seed) for p in points if p.cached]
    if draws and min(draws) < 2:
        notes.append(
            "Sizes with one draw of train images do not show how much the draw matters; "
            "give a larger --budget or --num-seeds."
        )
    if left_out:
        first = left_out[0]
        needed = spent + sum(float(run["estimated_seconds"] or 0.0) for run in left_out)
        others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        notes.append(
            f"Left out for lack of time: {first['title']}{others}; the same command with "
            f"--budget {max(1, round(needed / MINUTE * 1.1 + 0.5))} makes them too (now "
            f"{config.budget:g} minutes)."
        )
    return notes


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    return [
        *curve_text(points_from_json(report["points"])).splitlines(),
        "",
        *report["advice"],
        *report["notes"],
        f"report: {Path(report['output']) / 'compare.json'}",
        f"next: {_report_command(report)}",
    ]


def _report_command(report: dict[str, Any]) -> str:
    """What makes the page, with pictures."""
    names = {field.name for field in dataclasses.fields(ReportConfig)} - {"output"}
    shared = {name: value for name, value in report["config"].items() if name in names}
    return command_line("report", {**shared, "runs": report["output"]})

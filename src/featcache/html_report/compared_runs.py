"""The runs that a page compares, each under a unique name."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.config import JsonObject, flatten
from featcache.html_report.report_files import ReportFiles, Run, Summary
from featcache.results import Predictions, Row, RunReport, benchmark_rows
from featcache.results.advice import advice, best_of
from featcache.results.metrics import mcnemar
from featcache.results.runs import Approach

NAMES: dict[Approach, str] = {
    "loop": "head, network in the loop",
    "cached": "cached head",
    "finetune": "fine-tune",
}
RANKS: tuple[Approach, ...] = ("cached", "finetune", "loop")
MAX_SETTINGS = 3
LABELS = {
    "data": "{}",
    "image_px": "{} px",
    "num_train": "{} train images",
    "feature_dim": "{}-d",
    "kind": "views: {}",
    "num": "{} views",
}
IMMATERIAL = (
    *("cache", "output", "cache_dir", "data_root", "dataset", "json", "verbose"),
    *("workers", "device", "solver", "recipe", "weights_sha256"),
)
"""Settings that are in every name already, or that change no result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedRun:
    """A row of the page's table, the file it comes from, and the run's report.

    A row of a benchmark whose run was not found beside it has no report.
    """

    row: Row
    source: Path
    report: RunReport | None = None

    @property
    def name(self) -> str:
        """As in the table."""
        return self.row.mode

    @property
    def dataset(self) -> JsonObject:
        """What the report says of the dataset."""
        return (self.report and self.report.provenance.get("dataset")) or {}

    @property
    def class_names(self) -> list[str]:
        """What the labels of `test` number."""
        return (self.report and self.report.class_names) or []

    @property
    def test(self) -> Predictions | None:
        """The test predictions, if the report has them."""
        test = self.report.test if self.report else None
        return test if test and test.ids and self.class_names else None


def compared_runs(files: ReportFiles) -> list[ComparedRun]:
    """Every run once, heads first.

    Of a comparison, only the first draw's runs with the most train images are compared here; the
    learning curve has the others.
    """
    compared, used = [], set[Path]()
    for benchmark in files.benchmarks:
        compared += _of_benchmark(benchmark, files.runs, used)
    compared += [_of_run(run, files) for run in _chosen(files.runs) if run.path not in used]
    compared.sort(key=lambda run: list(NAMES).index(run.row.approach))
    return _with_unique_names(compared)


def _of_benchmark(benchmark: Summary, runs: Sequence[Run], used: set[Path]) -> list[ComparedRun]:
    """A benchmark's rows, with the reports of their runs if these are in its folder.

    Files of the runs found are added to `used`.
    """
    compared = []
    for row in benchmark.rows:
        beside = [r for r in runs if r.path.parent == benchmark.path.parent and r.path not in used]
        run = next((run for run in beside if _is_row_of(row, run.report)), None)
        used |= {run.path} if run else set()
        report = run.report if run else None
        compared.append(ComparedRun(row=row, source=benchmark.path, report=report))
    return compared


def _is_row_of(row: Row, report: RunReport) -> bool:
    """Whether a benchmark's row is about this run; 0.1.0 wrote no ids, so figures have to agree."""
    if row.run is not None:
        return row.run == report.more.get("run")
    return (
        _approach(report) == row.approach
        and abs(report.seconds_total - row.later_seconds) < 1e-6 * row.seconds_total
        and report.test_top1 == row.test_top1
    )


def _chosen(runs: Sequence[Run]) -> list[Run]:
    """Runs on their own, and of each comparison and mode the largest one of the first draw."""
    single = [run for run in runs if "cell" not in run.report.more]
    largest: dict[tuple[Path, str], Run] = {}
    for run in sorted(runs, key=lambda run: run.report.more["num_train"]):
        cell = run.report.more.get("cell")
        if cell and cell.get("draw") == 0:
            largest[run.path.parent, cell["mode"]] = run
    return [*single, *largest.values()]


def _approach(report: RunReport) -> Approach:
    """What was trained."""
    if report.command == "train-head":
        return "cached"
    return "loop" if report.config.get("freeze_backbone") is True else "finetune"


def _of_run(run: Run, files: ReportFiles) -> ComparedRun:
    approach = _approach(run.report)
    extraction = _extraction_seconds(run.report, files) if approach == "cached" else 0.0
    named = (_name(run.report, approach), approach, run.report, extraction or 0.0)
    row = dataclasses.replace(benchmark_rows([named])[0], extraction_known=extraction is not None)
    return ComparedRun(row=row, source=run.path, report=run.report)


def _extraction_seconds(report: RunReport, files: ReportFiles) -> float | None:
    """How long a cached head's features took, from its own report or from other files."""
    cell = report.more.get("cell")
    if cell:  # what was spent on features that were not chosen comes before the run, too
        return float(cell["cost_seconds"]) - float(
            report.more.get("fit_seconds") or cell["trial_seconds"]
        )
    own = report.more.get("extraction")
    if own and own.get("seconds") is not None:
        return float(own["seconds"])
    keys = (str(report.provenance.get(name)) for name in ("cache_digest", "cache"))
    return next((files.extractions[key] for key in keys if key in files.extractions), None)


def _name(report: RunReport, approach: Approach) -> str:
    """The mode with its solver, or with recipe and learning rate."""
    if approach == "cached":
        parts = [str(report.more.get(name, ""))[:40] for name in ("solver", "features")]
        return ", ".join([NAMES[approach], *(part for part in parts if part)])
    recipe = report.more.get("recipe") or {}
    parts = [str(report.config.get("recipe") or "")[:40]] if approach == "finetune" else []
    if isinstance(recipe.get("unfreeze"), list) and recipe["unfreeze"]:
        parts.append("only " + ", ".join(str(name)[:40] for name in recipe["unfreeze"][:4]))
    if isinstance(report.more.get("mode"), str):
        parts.append(report.more["mode"][:60])
    if isinstance(recipe.get("lr"), float):
        parts.append(f"lr {recipe['lr']:g}")
    parts = [part for part in parts if part]
    return f"{NAMES[approach]} ({', '.join(parts)})" if parts else NAMES[approach]


def _with_unique_names(compared: Sequence[ComparedRun]) -> list[ComparedRun]:
    names = unique_names([run.name for run in compared], [run.report for run in compared])
    return [
        dataclasses.replace(run, row=dataclasses.replace(run.row, mode=name))
        for run, name in zip(compared, names, strict=True)
    ]


def target_names(runs: Sequence[Run]) -> list[str]:
    """A unique short name for each run on images with several labels or a number."""
    reports = [run.report for run in runs]
    return unique_names([_name(report, _approach(report)) for report in reports], reports)


def unique_names(names: Sequence[str], reports: Sequence[RunReport | None]) -> list[str]:
    """Say how many images each run saw, if that differs; tell runs of one name apart.

    They are told apart by the settings that differ, else by number.
    """
    sizes = [report.more.get("num_train") if report else None for report in reports]
    found = list(names)
    if len({size for size in sizes if size is not None}) > 1:
        found = [
            name if size is None else f"{name}, {_label('num_train', size)}"
            for name, size in zip(names, sizes, strict=True)
        ]
    for labels in (_differing_settings, _numbers):
        for name in [name for name, count in Counter(found).items() if count > 1]:
            places = [place for place, other in enumerate(found) if other == name]
            added = labels([reports[place] for place in places])
            for place, label in zip(places, added, strict=True):
                found[place] += f", {label}" if label else ""
    return found


def _numbers(group: Sequence[RunReport | None]) -> list[str]:
    return ["", *(f"number {number}" for number in range(2, len(group) + 1))]


def _differing_settings(group: Sequence[RunReport | None]) -> list[str]:
    """Each run's values of the first few settings that are not the same in all."""
    settings = [_settings(report) for report in group]
    names = dict.fromkeys(name for values in settings for name in values)
    differing = [n for n in names if len({values.get(n, "") for values in settings}) > 1]
    return [
        ", ".join(values[n] for n in differing[:MAX_SETTINGS] if values.get(n))
        for values in settings
    ]


def _settings(report: RunReport | None) -> dict[str, str]:
    """A run's settings as labels, by name; those that change no result are left out."""
    if report is None:
        return {}
    parts = {name: report.provenance.get(name) for name in ("backbone", "views", "dtype")}
    data = (report.provenance.get("dataset") or {}).get("name")
    flat = flatten({"data": data, "num_train": report.more.get("num_train"), **parts})
    return {
        name: _label(name, value)
        for key, value in (flat | report.config).items()
        if (name := key.rpartition(".")[2]) not in IMMATERIAL
        and isinstance(value, str | int | float)
    }


def _label(name: str, value: str | float) -> str:
    """A setting in words; empty for one that is off."""
    text = f"{value:g}" if isinstance(value, float) else str(value)[:40]
    words = name.replace("_", " ")[:40]
    if name in LABELS:
        return LABELS[name].format(text)
    if isinstance(value, bool):
        return words if value else ""
    return f"{words} {text}"


def ranked(compared: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The most accurate of each approach first, then the others by accuracy."""
    best = sorted(compared, key=lambda run: (-run.row.test_top1, run.row.seconds_total))
    firsts = [next((r for r in best if r.row.approach == approach), None) for approach in RANKS]
    return list(dict.fromkeys(run for run in [*firsts, *best] if run is not None))


def compared_advice(compared: Sequence[ComparedRun], files: ReportFiles) -> list[str]:
    """Which mode to pick, if the runs can be compared at all."""
    if len(files.benchmarks) == 1 and len(compared) == len(files.benchmarks[0].rows):
        written = files.benchmarks[0].advice
        if written:
            return written
    if len(compared) < 2:
        return []
    ids = {tuple(r.report.test.ids) if r.report and r.report.test else None for r in compared}
    if len(ids) > 1 or len({run.row.num_test for run in compared}) > 1:
        return [
            "These runs were not scored on the same test images, so their accuracies are not "
            "compared here."
        ]
    if not all(run.row.extraction_known for run in compared):
        return [
            "These files do not record how long feature extraction took, so times are not "
            "compared: train the head again with the cache's .h5.json beside the cache, add the "
            "output of extract-features --json, or run featcache compare."
        ]
    return advice([run.row for run in compared], _p_values(compared))


def _p_values(compared: Sequence[ComparedRun]) -> dict[str, float]:
    """Paired tests of every run against the best cached head."""
    best = best_of([run.row for run in compared], "cached")
    cached = next((run for run in compared if run.row is best), None)
    if cached is None or cached.report is None or cached.report.test is None:
        return {}
    right = cached.report.test.correct()
    return {
        run.name: mcnemar(run.report.test.correct(), right)
        for run in compared
        if run is not cached and run.report is not None and run.report.test is not None
    }

"""Modes: what the page sets side by side, each with a name, a line of the table, a report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.config import flatten
from featcache.html_report.read import Benchmark, Found
from featcache.results import Predictions, Row, RunReport, advice, benchmark_rows, best_of
from featcache.results.metrics import mcnemar
from featcache.results.runs import Approach

NAMES: dict[Approach, str] = {
    "loop": "head only (network in the loop)",
    "cached": "head only (cached features)",
    "finetune": "full fine-tune",
}
ORDER: tuple[Approach, ...] = ("loop", "cached", "finetune")
RANKS: tuple[Approach, ...] = ("cached", "finetune", "loop")
MAX_SETTINGS = 3
LABELS = {
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
"""Settings that names have already, or that change no result."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A mode's test predictions, and the names of the classes that they number."""

    test: Predictions
    class_names: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mode:
    """One mode.

    `report` is missing where only a benchmark's table is there; `source` is the file that the
    figures are from.
    """

    row: Row
    source: Path
    report: RunReport | None = None

    @property
    def name(self) -> str:
        """As in the table."""
        return self.row.mode

    @property
    def scored(self) -> Scored | None:
        """The predictions, where the report has them."""
        report = self.report
        if report is None or report.test is None or not report.test.ids or not report.class_names:
            return None
        return Scored(test=report.test, class_names=report.class_names)


def make_modes(found: Found) -> list[Mode]:
    """Every mode once, heads first.

    Of a comparison, the runs with most train images of its first draw count as modes; the others
    are in its learning curve.
    """
    modes, used = [], set[Path]()
    for bench in found.benchmarks:
        modes += _of_benchmark(bench, found.runs, used)
    for path, report in _chosen(found):
        if path not in used:
            modes.append(_of_run(path, report, found))
    modes.sort(key=lambda mode: ORDER.index(mode.row.approach))
    return _with_names_apart(modes)


def _of_benchmark(
    bench: Benchmark, runs: Sequence[tuple[Path, RunReport]], used: set[Path]
) -> list[Mode]:
    """A benchmark's rows, with the reports of the same runs where they lie in its folder."""
    modes = []
    for row in bench.rows:
        own = next(
            (
                (path, report)
                for path, report in runs
                if path.parent == bench.path.parent
                and path not in used
                and approach_of(report) == row.approach
                and abs(report.seconds_total - row.later_seconds) < 1e-6 * row.seconds_total
                and report.test_top1 == row.test_top1
            ),
            None,
        )
        if own is not None:
            used.add(own[0])
        modes.append(Mode(row=row, source=bench.path, report=own[1] if own else None))
    return modes


def _chosen(found: Found) -> list[tuple[Path, RunReport]]:
    """Runs on their own, and the largest first-draw runs of comparisons."""
    best: dict[tuple[Path, str], tuple[Path, RunReport]] = {}
    chosen = []
    for path, report in found.runs:
        cell = report.more.get("cell")
        if not isinstance(cell, dict):
            chosen.append((path, report))
            continue
        key = (path.parent, str(cell.get("mode")))
        size, draw = int(report.more["num_train"]), cell.get("draw")
        known = best.get(key)
        if draw == 0 and (known is None or size > int(known[1].more["num_train"])):
            best[key] = (path, report)
    return [*chosen, *best.values()]


def approach_of(report: RunReport) -> Approach:
    """Which kind of mode a run is."""
    if report.command == "train-head":
        return "cached"
    return "loop" if report.config.get("freeze_backbone") is True else "finetune"


def _of_run(path: Path, report: RunReport, found: Found) -> Mode:
    approach = approach_of(report)
    extraction = _extraction_seconds(report, found) if approach == "cached" else 0.0
    row = benchmark_rows([(_name(report, approach), approach, report, extraction or 0.0)])[0]
    row = dataclasses.replace(row, extraction_known=extraction is not None)
    return Mode(row=row, source=path, report=report)


def _extraction_seconds(report: RunReport, found: Found) -> float | None:
    """What the features of a cached head cost, from its own report or from other files."""
    cell = report.more.get("cell")
    if isinstance(cell, dict):
        return float(cell["cost_seconds"]) - float(cell["trial_seconds"])
    own = report.more.get("extraction")
    if own and own.get("seconds") is not None:
        return float(own["seconds"])
    keys = (str(report.provenance.get(name)) for name in ("cache_digest", "cache"))
    return next((found.extractions[key] for key in keys if key in found.extractions), None)


def _name(report: RunReport, approach: Approach) -> str:
    """What sets runs of a kind apart: the solver, or recipe and rate."""
    if approach == "cached":
        solver = str(report.more.get("solver", ""))[:40]
        return f"{NAMES[approach]}, {solver}" if solver else NAMES[approach]
    plan = report.more.get("recipe")
    plan = plan if isinstance(plan, dict) else {}
    parts = [str(report.config.get("recipe") or "")[:40]] if approach == "finetune" else []
    if isinstance(plan.get("unfreeze"), list) and plan["unfreeze"]:
        parts.append("only " + ", ".join(str(name)[:40] for name in plan["unfreeze"][:4]))
    if isinstance(plan.get("lr"), float):
        parts.append(f"lr {plan['lr']:g}")
    parts = [part for part in parts if part]
    return f"{NAMES[approach]} ({', '.join(parts)})" if parts else NAMES[approach]


def _with_names_apart(modes: Sequence[Mode]) -> list[Mode]:
    """Name runs that are called alike by the settings in which they differ.

    File names follow where no setting differs, and numbers where these are alike too.
    """
    for labels in (_differing_settings, lambda group: [mode.source.stem for mode in group]):
        groups: dict[str, list[Mode]] = {}
        for mode in modes:
            groups.setdefault(mode.name, []).append(mode)
        said = {
            id(mode): label
            for group in groups.values()
            if len(group) > 1
            for mode, label in zip(group, labels(group), strict=True)
        }
        modes = [_renamed(mode, said.get(id(mode))) for mode in modes]
    taken: Counter[str] = Counter()
    result = []
    for mode in modes:
        taken[mode.name] += 1
        number = taken[mode.name]
        result.append(_renamed(mode, None if number == 1 else f"number {number}"))
    return result


def _renamed(mode: Mode, label: str | None) -> Mode:
    if not label:
        return mode
    row = dataclasses.replace(mode.row, mode=f"{mode.name}, {label}")
    return dataclasses.replace(mode, row=row)


def _differing_settings(group: Sequence[Mode]) -> list[str]:
    """Of each mode, its values of the first few settings that are not the same in all."""
    settings = [_settings(mode.report) for mode in group]
    names = dict.fromkeys(name for values in settings for name in values)
    differing = [n for n in names if len({values.get(n, "") for values in settings}) > 1]
    return [
        ", ".join(values[n] for n in differing[:MAX_SETTINGS] if values.get(n))
        for values in settings
    ]


def _settings(report: RunReport | None) -> dict[str, str]:
    """What was chosen for a run, by name and as a label; settings that change nothing left out."""
    if report is None:
        return {}
    parts = {name: report.provenance.get(name) for name in ("backbone", "views", "dtype")}
    flat = flatten({"num_train": report.more.get("num_train"), **parts}) | report.config
    return {
        name: _label(name, value)
        for key, value in flat.items()
        if (name := key.rpartition(".")[2]) not in IMMATERIAL
        and isinstance(value, str | int | float)
    }


def _label(name: str, value: str | float) -> str:
    """A setting in words; empty for one that is off."""
    words, text = name.replace("_", " ")[:40], str(value)[:40]
    if name in LABELS:
        return LABELS[name].format(text)
    if isinstance(value, bool):
        return words if value else ""
    return f"{words} {text}"


def ranked(modes: Sequence[Mode]) -> list[Mode]:
    """The best of each kind first, then the others; the more accurate first."""
    best = sorted(modes, key=lambda mode: (-mode.row.test_top1, mode.row.seconds_total))
    firsts = [next((m for m in best if m.row.approach == kind), None) for kind in RANKS]
    chosen = [mode for mode in firsts if mode is not None]
    return [*chosen, *(mode for mode in best if mode not in chosen)]


def folded(modes: Sequence[Mode]) -> list[tuple[Mode, Scored, list[Mode]]]:
    """Modes with predictions, each with those after it that predicted the same."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[Mode, Scored, list[Mode]]] = {}
    for mode in modes:
        scored = mode.scored
        if scored is not None:
            key = (tuple(scored.test.ids), tuple(scored.test.predicted))
            first = groups.setdefault(key, (mode, scored, []))
            if first[0] is not mode:
                first[2].append(mode)
    return list(groups.values())


def mode_advice(modes: Sequence[Mode], found: Found) -> list[str]:
    """Which mode to pick, where the modes can be compared at all."""
    if len(found.benchmarks) == 1 and len(modes) == len(found.benchmarks[0].rows):
        written = found.benchmarks[0].values["advice"]
        if written:
            return [str(line) for line in written]
    if len(modes) < 2:
        return []
    sets = {tuple(m.report.test.ids) if m.report and m.report.test else None for m in modes}
    if len(sets) > 1 or len({mode.row.num_test for mode in modes}) > 1:
        return [
            "These runs were not scored on the same test images, so their accuracies are not "
            "compared here."
        ]
    if not all(mode.row.extraction_known for mode in modes):
        return [
            "What the cache's extraction took is not among these runs, so times are not compared: "
            "train the head again with the cache's .h5.json beside the cache, add the output of "
            "extract-features --json, or run featcache compare."
        ]
    return advice([mode.row for mode in modes], _p_values(modes))


def _p_values(modes: Sequence[Mode]) -> dict[str, float]:
    """Paired tests of every mode against the best cached head."""
    best = best_of([mode.row for mode in modes], "cached")
    cached = next((mode for mode in modes if mode.row is best), None)
    if cached is None or cached.report is None or cached.report.test is None:
        return {}
    right = cached.report.test.correct()
    return {
        mode.name: mcnemar(mode.report.test.correct(), right)
        for mode in modes
        if mode is not cached and mode.report is not None and mode.report.test is not None
    }

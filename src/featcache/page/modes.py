"""Modes: what the page sets side by side, each with a name, a line of the table, a report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.metrics import mcnemar
from featcache.page.read import Benchmark, Found
from featcache.report import Row, RunReport, advice, benchmark_rows, best_of
from featcache.report.run import Approach

NAMES: dict[Approach, str] = {
    "loop": "head only (network in the loop)",
    "cached": "head only (cached features)",
    "finetune": "full fine-tune",
}
ORDER: tuple[Approach, ...] = ("loop", "cached", "finetune")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One mode.

    `report` is missing where only a benchmark's table is there; `source` is the file that the
    figures are from; `known_extraction` tells whether the row's total has extraction in it.
    """

    row: Row
    source: Path
    report: RunReport | None = None
    known_extraction: bool = True

    @property
    def name(self) -> str:
        """As in the table."""
        return self.row.mode


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
            modes.append(_of_run(path, report, found.extractions))
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


def _of_run(path: Path, report: RunReport, extractions: dict[str, float]) -> Mode:
    approach = approach_of(report)
    extraction, known = 0.0, True
    if approach == "cached":
        cell = report.more.get("cell")
        cache = str(report.provenance.get("cache"))
        if isinstance(cell, dict):
            extraction = float(cell["cost_seconds"]) - float(cell["trial_seconds"])
        elif cache in extractions:
            extraction = extractions[cache]
        else:
            known = False
    row = benchmark_rows([(_name(report, approach), approach, report, extraction)])[0]
    return Mode(row=row, source=path, report=report, known_extraction=known)


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


def _with_names_apart(modes: list[Mode]) -> list[Mode]:
    """Add file names where modes are called alike, and numbers where these are alike too."""
    twice = {name for name, count in Counter(m.name for m in modes).items() if count > 1}
    taken: Counter[str] = Counter()
    result = []
    for mode in modes:
        name = f"{mode.name}, {mode.source.stem}" if mode.name in twice else mode.name
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name} ({taken[name]})"
        result.append(dataclasses.replace(mode, row=dataclasses.replace(mode.row, mode=name)))
    return result


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
    if not all(mode.known_extraction for mode in modes):
        return [
            "What the cache's extraction took is not among these runs, so times are not compared: "
            "add the output of extract-features --json, or run featcache compare."
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

"""Where every number on the page comes from, down to the command that made it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from featcache import config as settings
from featcache.html_report.compared_runs import ComparedRun, target_names
from featcache.html_report.report_files import ReportFiles
from featcache.results import RunReport

CLASSES: dict[str, tuple[str, type[Any], str]] = {
    "extract-features": ("extract-features", settings.ExtractConfig, "dataset"),
    "train-head": ("train-head", settings.TrainHeadConfig, "cache"),
    "finetune": ("finetune", settings.FinetuneConfig, "dataset"),
    "compare": ("featcache compare", settings.CompareConfig, "dataset"),
    "audit": ("featcache audit", settings.AuditConfig, "cache"),
    "report": ("featcache report", settings.ReportConfig, "runs"),
}
HIDDEN = ("json", "verbose")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Rows of text for each run and for each machine, and the commands that made them."""

    runs: list[list[str]]
    machines: list[list[str]]
    commands: list[str]


class SourcedRun(NamedTuple):
    """A run's name, the file it comes from, and its report, if there is one."""

    name: str
    source: Path
    report: RunReport | None


def provenance_of(compared: Sequence[ComparedRun], files: ReportFiles) -> Provenance:
    """Files, data, weights, machines and commands."""
    runs = [SourcedRun(run.name, run.source, run.report) for run in compared]
    named = zip(target_names(files.target_runs), files.target_runs, strict=True)
    runs += [SourcedRun(name, run.path, run.report) for name, run in named]
    return Provenance(
        runs=[[run.name, str(run.source), *_facts(run.report)] for run in runs],
        machines=_machines(runs, files),
        commands=_commands(runs, files),
    )


def _facts(report: RunReport | None) -> list[str]:
    if report is None:
        return ["–"] * 4
    return [
        dataset_text(report.provenance),
        backbone_text(report.provenance),
        report.scored_on,
        report.chosen_on,
    ]


def dataset_text(provenance: settings.JsonObject) -> str:
    """For example "cifar10-2500, fingerprint 3fa0c2b1d9e4"."""
    dataset = provenance.get("dataset") or {}
    return f"{dataset.get('name', '?')}, fingerprint {str(dataset.get('fingerprint', '?'))[:12]}"


def backbone_text(provenance: settings.JsonObject) -> str:
    """For example "resnet18, bundled (sha256 1f0c…), 64 px squash"."""
    backbone = provenance.get("backbone") or {}
    preprocessing = backbone.get("preprocessing") or {}
    digest = str(backbone.get("weights_sha256", "?"))[:12]
    name, weights = backbone.get("backbone", "?"), settings.weights_text(backbone)
    side, resize = preprocessing.get("image_px", "?"), preprocessing.get("resize", "")
    return f"{name}, {weights} (sha256 {digest}…), {side} px {resize}"


def _machines(runs: Sequence[SourcedRun], files: ReportFiles) -> list[list[str]]:
    known = [run.report.environment for run in runs if run.report]
    known += [summary.environment for summary in files.summaries]
    known += [audit.values["environment"] for audit in files.audits]
    rows = []
    for environment in known:
        versions = ", ".join(
            f"{name} {environment[name]}"
            for name in ("featcache", "python", "torch", "torchvision")
            if name in environment
        )
        defaults = {"processor": "?", "num_cores": "?", "device": "cpu", "platform": "?"}
        row = [*(str(environment.get(name, d)) for name, d in defaults.items()), versions]
        if environment and row not in rows:
            rows.append(row)
    return rows


def _commands(runs: Sequence[SourcedRun], files: ReportFiles) -> list[str]:
    lines = [benchmark.typed for benchmark in files.benchmarks if benchmark.typed]
    lines += [command_line("compare", comparison.config) for comparison in files.comparisons]
    benchmarks = {benchmark.path for benchmark in files.benchmarks}
    for run in runs:
        report = run.report
        if report is not None and "cell" not in report.more and run.source not in benchmarks:
            extraction = report.more.get("extraction") or {}
            if extraction.get("config"):
                lines.append(command_line("extract-features", extraction["config"]))
            lines.append(command_line(report.command, report.config))
    lines += [command_line("audit", audit.values["config"]) for audit in files.audits]
    return [" ".join(line.split()) for line in dict.fromkeys(lines)]


def command_line(command: str, config: settings.JsonObject) -> str:
    """The command with the settings that differ from their defaults.

    Settings that this version does not know are left out.

    Args:
        command: extract-features, train-head, finetune, compare, audit or report.
        config: The recorded settings.
    """
    prog, kind, positional = CLASSES[command]
    words = [*prog.split(), str(config.get(positional, ""))]
    for field in dataclasses.fields(kind):
        if field.name in (positional, *HIDDEN) or field.name not in config:
            continue
        value, default = config[field.name], field.default
        if value is None or str(value) == str(default):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(default, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)

"""Where every number on the page comes from."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from featcache import config as settings
from featcache.html_report.doc import Block, Table, Words
from featcache.html_report.modes import Mode
from featcache.html_report.read import Found

CLASSES: dict[str, tuple[str, type[Any], str]] = {
    "extract-features": ("extract-features", settings.ExtractConfig, "dataset"),
    "train-head": ("train-head", settings.TrainHeadConfig, "cache"),
    "finetune": ("finetune", settings.FinetuneConfig, "dataset"),
    "compare": ("featcache compare", settings.CompareConfig, "dataset"),
    "report": ("featcache report", settings.ReportConfig, "runs"),
}
HIDDEN = ("json", "verbose")


def provenance_blocks(modes: Sequence[Mode], found: Found) -> list[Block]:
    """A table of files, data, weights and machine, and the commands that made them."""
    blocks: list[Block] = []
    rows = [[mode.name, str(mode.source), *_facts(mode)] for mode in modes]
    if rows:
        header = ["mode", "file", "dataset", "network and weights", "scored on", "chosen on"]
        caption = "Where the modes' figures come from"
        blocks.append(Table(caption=caption, header=header, rows=rows, num_text=len(header)))
    machines = _machines(modes, found)
    if machines:
        blocks.append(
            Table(
                caption="Machines",
                header=["processor", "cores", "device", "platform", "versions"],
                rows=machines,
                num_text=5,
            )
        )
    text = "The commands that made these figures, from their recorded settings:"
    blocks.append(Words(lines=[text]))
    blocks.append(Words(lines=_commands(modes, found) or ["(not recorded)"], style="code"))
    return blocks


def _facts(mode: Mode) -> list[str]:
    report = mode.report
    if report is None:
        return ["–"] * 4
    return [
        dataset_text(report.provenance),
        network_text(report.provenance),
        report.scored_on,
        report.chosen_on,
    ]


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    inner = values.get(name)
    return inner if isinstance(inner, dict) else {}


def dataset_text(provenance: dict[str, Any]) -> str:
    """For example "cifar10-2500, fingerprint 3fa0c2b1d9e4"."""
    dataset = _table(provenance, "dataset")
    return f"{dataset.get('name', '?')}, fingerprint {str(dataset.get('fingerprint', '?'))[:12]}"


def network_text(provenance: dict[str, Any]) -> str:
    """For example "resnet18, bundled (sha256 1f0c…), 64 px squash"."""
    network = _table(provenance, "backbone")
    prep = _table(network, "preprocessing")
    digest = str(network.get("weights_sha256", "?"))[:12]
    name, weights = network.get("backbone", "?"), network.get("weights", "?")
    side, resize = prep.get("image_px", "?"), prep.get("resize", "")
    return f"{name}, {weights} (sha256 {digest}…), {side} px {resize}"


def _machines(modes: Sequence[Mode], found: Found) -> list[list[str]]:
    known = [mode.report.environment for mode in modes if mode.report]
    tables = [c.values for c in found.comparisons] + [b.values for b in found.benchmarks]
    known += [_table(values, "environment") for values in tables]
    rows = []
    for environment in known:
        versions = ", ".join(
            f"{name} {environment[name]}"
            for name in ("featcache", "python", "torch", "torchvision")
            if name in environment
        )
        row = [
            str(environment.get("processor", "?")),
            str(environment.get("num_cores", "?")),
            str(environment.get("device", "cpu")),
            str(environment.get("platform", "?")),
            versions,
        ]
        if environment and row not in rows:
            rows.append(row)
    return rows


def _commands(modes: Sequence[Mode], found: Found) -> list[str]:
    lines = [str(bench.values["typed"]) for bench in found.benchmarks if "typed" in bench.values]
    for comparison in found.comparisons:
        lines.append(command_line("compare", _table(comparison.values, "config")))
    sources = {bench.path for bench in found.benchmarks}
    for mode in modes:
        report = mode.report
        if report is not None and "cell" not in report.more and mode.source not in sources:
            extraction = _table(_table(report.more, "extraction"), "config")
            if extraction:
                lines.append(command_line("extract-features", extraction))
            lines.append(command_line(report.command, report.config))
    return [" ".join(line.split()) for line in dict.fromkeys(lines)]


def command_line(command: str, config: dict[str, Any]) -> str:
    """The command with the settings that differ from their defaults.

    Settings that this version does not know are left out.

    Args:
        command: extract-features, train-head, finetune, compare or report.
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

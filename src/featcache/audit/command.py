"""`featcache audit`: a cache in, a ranked list of what to look at out. Nothing is changed."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.audit.findings import (
    HEADER,
    OTHER,
    Finding,
    as_cells,
    as_json,
    count_by_kind,
    ranked_findings,
)
from featcache.audit.labels import LabelCheck, check_labels
from featcache.audit.neighbors import near_threshold, neighborhood
from featcache.audit.rows import AllRows, all_rows
from featcache.cache import FeatureCache
from featcache.config import AuditConfig, JsonObject, TrainHeadConfig, config_json
from featcache.data import copies_lines, find_copies, find_shared_groups, shared_groups_lines
from featcache.errors import UserError, listed
from featcache.files import check_outputs, csv_line, write_atomically, write_json
from featcache.heads.summary import settings_text
from featcache.heads.train import of_features, provenance_of
from featcache.heads.training_data import open_cache
from featcache.results import metrics, report_marks
from featcache.runtime import environment

MARKS = re.compile(rb"\Arank,kind,split,id,")
"""How the list begins."""
MAX_SHOWN = 24
"""Findings of each kind in the report, for the page; the list has all."""
FEW_IMAGES = 10
"""Classes with fewer train images are named."""
MAX_NAMED = 10


def audit(config: AuditConfig) -> JsonObject:
    """Look for wrong labels, leaks, near-duplicates and odd images.

    Args:
        config: The command's settings.

    Returns:
        The command's JSON report, which is also written beside the list.

    Raises:
        UserError: The cache has no train or test rows or other labels than classes, or a file of
            another kind would be replaced.
        CacheError: Not a cache, or damaged.
        StorageError: A file cannot be written.
    """
    start = time.perf_counter()
    cache = _open(config)
    listing = config.output or cache.path.with_suffix(".audit.csv")
    marks = {listing: MARKS, listing.with_suffix(".json"): report_marks("audit")}
    check_outputs(marks, [config.cache])
    rows = all_rows(cache)
    splits = {name: cache.rows(name) for name in cache.splits}
    copies = find_copies(splits)
    near = neighborhood(rows, config.neighbors)
    threshold = near_threshold(near) if config.near is None else config.near
    labels = check_labels(config, cache, rows)
    findings = ranked_findings(rows, copies, near, threshold, labels)
    _write_list(listing, findings, rows)
    report: JsonObject = {
        "command": "audit",
        "cache": str(cache.path),
        "list": str(listing),
        "report": str(listing.with_suffix(".json")),
        "splits": _splits(cache, rows),
        "classes": _classes(rows),
        "num_findings": count_by_kind(findings),
        "identical_images": copies.report(),
        "shared_groups": [shared._asdict() for shared in find_shared_groups(splits)],
        "labels": _labels(labels, rows, config),
        "near_duplicates": {"threshold": threshold, "found": config.near is None},
        "findings": _shown(findings, rows),
        "seconds_total": time.perf_counter() - start,
        "config": config_json(config),
        "provenance": provenance_of(cache),
        "environment": environment(),
    }
    report["lines"] = _lines(report)
    write_json(listing.with_suffix(".json"), report)
    return report


def _open(config: AuditConfig) -> FeatureCache:
    """A cache of features with one class per image."""
    cache = of_features(open_cache(TrainHeadConfig(cache=config.cache)))
    if cache.meta.dataset.task != "multiclass":
        raise UserError(
            f"{config.cache} is of a {cache.meta.dataset.task} dataset: audit is for one class per "
            "image"
        )
    return cache


def _write_list(path: Path, findings: Sequence[Finding], rows: AllRows) -> None:
    lines = [csv_line([*HEADER, *OTHER])]
    lines += [
        csv_line(as_cells(rank, as_json(finding, rows)))
        for rank, finding in enumerate(findings, start=1)
    ]
    write_atomically(path, "".join(lines).encode())


def _shown(findings: Sequence[Finding], rows: AllRows) -> list[JsonObject]:
    """The first findings of each kind."""
    shown: dict[str, list[Finding]] = {}
    for finding in findings:
        shown.setdefault(finding.kind, []).append(finding)
    return [as_json(f, rows) for some in shown.values() for f in some[:MAX_SHOWN]]


def _splits(cache: FeatureCache, rows: AllRows) -> JsonObject:
    """Counts of images and groups."""
    return {
        name: {
            "num_samples": int((rows.split == name).sum()),
            "num_skipped": cache.num_rows[name][1],
            "num_groups": None
            if rows.groups is None
            else len(np.unique(rows.groups[rows.split == name])),
        }
        for name in dict.fromkeys(rows.split.tolist())
    }


def _classes(rows: AllRows) -> list[JsonObject]:
    """Counts of each class's images by split, and of its groups in train."""
    table = []
    for label, name in enumerate(rows.class_names):
        own = rows.y == label
        in_train = own[: rows.num_train]
        groups = None if rows.groups is None else rows.groups[: rows.num_train][in_train]
        table.append(
            {
                "name": name,
                "num_images": {
                    split: int((own & (rows.split == split)).sum())
                    for split in dict.fromkeys(rows.split.tolist())
                },
                "num_groups": None if groups is None else len(np.unique(groups)),
            }
        )
    return table


def _labels(labels: LabelCheck, rows: AllRows, config: AuditConfig) -> JsonObject:
    checked = np.isfinite(labels.odds)
    train = checked & (np.arange(len(checked)) < rows.num_train)
    guess = labels.probabilities[train].argmax(axis=1)
    return {
        "solver": labels.solver,
        "settings": labels.choice.settings,
        "chosen_on": labels.choice.chosen_on,
        "weight": labels.weight,
        "folds": config.folds,
        "train_top1": metrics.top1(rows.y[train], guess) if train.any() else None,
        "num_checked": int(checked.sum()),
        "num_unchecked": int((~checked).sum()),
    }


def summary_lines(report: JsonObject) -> list[str]:
    """The report for people."""
    page = f"featcache report {shlex.quote(report['report'])} --dataset DATASET"
    return [*report["lines"], f"list: {report['list']}", f"next: {page}"]


def _lines(report: JsonObject) -> list[str]:
    """What was found, in sentences."""
    sizes = {name: split["num_samples"] for name, split in report["splits"].items()}
    counts, labels = report["num_findings"], report["labels"]
    accuracy = "" if labels["train_top1"] is None else f", accuracy {labels['train_top1']:.3f}"
    return [
        f"{', '.join(f'{num} {name}' for name, num in sizes.items())} images of "
        f"{len(report['classes'])} classes{_groups_text(report)}",
        f"labels that are probably wrong: {counts['wrong-label']} of {labels['num_checked']}, "
        f"doubtful: {counts['doubtful-label']} more ({labels['solver']}, "
        f"{settings_text(labels['settings'])}; "
        f"{labels['folds']}-fold cross-validation{accuracy})",
        *copies_lines(report["identical_images"], sizes, divided=False),
        *shared_groups_lines(report["shared_groups"]),
        f"pairs of near-duplicates: {counts['near-duplicate']} within a split, "
        f"{counts['near-duplicate-across-splits']} across splits (cosine from "
        f"{report['near_duplicates']['threshold']:.3f})",
        f"outliers, far from every train image: {counts['outlier']}",
        *_class_lines(report["classes"]),
    ]


def _groups_text(report: JsonObject) -> str:
    groups = {name: split["num_groups"] for name, split in report["splits"].items()}
    if None in groups.values():
        return ", no groups"
    return f", groups: {', '.join(f'{num} {name}' for name, num in groups.items())}"


def _class_lines(classes: Sequence[JsonObject]) -> list[str]:
    """Classes that are small, all in one group, or of very different sizes."""
    sizes = {row["name"]: row["num_images"]["train"] for row in classes}
    few = [f"{name} ({num})" for name, num in sizes.items() if num < FEW_IMAGES]
    alone = [row["name"] for row in classes if row["num_groups"] == 1]
    lines = []
    if few:
        lines.append(
            f"classes with fewer than {FEW_IMAGES} train images: {len(few)} "
            f"({listed(few, MAX_NAMED)})"
        )
    if alone:
        lines.append(
            f"classes with one group in train, so that nothing can be held out: {len(alone)} "
            f"({listed(alone, MAX_NAMED)})"
        )
    low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[high] >= 2 * max(sizes[low], 1):
        lines.append(
            f"class sizes: {sizes[low]} ({low}) to {sizes[high]} ({high}) train images: look at "
            "balanced accuracy, and at --class-weight balanced"
        )
    return lines

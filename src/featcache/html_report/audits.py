"""What an audit found, as a table of classes and pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featcache.config import JsonObject, ReportConfig
from featcache.errors import UserError
from featcache.html_report.mistakes import load_images, thumbnail
from featcache.html_report.report_files import Audit

MAX_CLASS_ROWS = 1000
MAX_PICTURES = 24
CAPTIONS = {
    "identical-two-labels": "Identical images with different labels: at most one label is right.",
    "identical-across-splits": "Images that two splits share: the score of the later one is too "
    "high.",
    "wrong-label": "Labels that are probably wrong, the least probable first: the label, the class "
    "that other images suggest, and the probability of the label.",
    "near-duplicate-across-splits": "Near-duplicates across splits, and the cosine of their "
    "features: check whether the later one still tests anything.",
    "near-duplicate": "Near-duplicates within a split.",
    "identical": "Identical images within a split.",
    "doubtful-label": "Labels that are doubted with less certainty: a head that errs often doubts "
    "many right labels.",
    "outlier": "Images far from every train image, the farthest first.",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image with lines of text below it; `jpeg` is in base64, if the image is at hand."""

    lines: list[str]
    jpeg: str | None


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The images found for one reason."""

    caption: str
    num_found: int
    pictures: list[Picture]


def audit_values(audit: Audit, config: ReportConfig) -> JsonObject:
    """What the macro `audit` shows.

    Raises:
        UserError: The dataset named for images is not that of the cache.
    """
    values = audit.values
    rows = _rows(audit, config)
    by_kind: dict[str, list[JsonObject]] = {}
    for finding in values["findings"]:
        by_kind.setdefault(finding["kind"], []).append(finding)
    header, table = class_table(values["classes"])
    return {
        "lines": values["lines"],
        "header": header,
        "rows": table,
        "strips": [
            Strip(
                caption=CAPTIONS[kind],
                num_found=_count(values["num_findings"].get(kind), len(found)),
                pictures=[_picture(finding, rows) for finding in found[:MAX_PICTURES]],
            )
            for kind, found in by_kind.items()
            if kind in CAPTIONS
        ],
        "has_images": rows is not None,
        "list": values["list"],
    }


def _count(value: Any, least: int) -> int:
    return max(value, least) if type(value) is int else least


def class_table(classes: Sequence[JsonObject]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many images of each class every split has, and groups of train."""
    splits = list(classes[0]["num_images"])
    grouped = any(row.get("num_groups") is not None for row in classes)
    header = ["class", *splits, *(["groups in train"] if grouped else [])]
    table = []
    for row in classes[:MAX_CLASS_ROWS]:
        counts = [row["num_images"].get(split, 0) for split in splits]
        counts += [row.get("num_groups", 0)] if grouped else []
        table.append([row["name"], *(f"{count}" for count in counts)])
    return header, table


Images = dict[tuple[str, str], tuple[Any, int]]
"""The split (a data.ImageSplit) and row of an image, by the split's name and the image's id."""


def _rows(audit: Audit, config: ReportConfig) -> Images | None:
    if config.dataset is None:
        return None
    dataset = load_images(config, audit.dataset)
    if audit.dataset.get("fingerprint") != dataset.fingerprint:
        raise UserError(
            f"--dataset {config.dataset} is not what {audit.path} is about, or has changed since: "
            "name the dataset that the cache was made from, or omit --dataset"
        )
    return {
        (name, sample_id): (split, row)
        for name, split in dataset.splits.items()
        for row, sample_id in enumerate(split.ids)
    }


def _picture(finding: JsonObject, rows: Images | None) -> Picture:
    other, score = finding.get("other"), finding.get("score")
    lines = [f"{finding['label']}", finding["id"]]
    if finding.get("suggested"):
        lines[0] += f" → {finding['suggested']}?"
    if score is not None:
        lines[0] += f" ({score:.3f})"
    if other:
        lines.append(f"like {other['id']} ({other['split']}, {other['label']})")
    found = (rows or {}).get((finding["split"], finding["id"]))
    return Picture(lines=lines, jpeg=thumbnail(*found) if found else None)

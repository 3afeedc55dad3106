"""What an audit found, as one ranked list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from featcache.audit.labels import LabelCheck
from featcache.audit.neighbors import Neighborhood, near_pairs, outliers
from featcache.audit.rows import AllRows
from featcache.config import JsonObject
from featcache.data import Copies

Kind = Literal[
    "identical-two-labels",
    "identical-across-splits",
    "wrong-label",
    "near-duplicate-across-splits",
    "near-duplicate",
    "identical",
    "outlier",
    "doubtful-label",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order of the list: what harms most, and is surest, comes first."""

ODDS = 20.0
"""From these odds on, a label is called wrong rather than doubtful. The odds are the ratio of the
other class's probability to that of the label, each divided by its confident-learning threshold."""
HEADER = ("rank", "kind", "split", "id", "label", "suggested", "score")
OTHER = ("other_split", "other_id", "other_label", "group")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One image to look at.

    Attributes:
        kind: Why.
        row: Which, by its number in `AllRows`.
        score: Of a wrong or doubtful label its probability; of near-duplicates their cosine; of an
            outlier its distance to the nearest train images.
        other: The image that it resembles.
        suggested: The number of its probable class.
    """

    kind: Kind
    row: int
    score: float | None = None
    other: int | None = None
    suggested: int | None = None


def ranked_findings(
    rows: AllRows, copies: Copies, near: Neighborhood, threshold: float, labels: LabelCheck
) -> list[Finding]:
    """All findings in order of their kind, and within a kind of how sure they are."""
    found = [*_identical(rows, copies), *_doubtful(rows, labels), *_near(rows, near, threshold)]
    far, distance = outliers(near)
    found += [Finding(kind="outlier", row=int(r), score=float(distance[r])) for r in far]
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def _identical(rows: AllRows, copies: Copies) -> Iterator[Finding]:
    places = {
        (split, name): i for i, (split, name) in enumerate(zip(rows.split, rows.ids, strict=True))
    }
    for copy in copies.pairs():
        kind: Kind = "identical"
        if copy.split != copy.also_in:
            kind = "identical-across-splits"
        if not copy.same_label:
            kind = "identical-two-labels"
        yield Finding(
            kind=kind, row=places[copy.split, copy.id], other=places[copy.also_in, copy.also_id]
        )


def _doubtful(rows: AllRows, labels: LabelCheck) -> Iterator[Finding]:
    for row, suggested in zip(labels.suspects.tolist(), labels.suggested.tolist(), strict=True):
        score = float(labels.probabilities[row, rows.y[row]])
        kind: Kind = "wrong-label" if labels.odds[row] >= ODDS else "doubtful-label"
        yield Finding(kind=kind, row=row, score=score, suggested=suggested)


def _near(rows: AllRows, near: Neighborhood, threshold: float) -> Iterator[Finding]:
    pairs, cosine = near_pairs(rows, near, threshold)
    for (row, other), score in zip(pairs.tolist(), cosine.tolist(), strict=True):
        across = rows.split[row] != rows.split[other]
        kind: Kind = "near-duplicate-across-splits" if across else "near-duplicate"
        yield Finding(kind=kind, row=row, other=other, score=score)


def as_json(finding: Finding, rows: AllRows) -> JsonObject:
    """A finding with names instead of numbers."""

    def named(row: int | None) -> JsonObject | None:
        if row is None:
            return None
        label = rows.class_names[rows.y[row]]
        return {"split": str(rows.split[row]), "id": rows.ids[row], "label": label}

    suggested = finding.suggested
    return {
        "kind": finding.kind,
        **(named(finding.row) or {}),
        "suggested": None if suggested is None else rows.class_names[suggested],
        "score": None if finding.score is None else round(finding.score, 6),
        "other": named(finding.other),
        "group": None if rows.groups is None else str(rows.groups[finding.row]),
    }


def as_cells(rank: int, finding: JsonObject) -> list[object]:
    """A line of the list, from a finding as JSON."""
    other = finding["other"] or {}
    cells = [rank, *(finding[name] for name in HEADER[1:])]
    cells += [other.get(name) for name in ("split", "id", "label")] + [finding["group"]]
    return ["" if cell is None else cell for cell in cells]


def count_by_kind(findings: Sequence[Finding]) -> dict[Kind, int]:
    """How many findings of each kind there are."""
    counts = np.bincount([KINDS.index(f.kind) for f in findings], minlength=len(KINDS))
    return dict(zip(KINDS, counts.tolist(), strict=True))

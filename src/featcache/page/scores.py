"""Per-class scores, confusions and confidently wrong images of modes with predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.metrics import confusion, per_class
from featcache.page.doc import Block, Matrix, Table, Text
from featcache.page.modes import Mode
from featcache.report import Predictions, RunReport

MAX_MATRIX_CLASSES = 40
MAX_PAIRS = 8
MAX_CLASS_ROWS = 1000


def predictions_of(mode: Mode) -> tuple[RunReport, Predictions, list[str]] | None:
    """A mode's report, predictions and class names, where its report has them."""
    report = mode.report
    if report is None or report.test is None or not report.class_names or not report.test.ids:
        return None
    return report, report.test, report.class_names


def per_class_table(modes: Sequence[Mode]) -> Table | None:
    """Share of every class's test images that each mode found.

    Modes with other classes than the first one's are left out.
    """
    named = [(mode, *found) for mode in modes if (found := predictions_of(mode))]
    if not named:
        return None
    names = named[0][3]
    same = [entry for entry in named if entry[3] == names]
    recalls = [per_class(test.labels, test.predicted, len(names)) for _, _, test, _ in same]
    counts = np.bincount(np.array(same[0][2].labels), minlength=len(names))
    rows = [
        [name, f"{counts[i]:,}", *("–" if np.isnan(r[i]) else f"{r[i]:.3f}" for r in recalls)]
        for i, name in enumerate(names[:MAX_CLASS_ROWS])
    ]
    return Table(
        caption="Recall: the share of each class's test images that was recognised",
        header=["class", "test images", *(mode.name for mode, *_ in same)],
        rows=rows,
    )


def confusion_blocks(mode: Mode) -> list[Block]:
    """A mode's confusion matrix, and the pairs it mixes up most."""
    found = predictions_of(mode)
    if found is None:
        return []
    _, test, names = found
    counts = confusion(test.labels, test.predicted, len(names))
    blocks: list[Block] = []
    if len(names) <= MAX_MATRIX_CLASSES:
        blocks.append(
            Matrix(
                caption=f"{len(test.ids):,} test images by true class (row) and predicted class "
                "(column); the shade is the share of the row",
                names=names,
                counts=counts.tolist(),
            )
        )
    else:
        blocks.append(
            Text(
                text=f"With {len(names):,} classes the matrix is too large to show here.", note=True
            )
        )
    rows = confused_pairs(counts, names)
    if rows:
        blocks.append(
            Table(
                caption="Most confused pairs, both directions together",
                header=["pair", "mistakes", "of the pair's images"],
                rows=rows,
            )
        )
    else:
        blocks.append(Text(text="No test image was classified wrongly."))
    return blocks


def confused_pairs(counts: NDArray[np.int64], names: Sequence[str]) -> list[list[str]]:
    """The pairs with most mistakes, with their number and the share of the two classes' images."""
    both = np.triu(counts + counts.T, k=1)
    order = np.argsort(-both, axis=None, kind="stable")[:MAX_PAIRS]
    totals = counts.sum(axis=1)
    rows = []
    for flat in order:
        a, b = divmod(int(flat), len(names))
        if both[a, b]:
            share = both[a, b] / max(int(totals[a] + totals[b]), 1)
            pair = f"{names[a]} – {names[b]}"
            detail = f"{both[a, b]} ({counts[a, b]} + {counts[b, a]})"
            rows.append([pair, detail, f"{share:.1%}"])
    return rows


def confidently_wrong(test: Predictions, most: int) -> list[int]:
    """Test images that were classified wrongly, the most confident first."""
    wrong = [i for i, right in enumerate(test.correct()) if not right]
    return sorted(wrong, key=lambda i: (-test.confidence[i], i))[:most]

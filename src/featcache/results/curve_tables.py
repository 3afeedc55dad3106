"""The learning curve as a table."""

from __future__ import annotations

from collections.abc import Sequence

from featcache.results.curve_advice import NAMES, size_text
from featcache.results.learning_curve import Point, Side
from featcache.results.tables import seconds_text

HEADER = (
    "train images",
    "cached head",
    "fine-tune",
    "difference",
    "p value",
    "more accurate",
    "cached, time",
    "tuning, time",
    "time per point",
    "cache pays after",
)

WORDY = (0, HEADER.index("more accurate"))
GAP = "  "
MAX_WIDTH = 100


def curve_header() -> tuple[str, ...]:
    """The columns' names."""
    return HEADER


def curve_cells(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """The table's body as text, one tuple per size in the order of `curve_header`.

    Accuracy is a mean over seeds with its 95 % interval over test images, difference in points
    (hundredths), fine-tune less cached head. Where classes differ in size, the balanced accuracy
    stands beside it. The last row is the baseline that both modes have to beat.
    """
    baselines = dict.fromkeys(p.baseline_top1 for p in points if p.baseline_top1 is not None)
    rest = ("–",) * (len(HEADER) - 3)
    return [_cells(p) for p in points] + [
        ("most frequent class", f"{top1:.3f}", f"{top1:.3f}", *rest) for top1 in baselines
    ]


def _cells(point: Point) -> tuple[str, ...]:
    gain, p_value, trials = point.difference, point.p_value, point.pays_after_trials
    per_point = point.seconds_per_point
    undecided = "undecided" if point.useful else "neither"
    verdicts = {"undecided": undecided, "unmeasured": "not measured"}
    size = f"all ({point.num_train:,})" if point.size == "all" else size_text(point)
    return (
        size if point.size == "all" else f"{size} ({point.num_train:,})",
        _top1(point.cached, point),
        _top1(point.finetune, point),
        "–" if gain is None else _points(gain),
        "–" if p_value is None else ("< 0.001" if p_value < 0.001 else f"{p_value:.2g}"),
        verdicts.get(point.verdict) or NAMES[point.verdict],  # type: ignore[index]
        "–" if point.cached is None else seconds_text(point.cached.cost_seconds),
        "–" if point.finetune is None else seconds_text(point.finetune.cost_seconds),
        "–" if per_point is None else seconds_text(per_point),
        "–" if trials is None else f"{trials:,} head{'s' if trials > 1 else ''}",
    )


def _points(gain: float) -> str:
    """Hundredths with their sign; none where they round to zero."""
    rounded = round(100 * gain, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _top1(side: Side | None, point: Point) -> str:
    if side is None:
        return "–"
    low, high = side.interval
    text = f"{side.top1:.3f} [{low:.3f}, {high:.3f}]"
    if point.imbalanced and side.balanced_top1 is not None:
        text += f", balanced {side.balanced_top1:.3f}"
    return text


def curve_text(points: Sequence[Point]) -> str:
    """The table for a terminal of `MAX_WIDTH` columns: aligned, no trailing blanks.

    Columns that find no room go into further tables below, which begin with the sizes again.
    """
    lines = [HEADER, *curve_cells(points)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    tables = [[0]]
    for i in range(1, len(HEADER)):
        if sum(widths[j] + len(GAP) for j in tables[-1]) + widths[i] > MAX_WIDTH:
            tables.append([0])
        tables[-1].append(i)
    return "\n\n".join(_aligned(lines, widths, columns) for columns in tables)


def _aligned(lines: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int]) -> str:
    header, *rows = (
        GAP.join(
            line[i].ljust(widths[i]) if i in WORDY else line[i].rjust(widths[i]) for i in columns
        ).rstrip()
        for line in lines
    )
    return "\n".join([header, GAP.join("-" * widths[i] for i in columns), *rows])

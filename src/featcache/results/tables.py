"""Tables for people: modes side by side, and learning curves; numbers as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from featcache.config import JsonObject
from featcache.results.runs import Row, RunReport
from featcache.results.scores import BY_CLASS, Scores

if TYPE_CHECKING:
    from featcache.results.learning_curve import CurveMode, CurvePoint, ModeScores

HEADER = (
    "mode",
    "trainable parameters",
    "test accuracy",
    "time per epoch",
    "extraction",
    "total time",
    "speed-up",
)

CURVE_HEADER = (
    "train images",
    "cached head",
    "fine-tune",
    "difference",
    "p value",
    "more accurate",
    "head time",
    "fine-tune time",
    "time per point",
    "cache pays after",
)

FEATURES_HEADER = ("head's features (held-out accuracy)",)
TAIL_HEADER = ("tail, cached activations", "tail time")
SHIFTED_HEADER = ("cached head, shifted", "fine-tune, shifted")
CLASS_HEADER = (
    "class",
    "test images",
    "precision",
    "recall",
    "F1",
    "AUROC",
    "average precision",
)

DASH = "–"
GAP = "  "
MAX_WIDTH = 100

MAJORITY = "always answering the most frequent class"


def seconds_text(seconds: float) -> str:
    """Seconds for people: "0.8 ms", "0.042 s", "6.1 s", "305 s"; "2.1 h" from an hour on."""
    if seconds < 0.001:
        return f"{seconds * 1000:.2g} ms"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    decimals = next(d for limit, d in ((1, 3), (100, 1), (3600, 0)) if seconds < limit)
    return f"{seconds:.{decimals}f} s"


def minutes_text(seconds: float) -> str:
    """Seconds in the unit that people would say: "6.1 s", "5.1 minutes", "2.1 h"."""
    return f"{seconds / 60:.1f} minutes" if 120 <= seconds < 3600 else seconds_text(seconds)


def times_text(ratio: float) -> str:
    """A ratio for people: "0.84×", "3.1×", "240×"."""
    if ratio >= 99.5:
        return f"{float(f'{ratio:.2g}'):,.0f}×"
    return f"{ratio:.2g}×" if ratio < 1 else f"{ratio:.{0 if ratio >= 9.95 else 1}f}×"


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's body as text, one tuple per row in the order of `HEADER`.

    Accuracy comes with its 95% interval, and with the balanced accuracy where classes differ in
    size. The total has the extraction in it. Speed-up is the total time of the slowest mode divided
    by this mode's; there is none for a row whose extraction is not known. The last row is the
    baseline that any mode has to beat.
    """
    slowest = max((row.seconds_total for row in rows if row.extraction_known), default=0.0)
    cells: list[tuple[str, ...]] = []
    for row in rows:
        ratio = slowest / row.seconds_total if row.seconds_total else math.inf
        known, total = row.extraction_known, seconds_text(row.seconds_total)
        extraction = seconds_text(row.extract_seconds) if row.extract_seconds else "none"
        cells.append(
            (
                row.mode,
                f"{row.trainable_params:,}",
                _accuracy(row),
                seconds_text(row.seconds_per_epoch) if row.num_epochs else "no epochs",
                extraction if known else "not known",
                total if known else f"{total} + extraction",
                times_text(ratio) if known else "–",
            )
        )
    return cells + _baselines(rows)


def _accuracy(row: Row) -> str:
    text = with_interval(row.test_top1, row.test_interval)
    if row.imbalanced and row.balanced_top1 is not None:
        text += f", balanced {row.balanced_top1:.3f}"
    return text


def _baselines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What answering the most frequent class every time reaches, for every test split."""
    found = sorted({(r.num_test, r.baseline_top1) for r in rows if r.baseline_top1 is not None})
    rest = ("–",) * (len(HEADER) - 3)
    return [
        (
            MAJORITY if len(found) == 1 else f"{MAJORITY} of {num_test:,} test images",
            "0",
            f"{top1:.3f}",
            *rest,
        )
        for num_test, top1 in found
    ]


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: columns aligned, no trailing blanks."""
    lines = [HEADER, *table_cells(rows)]
    return _aligned(lines, _widths(lines), range(len(HEADER)), left=(0,))


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown; a bar in a mode's name cannot break it."""
    head = f"| {' | '.join(HEADER)} |"
    rule = "| --- |" + " ---: |" * (len(HEADER) - 1)
    body = [
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
        for line in table_cells(rows)
    ]
    return "\n".join([head, rule, *body])


def curve_header(points: Sequence[CurvePoint]) -> tuple[str, ...]:
    """The columns of `curve_cells`: more where heads had a choice or there is a second test set."""
    return (
        *CURVE_HEADER,
        *(FEATURES_HEADER if _have_features(points) else ()),
        *(TAIL_HEADER if _have_tail(points) else ()),
        *(SHIFTED_HEADER if _have_shifted(points) else ()),
    )


def _have_features(points: Sequence[CurvePoint]) -> bool:
    return any(point.cached and point.cached.held_out for point in points)


def _have_tail(points: Sequence[CurvePoint]) -> bool:
    return any(point.tail for point in points)


def _have_shifted(points: Sequence[CurvePoint]) -> bool:
    return any(point.num_shifted for point in points)


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """For example "0.812 [0.79, 0.83]"."""
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def score_text(name: str, value: float | None, scores: Scores) -> str:
    """A score for people with its 95% interval: "0.912 [0.901, 0.923]"."""
    if value is None:
        return "–"
    ends = scores.intervals.get(name)
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def score_lines(report: RunReport) -> list[str]:
    """A run's scores beyond accuracy; with --verbose, of every class; none of old reports."""
    scores, calibration = report.scores, report.calibration
    if scores is None or calibration is None:
        return []
    named = [
        f"{words} {score_text(name, getattr(scores, name), scores)}"
        for words, name in (("macro F1", "macro_f1"), ("AUROC", "auroc"), ("log loss", "log_loss"))
        if getattr(scores, name) is not None
    ]
    line = f"calibration error {calibration.after.ece:.3f}"
    if calibration.temperature != 1:
        line += (
            f" ({calibration.before.ece:.3f} without the temperature of "
            f"{calibration.temperature:.2f})"
        )
    lines = [", ".join(named), line]
    return lines + (class_text(scores).split("\n") if report.config.get("verbose") else [])


def class_cells(scores: Scores) -> list[tuple[str, ...]]:
    """Scores of every class as text, one tuple per class in the order of `CLASS_HEADER`."""
    return [
        (name, f"{c.support:,}", *(or_dash(getattr(c, key)) for key in BY_CLASS))
        for name, c in scores.classes.items()
    ]


def or_dash(share: float | None) -> str:
    """A share for people, a dash where it has no meaning."""
    return "–" if share is None else f"{share:.3f}"


def class_text(scores: Scores) -> str:
    """The table of classes for a terminal."""
    lines = [CLASS_HEADER, *class_cells(scores)]
    return _aligned(lines, _widths(lines), range(len(CLASS_HEADER)), left=(0,))


def curve_cells(points: Sequence[CurvePoint]) -> list[tuple[str, ...]]:
    """The table's body as text, one tuple per size in the order of `curve_header`.

    Accuracy is a mean over seeds with its 95% interval over test images, difference in points
    (hundredths), fine-tune less cached head. Where classes differ in size, the balanced accuracy
    stands beside it. The last row is the baseline that both modes have to beat.
    """
    from featcache.results.learning_curve import NAMES  # late: train-head shows no curve

    baselines = dict.fromkeys(p.baseline_top1 for p in points if p.baseline_top1 is not None)
    rest = ("–",) * (len(curve_header(points)) - 3)
    more: list[Callable[[CurvePoint], str]] = []
    more += [_features_cell] if _have_features(points) else []
    more += [_tail_cell, _tail_time] if _have_tail(points) else []
    more += [_shifted_cell(mode) for mode in NAMES] if _have_shifted(points) else []
    return [(*_curve_row(p), *(cell(p) for cell in more)) for p in points] + [
        ("most frequent class", f"{top1:.3f}", f"{top1:.3f}", *rest) for top1 in baselines
    ]


def _curve_row(point: CurvePoint) -> tuple[str, ...]:
    from featcache.results.learning_curve import NAMES, size_text

    gain, p_value, trials = point.difference, point.p_value, point.pays_after_trials
    per_point = point.seconds_per_point
    undecided = "undecided" if point.useful else "neither"
    verdicts = {"undecided": undecided, "unmeasured": "not measured"}
    size = f"all ({point.num_train:,})" if point.size == "all" else size_text(point)
    return (
        size if point.size == "all" else f"{size} ({point.num_train:,})",
        _scores(point.cached, point),
        _scores(point.finetune, point),
        "–" if gain is None else _points(gain),
        "–" if p_value is None else ("< 0.001" if p_value < 0.001 else f"{p_value:.2g}"),
        verdicts.get(point.verdict) or NAMES[point.verdict],  # type: ignore[index]
        "–" if point.cached is None else seconds_text(point.cached.cost_seconds),
        "–" if point.finetune is None else seconds_text(point.finetune.cost_seconds),
        "–" if per_point is None else seconds_text(per_point),
        "–" if trials is None else f"{trials:,} head{'s' if trials > 1 else ''}",
    )


def _features_cell(point: CurvePoint) -> str:
    """What the cached head chose among, what it chose most often first."""
    if point.cached is None or not point.cached.held_out:
        return "–"
    held_out = point.cached.held_out
    names = dict.fromkeys([*point.cached.features, *held_out])
    return "; ".join(f"{name} {held_out[name]:.3f}" for name in names if name in held_out)


def _tail_cell(point: CurvePoint) -> str:
    return _scores(point.tail, point)


def _tail_time(point: CurvePoint) -> str:
    return "–" if point.tail is None else seconds_text(point.tail.cost_seconds)


def _shifted_cell(mode: CurveMode) -> Callable[[CurvePoint], str]:
    def cell(point: CurvePoint) -> str:
        side = point.scores(mode)
        return "–" if side is None or side.shifted_top1 is None else f"{side.shifted_top1:.3f}"

    return cell


def _points(gain: float) -> str:
    """Hundredths with their sign; none where they round to zero."""
    rounded = round(100 * gain, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _scores(side: ModeScores | None, point: CurvePoint) -> str:
    if side is None:
        return "–"
    low, high = side.interval
    text = f"{side.top1:.3f} [{low:.3f}, {high:.3f}]"
    if point.imbalanced and side.balanced_top1 is not None:
        text += f", balanced {side.balanced_top1:.3f}"
    return text


def curve_text(points: Sequence[CurvePoint]) -> str:
    """The table for a terminal of `MAX_WIDTH` columns: aligned, no trailing blanks.

    Columns that find no room go into further tables below, which begin with the sizes again.
    """
    header = curve_header(points)
    lines = [header, *curve_cells(points)]
    widths = _widths(lines)
    tables = [[0]]
    for i in range(1, len(header)):
        if sum(widths[j] + len(GAP) for j in tables[-1]) + widths[i] > MAX_WIDTH:
            tables.append([0])
        tables[-1].append(i)
    words = ("train images", "more accurate", *FEATURES_HEADER)
    left = [i for i, name in enumerate(header) if name in words]
    return "\n\n".join(_aligned(lines, widths, columns, left) for columns in tables)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(text) for text in column) for column in zip(*lines, strict=True)]


def _aligned(
    lines: Sequence[Sequence[str]],
    widths: Sequence[int],
    columns: Sequence[int],
    left: Sequence[int],
) -> str:
    """Some columns of a table, a rule below the header; `left` are those of words."""
    header, *rows = (
        GAP.join(
            line[i].ljust(widths[i]) if i in left else line[i].rjust(widths[i]) for i in columns
        ).rstrip()
        for line in lines
    )
    return "\n".join([header, GAP.join("-" * widths[i] for i in columns), *rows])


def leak_lines(report: JsonObject) -> list[str]:
    """The same of a report as JSON, as a sentence; nothing of one without leaks.

    Args:
        report: `RunReport.to_json`, of any version.
    """
    found = report.get("without_leaks")
    if not found:
        return []
    if not found["num_test"]:
        return [f"all {found['num_leaked']} test images are also in train: the accuracy is no test"]
    low, high = found["test_interval"]
    return [
        f"without the {found['num_leaked']} test images that are also in train: test accuracy "
        f"{found['test_top1']:.3f} (95% interval {low:.3f} to {high:.3f}) on "
        f"{found['num_test']} images"
    ]

"""The comparison as a table, and the arithmetic of what a cache saves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featcache.results.runs import Row

HEADER = (
    "mode",
    "trainable parameters",
    "test accuracy",
    "time per epoch",
    "extraction",
    "total time",
    "speed-up",
)

MAJORITY = "always answering the most frequent class"


def seconds_text(seconds: float) -> str:
    """Seconds for people: "0.8 ms", "0.042 s", "6.1 s", "305 s"; "2.1 h" from an hour on."""
    if seconds < 0.001:
        return f"{seconds * 1000:.2g} ms"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    decimals = next(d for limit, d in ((1, 3), (100, 1), (3600, 0)) if seconds < limit)
    return f"{seconds:.{decimals}f} s"


def times_text(ratio: float) -> str:
    """A ratio for people: "0.84×", "3.1×", "240×"."""
    if ratio >= 99.5:
        return f"{float(f'{ratio:.2g}'):,.0f}×"
    return f"{ratio:.2g}×" if ratio < 1 else f"{ratio:.{0 if ratio >= 9.95 else 1}f}×"


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's body as text, one tuple per row in the order of `HEADER`.

    Accuracy comes with its 95 % interval, and with the balanced accuracy where classes differ in
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
    low, high = row.test_interval
    text = f"{row.test_top1:.3f} [{low:.2f}, {high:.2f}]"
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
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]

    def aligned(line: tuple[str, ...]) -> str:
        pads = [
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(pads).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([aligned(HEADER), rule, *(aligned(line) for line in lines[1:])])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown; a bar in a mode's name cannot break it."""
    head = f"| {' | '.join(HEADER)} |"
    rule = "| --- |" + " ---: |" * (len(HEADER) - 1)
    body = [
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
        for line in table_cells(rows)
    ]
    return "\n".join([head, rule, *body])


def break_even(one_time_s: float, cached_s: float, uncached_s: float) -> int | None:
    """After how many repetitions a one-time cost has paid for itself.

    The smallest whole n with `one_time_s + n * cached_s <= n * uncached_s`.

    Args:
        one_time_s: Seconds of extraction.
        cached_s: Seconds of one epoch (or trial) on the cache.
        uncached_s: Seconds of one epoch (or trial) without it.

    Returns:
        That number, at least 1; None when a repetition on the cache saves nothing.
    """
    saved = uncached_s - cached_s
    if not saved > 0:
        return None
    return max(1, math.ceil(one_time_s / saved))


def speedups(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """How many times as fast a head on the cache is as each mode with the network in the loop.

    The head is the first that trains in epochs, as the others do.

    Returns:
        By the other mode's name: "total" (extraction included), "epoch" (training pass alone) and
        "next_run" (the cache being there); empty without such a head.
    """
    cached = next((row for row in rows if row.approach == "cached" and row.num_epochs), None)
    if cached is None:
        return {}
    return {
        row.mode: {
            "total": row.seconds_total / cached.seconds_total,
            "epoch": row.seconds_per_epoch / cached.seconds_per_epoch,
            "next_run": row.seconds_total / cached.later_seconds,
        }
        for row in rows
        if row.approach != "cached"
    }

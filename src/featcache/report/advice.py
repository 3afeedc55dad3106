"""Two or three plain sentences on which mode to pick, written from the figures.

The figures are a run's totals on one machine and its scores on one test split. A difference in
accuracy counts only where a paired test (or, without one, the intervals) puts it beyond chance;
otherwise the sentences say that accuracy does not decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featcache.report.run import Row
from featcache.report.tables import seconds_text, times_text

LEVEL = 0.05


def advice(rows: Sequence[Row], p_values: Mapping[str, float] | None = None) -> list[str]:
    """Say which mode was faster, which more accurate, and when to pick each, here.

    The cached head is set against the most accurate full fine-tune. As that one is the best of
    several, its p value is multiplied by their number (Bonferroni), so that trying many learning
    rates does not make a difference look surer than it is.

    Args:
        rows: The comparison's lines; those that are not the cached head, the head with the
            network in the loop, or a full fine-tune play no part.
        p_values: By a row's mode, the p value of a paired test of that mode against the cached
            head on the same test images. A fine-tune without one is judged by whether the 95 %
            intervals overlap.

    Returns:
        Three sentences; only the first when there is no fine-tune; none without a cached head.
    """
    cached = next((row for row in rows if row.approach == "cached"), None)
    if cached is None:
        return []
    tunes = [row for row in rows if row.approach == "finetune"]
    if not tunes:
        return [_speed(cached, [row for row in rows if row is not cached])]
    tune = max(tunes, key=lambda row: (row.test_top1, -row.seconds_total))
    p_value = (p_values or {}).get(tune.mode)
    p_value = None if p_value is None else min(1.0, p_value * len(tunes))
    loops = [row for row in rows if row.approach == "loop"]
    sure = _is_sure(cached, tune, p_value)
    return [
        _speed(cached, [*loops, tune]),
        _accuracy(cached, tune, p_value, sure, len(tunes)),
        _pick(cached, tune, sure),
    ]


def _is_sure(cached: Row, tune: Row, p_value: float | None) -> bool:
    """Whether the difference in accuracy is beyond chance."""
    if cached.test_top1 == tune.test_top1:
        return False
    if p_value is not None:
        return p_value < LEVEL
    low, high = sorted((cached, tune), key=lambda row: row.test_top1)
    return low.test_interval[1] < high.test_interval[0]


def _speed(cached: Row, others: Sequence[Row]) -> str:
    again = f"a further run on the cache takes {seconds_text(cached.later_seconds)}"
    fastest = min([cached, *others], key=lambda row: row.seconds_total)
    total = seconds_text(fastest.seconds_total)
    if fastest is cached:
        ratios = [
            f"{times_text(row.seconds_total / cached.seconds_total)} as fast as {row.mode}"
            for row in others
        ]
        compared = f", {' and '.join(ratios)}" if ratios else ""
        return f"Faster: the cached head, {total} with its extraction{compared}; {again}."
    ratio = times_text(cached.seconds_total / fastest.seconds_total)
    return (
        f"Faster: {fastest.mode}, {total}, {ratio} as fast as the cached head, whose extraction "
        f"took {seconds_text(cached.extract_seconds)}; {again}."
    )


def _accuracy(cached: Row, tune: Row, p_value: float | None, sure: bool, num_tunes: int) -> str:
    tune_ahead = tune.test_top1 >= cached.test_top1
    ahead, ahead_top1 = (tune.mode, tune.test_top1) if tune_ahead else ("the cached head", 0.0)
    behind, behind_top1 = ("the cached head", cached.test_top1)
    if not tune_ahead:
        ahead_top1, behind, behind_top1 = cached.test_top1, tune.mode, tune.test_top1
    scores = (
        f"{ahead_top1:.3f} against {behind_top1:.3f} for {behind} "
        f"on the same {cached.num_test} test images"
    )
    why = _evidence(p_value, sure, num_tunes)
    if sure:
        return f"More accurate: {ahead}, {scores}; the difference is beyond chance ({why})."
    if cached.test_top1 == tune.test_top1:
        return (
            f"Accuracy does not decide: {tune.mode} and the cached head both have "
            f"{tune.test_top1:.3f} on the same {cached.num_test} test images."
        )
    return f"Accuracy does not decide: {ahead} has {scores}, which may be chance ({why})."


def _evidence(p_value: float | None, sure: bool, num_tunes: int) -> str:
    if p_value is None:
        return f"the 95 % intervals {'do not overlap' if sure else 'overlap'}"
    text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    return f"{text}, corrected for {num_tunes} fine-tunes" if num_tunes > 1 else text


def _pick(cached: Row, tune: Row, sure: bool) -> str:
    cached_faster = cached.seconds_total <= tune.seconds_total
    gap = seconds_text(abs(tune.seconds_total - cached.seconds_total))
    points = abs(tune.test_top1 - cached.test_top1) * 100
    if not sure and cached_faster:
        return (
            "Pick the cached head here: it costs less and nothing here shows fine-tuning to be "
            "better; more test images, more train images or other rates could."
        )
    if not sure:
        return (
            f"Pick by time here: one fine-tune saves {gap}, but the cached head wins as soon as "
            "several heads are tried."
        )
    if tune.test_top1 < cached.test_top1:
        time = f"{gap} faster" if cached_faster else f"worth its {gap} more"
        return (
            f"Pick the cached head here: {points:.1f} points better and {time}; fine-tuning would "
            "need other rates, more epochs or more data, which this run did not try."
        )
    if cached_faster:
        return (
            f"Pick fine-tuning here when {points:.1f} points of accuracy are worth {gap} more; "
            "pick the cached head for a quick answer and for trying many settings."
        )
    return (
        f"Pick fine-tuning here: {points:.1f} points better and {gap} faster; the cache pays only "
        "when many heads are tried."
    )

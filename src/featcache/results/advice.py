"""Two or three plain sentences on which mode to pick, derived from measurements.

They are a run's times on one machine and its scores on one test split. A difference in accuracy
counts only if a paired test (or, without one, the intervals) shows it to be significant;
otherwise the sentences say that there is no clear winner on accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featcache.results.learning_curve import SIGNIFICANCE
from featcache.results.metrics import beats
from featcache.results.runs import Approach, Row
from featcache.results.tables import MAJORITY, seconds_text, times_text


def advice(rows: Sequence[Row], p_values: Mapping[str, float] | None = None) -> list[str]:
    """Say which mode was faster, which more accurate, and when to pick each, here.

    The most accurate cached head is compared with the most accurate full fine-tune. As the one
    ahead is the best of several, the p value is multiplied by their number (Bonferroni), so that
    trying many settings does not make a difference look more certain than it is; taking the best of
    those behind only works against the difference. A mode is called more accurate only where it
    also beats always answering the most frequent class, and where balanced accuracy does not say
    the opposite.

    Args:
        rows: The comparison's lines.
        p_values: By a row's mode, the p value of a paired test of that mode against
            `best_of(rows, "cached")` on the same test images. A fine-tune without one is judged by
            whether the 95% intervals overlap.

    Returns:
        Three sentences; only the first when there is no fine-tune; none without a cached head.
    """
    cached, tune = best_of(rows, "cached"), best_of(rows, "finetune")
    if cached is None:
        return []
    loops = [row for row in rows if row.approach == "loop"]
    if tune is None:
        return [_speed(cached, loops)]
    match = _Match(cached, tune, rows, (p_values or {}).get(tune.mode))
    return [_speed(cached, [*loops, tune]), _accuracy(match), _pick(match)]


def best_of(rows: Sequence[Row], approach: Approach) -> Row | None:
    """The most accurate row of a kind, the fastest among equals; None where there is none."""
    some = [row for row in rows if row.approach == approach]
    return max(some, key=lambda row: (row.test_top1, -row.seconds_total), default=None)


def beside_top1(shares: Sequence[float | None], baseline_top1: float | None = None) -> str:
    """What to read beside top-1 where classes differ in size, in parentheses.

    Args:
        shares: Balanced accuracies; the text is empty where one is not known.
        baseline_top1: What answering the most frequent class every time reaches, to be named too.
    """
    if None in shares:
        return ""
    baseline = "" if baseline_top1 is None else f"; {MAJORITY}: {baseline_top1:.3f}"
    return f" (balanced accuracy {' and '.join(f'{share:.3f}' for share in shares)}{baseline})"


class _Match:
    """The best cached head against the best fine-tune, and how sure the difference is."""

    def __init__(self, cached: Row, tune: Row, rows: Sequence[Row], p_value: float | None) -> None:
        self.cached, self.tune = cached, tune
        self.num_heads = sum(row.approach == "cached" for row in rows)
        tune_ahead = tune.test_top1 >= cached.test_top1
        self.ahead, self.behind = (tune, cached) if tune_ahead else (cached, tune)
        self.num_tried = sum(row.approach == self.ahead.approach for row in rows)
        self.p_value = None if p_value is None else min(1.0, p_value * self.num_tried)
        self.useful = beats(self.ahead.test_top1, self.ahead.baseline_top1)
        ours, theirs = self.ahead.balanced_top1, self.behind.balanced_top1
        self.contradicted = ours is not None and theirs is not None and ours < theirs
        self.beyond_chance = self._beyond_chance()
        self.sure = self.beyond_chance and self.useful and not self.contradicted

    def _beyond_chance(self) -> bool:
        if self.cached.test_top1 == self.tune.test_top1:
            return False
        if self.p_value is not None:
            return self.p_value < SIGNIFICANCE
        return self.behind.test_interval[1] < self.ahead.test_interval[0]

    def name(self, row: Row) -> str:
        """The cached head by its own name only where there are several."""
        return "the cached head" if row is self.cached and self.num_heads == 1 else row.mode

    def evidence(self) -> str:
        """The evidence for or against the difference."""
        if self.p_value is None:
            return f"the 95% intervals {'do not overlap' if self.beyond_chance else 'overlap'}"
        text = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}"
        kind = "fine-tunes" if self.ahead is self.tune else "heads"
        return f"{text}, corrected for {self.num_tried} {kind}" if self.num_tried > 1 else text


def _speed(cached: Row, others: Sequence[Row]) -> str:
    again = f"each further run on the cache takes {seconds_text(cached.later_seconds)}"
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


def _accuracy(match: _Match) -> str:
    ahead, behind = match.name(match.ahead), match.name(match.behind)
    test = f"on the same {match.ahead.num_test} test images"
    scores = f"{match.ahead.test_top1:.3f} against {match.behind.test_top1:.3f} for {behind} {test}"
    balanced = ""
    if match.ahead.imbalanced:
        shares = (match.ahead.balanced_top1, match.behind.balanced_top1)
        balanced = beside_top1(shares, match.ahead.baseline_top1 if match.useful else None)
    if match.sure:
        return (
            f"More accurate: {ahead}, {scores}{balanced}; the difference is statistically "
            f"significant ({match.evidence()})."
        )
    if not match.useful:
        return (
            f"No clear winner on accuracy: {ahead} has {scores}{balanced}, and neither beats "
            f"{MAJORITY} ({match.ahead.baseline_top1:.3f})."
        )
    if match.cached.test_top1 == match.tune.test_top1:
        return (
            f"No clear winner on accuracy: {ahead} and {behind} both have "
            f"{match.tune.test_top1:.3f} {test}{balanced}."
        )
    if match.beyond_chance:
        return (
            f"No clear winner on accuracy: {ahead} has {scores} ({match.evidence()}), but by "
            f"balanced accuracy, where rare classes count as much as common ones, {behind} leads, "
            f"{match.behind.balanced_top1:.3f} against {match.ahead.balanced_top1:.3f}."
        )
    return (
        f"No clear winner on accuracy: {ahead} has {scores}{balanced}, which may be chance "
        f"({match.evidence()})."
    )


def _pick(match: _Match) -> str:
    if not match.useful:
        return "Pick neither yet: try more train images or other weights first."
    if match.beyond_chance and not match.sure:
        common, rare = match.name(match.ahead), match.name(match.behind)
        return (
            f"Pick {common} if every image matters equally, {rare} if every class does; more "
            "images of the rare classes could settle it."
        )
    return _pick_by_time(match.cached, match.tune, match.sure)


def _pick_by_time(cached: Row, tune: Row, sure: bool) -> str:
    cached_faster = cached.seconds_total <= tune.seconds_total
    gap = seconds_text(abs(tune.seconds_total - cached.seconds_total))
    points = abs(tune.test_top1 - cached.test_top1) * 100
    if not sure and cached_faster:
        return (
            "Pick the cached head here: it takes less time, and nothing here shows that "
            "fine-tuning is better; more test images, train images or learning rates could."
        )
    if not sure:
        return (
            f"Pick by time here: a single fine-tune is {gap} faster, but the cached head wins as "
            "soon as you try several heads."
        )
    if tune.test_top1 < cached.test_top1:
        time = f"{gap} faster" if cached_faster else f"worth its {gap} more"
        return (
            f"Pick the cached head here: {points:.1f} percentage points better and {time}; this "
            "run did not try other learning rates, more epochs or more data for fine-tuning."
        )
    if cached_faster:
        return (
            f"Pick fine-tuning here if {points:.1f} percentage points of accuracy are worth {gap} "
            "more; pick the cached head for a quick answer and for trying many settings."
        )
    return (
        f"Pick fine-tuning here: {points:.1f} percentage points better and {gap} faster; the cache "
        "pays off only if you try many heads."
    )


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

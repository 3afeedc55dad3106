"""Where two learning curves cross, and advice from that: which mode to pick, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from featcache.results.advice import beside_top1
from featcache.results.learning_curve import NAMES, SIGNIFICANCE, CurveMode, CurvePoint, size_text
from featcache.results.tables import MAJORITY, seconds_text


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Whether one curve overtakes the other within the data.

    `kind` is crosses (a significant lead on either side), none (one mode leads significantly at
    the largest size, and the other at none), level (a significant lead is lost before the
    largest size), repeated (the lead changes more than once), or undecided. `before` and `after`
    are the sizes between which the curves cross, `num_train` where by interpolation over the
    logarithm of the number of images; `leader` leads at the larger sizes.
    """

    kind: Literal["crosses", "none", "level", "repeated", "undecided"]
    leader: CurveMode | None = None
    before: str | None = None
    after: str | None = None
    num_train: int | None = None


def crossing(points: Sequence[CurvePoint]) -> Crossing:
    """Find where one mode overtakes the other."""
    measured = [point for point in points if point.difference is not None]
    decided = [p for p in measured if p.verdict in ("cached", "finetune")]
    if not decided:
        return Crossing(kind="undecided")
    last = decided[-1]
    leader: CurveMode = "cached" if last.verdict == "cached" else "finetune"
    changes = [(a, b) for a, b in pairwise(decided) if a.verdict != b.verdict]
    if len(changes) > 1:
        return Crossing(kind="repeated", leader=leader)
    if changes:
        before, after = changes[0]
        inner = measured[measured.index(before) : measured.index(after) + 1]
        return Crossing(
            kind="crosses", leader=leader, before=before.size, after=after.size,
            num_train=_meeting(inner),
        )  # fmt: skip
    return Crossing(kind="none" if last is measured[-1] else "level", leader=leader)


def _meeting(points: Sequence[CurvePoint]) -> int | None:
    """Train images at which the difference is zero, on straight lines over log images."""
    for a, b in pairwise(points):
        left, right = a.difference, b.difference
        if left is None or right is None or left * right > 0 or left == right:
            continue
        share = left / (left - right)
        log = math.log(a.num_train) + share * (math.log(b.num_train) - math.log(a.num_train))
        return round(math.exp(log))
    return None


def curve_advice(points: Sequence[CurvePoint]) -> list[str]:
    """Say which mode is better with most images, whether that changes with fewer, and the cost.

    Args:
        points: From `curve_points`.

    Returns:
        Three statements; none where no size was measured in both modes.
    """
    measured = [point for point in points if point.difference is not None]
    if not measured:
        return []
    return [_accuracy(points, measured), _switch(measured, crossing(measured)), _cost(measured[-1])]


def _sizes(points: Sequence[CurvePoint]) -> str:
    """Sizes in words: "5 and 20 per class and all 2,000 images"."""
    few = [point.size for point in points if point.size != "all"]
    words = [f"{_and(few)} per class"] if few else []
    words += [size_text(point) for point in points if point.size == "all"]
    return _and(words)


def _and(words: Sequence[str]) -> str:
    if len(words) < 3:
        return " and ".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _accuracy(points: Sequence[CurvePoint], measured: Sequence[CurvePoint]) -> str:
    """Who is ahead with most train images, which most users have, and then with fewer."""
    last, largest = measured[-1], max(points, key=lambda point: point.num_train)
    text = f"With {size_text(last)}, {_standing(last, len(measured))}"
    if largest is not last:
        missing = NAMES["finetune" if largest.finetune is None else "cached"]
        text = (
            f"{missing[0].upper()}{missing[1:]} with {size_text(largest)} was not measured. {text}"
        )
    smaller = _smaller(measured[:-1])
    return f"{text}; with fewer, {smaller}." if smaller else f"{text}."


def _standing(point: CurvePoint, num_tests: int) -> str:
    """Both modes' accuracy at one size, and whether it decides."""
    assert point.cached is not None
    assert point.finetune is not None
    sides = {"finetune": point.finetune, "cached": point.cached}
    ahead = point.ahead
    behind = _other(ahead)
    ours, theirs = sides[ahead], sides[behind]
    p_value = point.p_value or 0.0
    chance = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    chance += f", corrected for {num_tests} sizes" if num_tests > 1 else ""
    test = f"on the same {point.num_test:,} test images"
    shares = (ours.balanced_top1, theirs.balanced_top1)
    baseline = point.baseline_top1 if point.useful else None
    shown = beside_top1(shares, baseline) if point.imbalanced else ""
    both = f"{NAMES[ahead]} has {ours.top1:.3f} and {NAMES[behind]} {theirs.top1:.3f}"
    if point.verdict == ahead:
        return (
            f"{NAMES[ahead]} is more accurate: {ours.top1:.3f} against {theirs.top1:.3f} for "
            f"{NAMES[behind]} {test}, a significant difference ({chance}){shown}"
        )
    if not point.useful:
        return f"neither mode beats {MAJORITY} ({point.baseline_top1:.3f}): {both} {test}{shown}"
    if point.contradicted and p_value < SIGNIFICANCE:
        return (
            f"there is no clear winner on accuracy: {both} {test} ({chance}), but {NAMES[behind]} "
            f"leads by balanced accuracy, where rare classes count as much as common ones{shown}"
        )
    if ours.top1 == theirs.top1:
        return (
            f"there is no clear winner on accuracy: both modes have {ours.top1:.3f} {test}{shown}"
        )
    why = "which may be chance" if p_value >= SIGNIFICANCE else "but not with every seed"
    return f"there is no clear winner on accuracy: {both} {test}, {why} ({chance}){shown}"


def _smaller(points: Sequence[CurvePoint]) -> str:
    """The same of the sizes below the largest, in short."""
    leaders: list[CurveMode] = ["cached", "finetune"]
    parts = []
    for mode in leaders:
        won = [point for point in points if point.verdict == mode]
        if won:
            parts.append(f"{NAMES[mode]} leads significantly ({_sizes(won)})")
    lost = [point for point in points if point.verdict == "undecided" and not point.useful]
    if lost:
        parts.append(f"neither beats {MAJORITY} ({_sizes(lost)})")
    open_ = [point for point in points if point.verdict == "undecided" and point.useful]
    if open_:
        parts.append(f"there is no clear winner ({_sizes(open_)})")
    return _and(parts)


def _switch(measured: Sequence[CurvePoint], found: Crossing) -> str:
    last = measured[-1]
    if found.kind == "crosses":
        return _crosses(measured, found)
    if found.kind == "repeated":
        return (
            "The lead changes more than once, so no single rule fits: rely on the size closest "
            "to yours, and repeat it with more seeds."
        )
    if len(measured) == 1:
        advice = _by_cost(last) if found.leader is None else _pick_leader(last, found.leader)
        return f"One size does not show whether the curves cross: {advice}."
    if found.leader is None:
        return f"These results do not show whether the curves cross: {_by_cost(last)}."
    lead, other = NAMES[found.leader], NAMES[_other(found.leader)]
    if found.kind == "level":
        return f"{_lead_in_doubt(last, found.leader)}: {_by_cost(last)}."
    return (
        f"The curves do not cross within the data: {lead} stays ahead of {other} up to "
        f"{size_text(last)}, so {_pick_leader(last, found.leader)}."
    )


def _lead_in_doubt(last: CurvePoint, leader: CurveMode) -> str:
    """The lead was significant with fewer images, and is not with most."""
    lead, gain = NAMES[leader], last.difference or 0.0
    if (gain > 0) == (leader == "finetune") and gain:
        return (
            f"The curves do not cross within the data: {lead} is ahead with {size_text(last)} too, "
            f"by {abs(gain) * 100:.1f} percentage points, but that may be chance"
        )
    return (
        f"The curves do not cross significantly within the data, but {lead} loses its lead with "
        f"{size_text(last)}"
    )


def _crosses(measured: Sequence[CurvePoint], found: Crossing) -> str:
    assert found.leader is not None
    last = measured[-1]
    by_size = {point.size: point for point in measured}
    before, after = by_size[found.before or ""], by_size[found.after or ""]
    near = f", at about {found.num_train:,} images in total" if found.num_train else ""
    above = (
        _pick_leader(last, found.leader)
        if last.verdict == found.leader
        else f"pick {NAMES[found.leader]}"
    )
    return (
        f"The curves cross between {size_text(before)} and {size_text(after)}{near}: with fewer, "
        f"pick {NAMES[_other(found.leader)]}; with more, {above}."
    )


def _other(mode: CurveMode) -> CurveMode:
    return "finetune" if mode == "cached" else "cached"


def _pick_leader(last: CurvePoint, leader: CurveMode) -> str:
    """What to do where one mode leads significantly, as part of a sentence."""
    assert last.cached is not None
    assert last.finetune is not None
    points = abs(last.difference or 0.0) * 100
    more = last.finetune.cost_seconds - last.cached.cost_seconds
    gap = seconds_text(abs(more))
    if leader == "cached":
        time = f"and {gap} less" if more > 0 else f"for {gap} more"
        return f"pick the cached head: {points:.1f} percentage points better {time}"
    if more > 0:
        return f"pick fine-tuning if {points:.1f} percentage points are worth {gap} more"
    return f"pick fine-tuning: {points:.1f} percentage points better and {gap} less"


def _by_cost(last: CurvePoint) -> str:
    """What to do where there is no clear winner on accuracy, as part of a sentence."""
    if not last.useful:
        return "pick neither yet, and try more train images or other weights first"
    assert last.cached is not None
    assert last.finetune is not None
    cached_cheaper = last.cached.cost_seconds <= last.finetune.cost_seconds
    cheaper = NAMES["cached" if cached_cheaper else "finetune"]
    gap = seconds_text(abs(last.finetune.cost_seconds - last.cached.cost_seconds))
    return f"pick {cheaper}, which costs {gap} less; more test images or seeds could settle it"


def _cost(last: CurvePoint) -> str:
    """Seconds of both modes at the largest size, per trial and per point."""
    assert last.cached is not None
    assert last.finetune is not None
    cached, tuned = last.cached, last.finetune
    once = seconds_text(cached.cost_seconds - cached.trial_seconds)
    text = (
        f"With {size_text(last)}, a first cached head takes {seconds_text(cached.cost_seconds)} "
        f"({once} of it extraction), every further one {seconds_text(cached.trial_seconds)}, a "
        f"fine-tune {seconds_text(tuned.cost_seconds)}: {_pays(last)}"
    )
    per_point = last.seconds_per_point
    if per_point is not None and last.verdict == "finetune":
        gain = f"each percentage point that fine-tuning gains costs {seconds_text(per_point)}"
        return f"{text}, and {gain}."
    return f"{text}."


def _pays(last: CurvePoint) -> str:
    trials = last.pays_after_trials
    if trials is None:
        return "the cache never pays for itself, because a head takes as long as a fine-tune"
    if trials == 1:
        return "the cache pays for itself with the first head"
    return f"the cache pays for itself after {trials:,} heads"

"""Where two learning curves cross, and advice from that: which mode to pick, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from featcache.results.advice import beside_top1
from featcache.results.forecast import forecasts
from featcache.results.learning_curve import NAMES, SIGNIFICANCE, CurveMode, CurvePoint, size_text
from featcache.results.metrics import samples_to_decide
from featcache.results.tables import MAJORITY, minutes_text


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


def curve_advice(points: Sequence[CurvePoint], price_per_hour: float | None = None) -> list[str]:
    """Say which mode is better with most images, whether that changes with fewer, and the cost.

    Args:
        points: From `curve_points`.
        price_per_hour: What an hour of the machine costs, in any currency.

    Returns:
        Three statements, then those that can be made: on what the cached head learned from, on the
        tail, on a second test set, on more train images; none where no size was measured in both
        modes.
    """
    measured = [point for point in points if point.difference is not None]
    if not measured:
        return []
    last = measured[-1]
    more = [_features(last), _tail(last), _shifted(last), _with_more_images(points)]
    return [
        _accuracy(points, measured),
        _switch(measured, crossing(measured)),
        _cost(last, price_per_hour),
        *(line for line in more if line),
    ]


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
        advice = _by_cost(last, 1) if found.leader is None else _pick_leader(last, found.leader)
        return f"One size does not show whether the curves cross: {advice}."
    if found.leader is None:
        return (
            f"These results do not show whether the curves cross: {_by_cost(last, len(measured))}."
        )
    lead, other = NAMES[found.leader], NAMES[_other(found.leader)]
    if found.kind == "level":
        return f"{_lead_in_doubt(last, found.leader)}: {_by_cost(last, len(measured))}."
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
    gap = minutes_text(abs(more))
    if leader == "cached":
        time = f"and {gap} less" if more > 0 else f"for {gap} more"
        return f"pick the cached head: {points:.1f} percentage points better {time}"
    if more > 0:
        return f"pick fine-tuning if {points:.1f} percentage points are worth {gap} more"
    return f"pick fine-tuning: {points:.1f} percentage points better and {gap} less"


def _by_cost(last: CurvePoint, num_tests: int) -> str:
    """What to do where there is no clear winner on accuracy, as part of a sentence."""
    if not last.useful:
        return "pick neither yet, and try more train images or other weights first"
    assert last.cached is not None
    assert last.finetune is not None
    cached_cheaper = last.cached.cost_seconds <= last.finetune.cost_seconds
    cheaper = NAMES["cached" if cached_cheaper else "finetune"]
    gap = minutes_text(abs(last.finetune.cost_seconds - last.cached.cost_seconds))
    return f"pick {cheaper}, which costs {gap} less; {_to_decide(last, num_tests)}"


def _to_decide(last: CurvePoint, num_tests: int) -> str:
    """What could settle an undecided comparison, as part of a sentence."""
    by_chance = last.p_value is not None and last.p_value >= SIGNIFICANCE
    if not by_chance or last.only_cached is None or last.only_finetune is None:
        return "more test images or seeds could settle it"
    needed = samples_to_decide(
        last.only_cached, last.only_finetune, last.num_test, significance=SIGNIFICANCE / num_tests
    )
    if needed is None or needed <= last.num_test:
        return "more test images or seeds could settle it"
    return (
        f"about {_rounded(needed - last.num_test)} more test images would settle it with a "
        "probability of 80%, if the modes differ as much as here"
    )


def _rounded(number: int) -> str:
    """Two significant digits, since it is an estimate."""
    return f"{int(float(f'{number:.2g}')):,}"


def _cost(last: CurvePoint, price_per_hour: float | None) -> str:
    """What both modes cost at the largest size now, per further experiment, and per point."""
    assert last.cached is not None
    assert last.finetune is not None
    cached, tuned = last.cached, last.finetune
    once = minutes_text(cached.cost_seconds - cached.trial_seconds)
    text = (
        f"With {size_text(last)}, a first cached head takes {minutes_text(cached.cost_seconds)} "
        f"({once} of it extraction), every further experiment {minutes_text(cached.trial_seconds)},"
        f" a fine-tune {minutes_text(tuned.cost_seconds)} each time: {_pays(last)}"
    )
    per_point = last.seconds_per_point
    if per_point is not None and last.verdict == "finetune":
        gain = f"each percentage point that fine-tuning gains costs {minutes_text(per_point)}"
        text = f"{text}, and {gain}"
    if price_per_hour is None:
        return f"{text}."
    first, again, tune = (
        f"{seconds / 3600 * price_per_hour:.2g}"
        for seconds in (cached.cost_seconds, cached.trial_seconds, tuned.cost_seconds)
    )
    return (
        f"{text}. At {price_per_hour:g} an hour that is {first} for the first head, {again} for "
        f"every further one, and {tune} for each fine-tune."
    )


def _features(last: CurvePoint) -> str:
    """What the cached head learned from, and by which held-out scores it was chosen."""
    side = last.cached
    if side is None or not side.features or len(side.held_out) < 2:
        return ""
    chosen = next(iter(side.features))
    others = [f"{name} {top1:.3f}" for name, top1 in side.held_out.items() if name != chosen]
    seeds = sum(side.features.values())
    often = f" with {side.features[chosen]} of {seeds} seeds" if len(side.features) > 1 else ""
    return (
        f"With {size_text(last)}, the cached head uses {chosen}{often}, chosen by accuracy on "
        f"held-out train images: {side.held_out.get(chosen, math.nan):.3f}, against "
        f"{_and(others)}."
    )


def _tail(last: CurvePoint) -> str:
    """The third way, if it was tried."""
    tail, tuned = last.tail, last.finetune
    if tail is None or tuned is None:
        return ""
    low, high = tail.interval
    return (
        f"With {size_text(last)}, the tail of the network alone, trained from cached activations, "
        f"has {tail.top1:.3f} [{low:.3f}, {high:.3f}] against {tuned.top1:.3f} for fine-tuning, in "
        f"{minutes_text(tail.cost_seconds)} ({minutes_text(tail.trial_seconds)} for every further "
        f"experiment) against {minutes_text(tuned.cost_seconds)}."
    )


def _shifted(last: CurvePoint) -> str:
    """Both modes on the second test set, and whether that changes who is ahead."""
    if last.cached is None or last.finetune is None or last.num_shifted is None:
        return ""
    head, tune, p_value = last.cached.shifted_top1, last.finetune.shifted_top1, last.shifted_p_value
    if head is None or tune is None or p_value is None:
        return ""
    gains = [score - side.top1 for score, side in ((head, last.cached), (tune, last.finetune))]
    if p_value < SIGNIFICANCE:
        leader: CurveMode = "cached" if head > tune else "finetune"
        chance = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
        verdict = f"{NAMES[leader]} is significantly more accurate there ({chance})"
        if last.verdict == _other(leader):
            verdict += ", unlike on the first test set"
    else:
        verdict = f"there is no clear winner there (p = {p_value:.2g})"
    return (
        f"On the second, shifted test set ({last.num_shifted:,} images), the cached head has "
        f"{head:.3f} ({_signed(gains[0])} percentage points) and fine-tuning {tune:.3f} "
        f"({_signed(gains[1])}): {verdict}."
    )


def _signed(gain: float) -> str:
    return f"{100 * gain:+.1f}".replace("-", "−")


def _with_more_images(points: Sequence[CurvePoint]) -> str:
    """Where the extrapolated curves arrive."""
    ends = {found.mode: found for found in forecasts(points)}
    texts = [
        f"{NAMES[mode]} about {end.top1:.2f} with {end.num_train:,} images (80% interval "
        f"{end.interval[0]:.2f} to {end.interval[1]:.2f})"
        for mode, end in ends.items()
    ]
    if not texts:
        return ""
    return f"If the curves go on as measured, four times the data gives {_and(texts)}."


def _pays(last: CurvePoint) -> str:
    trials = last.pays_after_trials
    if trials is None:
        return "the cache never pays for itself, because a head takes as long as a fine-tune"
    if trials == 1:
        return "the cache pays for itself with the first head"
    return f"the cache pays for itself after {trials:,} heads"

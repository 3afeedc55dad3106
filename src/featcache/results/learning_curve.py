"""From single runs to the points of a learning curve, each with a paired test.

Both modes of a point learned from the same images and were scored on the same test images. Over
several seeds, every test image still counts once: what is tested is whether more images were
classified rightly more often by one mode than by the other. Counting an image once per seed would
take the same image for several independent ones and make chance look sure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featcache.results.advice import beats
from featcache.results.metrics import balanced, imbalanced, majority, mcnemar, wilson_interval
from featcache.results.tables import break_even

LEVEL = 0.05

Mode = Literal["cached", "finetune"]
Verdict = Literal["cached", "finetune", "undecided", "unmeasured"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One run of one mode.

    Attributes:
        mode: What was trained.
        size: Train images per class as text, or "all".
        num_train: Train images.
        seed: Which draw of train images.
        labels: Classes of the test images, [N] int64.
        predicted: What the classifier said, [N] int64.
        cost_seconds: What the classifier costs from labelled images on: reading, extraction of its
            train images where there is one, choosing and training; scoring is left out.
        trial_seconds: What another try costs; with a cache, all but the extraction.
    """

    mode: Mode
    size: str
    num_train: int
    seed: int
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    cost_seconds: float
    trial_seconds: float

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each test image was classified rightly, [N]."""
        return np.asarray(self.labels == self.predicted)

    @property
    def balanced_top1(self) -> float:
        """Mean recall over the classes that have test images."""
        num_classes = 1 + int(max(self.labels.max(), self.predicted.max()))
        return balanced(self.labels, self.predicted, num_classes)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One mode at one size, over its seeds.

    `top1` is the mean of `top1_by_seed`; `interval` is its 95 % interval over test images, each
    counted once, so that seeds do not narrow it; `balanced_top1`, the mean recall over classes, and
    seconds are means over seeds too. Files of 0.1.0 have no `balanced_top1`.
    """

    top1: float
    interval: tuple[float, float]
    top1_by_seed: dict[int, float]
    cost_seconds: float
    trial_seconds: float
    balanced_top1: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """Both modes at one size.

    `p_value` is that of the paired test, corrected for the number of sizes (Holm); `verdict` names
    the more accurate mode where the difference is beyond chance, every seed agrees, the mode is
    `useful`, and balanced accuracy does not say the opposite. `baseline_top1` is what answering the
    most frequent class of the test images reaches (None in files of 0.1.0); `imbalanced` tells
    whether that class is so common that balanced accuracy has to be read too.
    """

    size: str
    num_train: int
    num_test: int
    cached: Side | None
    finetune: Side | None
    p_value: float | None
    verdict: Verdict
    baseline_top1: float | None = None
    imbalanced: bool = False

    @property
    def ahead(self) -> Mode:
        """The mode with the higher top-1, by chance or not; the cached head of two equal ones."""
        return "finetune" if (self.difference or 0.0) > 0 else "cached"

    @property
    def useful(self) -> bool:
        """Whether the mode ahead beats always answering the most frequent class."""
        side = self.finetune if self.ahead == "finetune" else self.cached
        return side is None or beats(side.top1, self.baseline_top1)

    @property
    def contradicted(self) -> bool:
        """Whether the mode ahead by top-1 is behind by balanced accuracy."""
        if self.cached is None or self.finetune is None:
            return False
        ours, theirs = self.finetune.balanced_top1, self.cached.balanced_top1
        if ours is None or theirs is None:
            return False
        return ours < theirs if self.ahead == "finetune" else theirs < ours

    @property
    def difference(self) -> float | None:
        """Top-1 of the fine-tune less that of the cached head."""
        if self.cached is None or self.finetune is None:
            return None
        return self.finetune.top1 - self.cached.top1

    @property
    def seconds_per_point(self) -> float | None:
        """Further seconds for each further point (hundredth) of accuracy that fine-tuning brings.

        None where it brings none, or costs nothing more.
        """
        gain = self.difference
        if self.cached is None or self.finetune is None or not gain or gain < 0:
            return None
        more = self.finetune.cost_seconds - self.cached.cost_seconds
        return more / (100 * gain) if more > 0 else None

    @property
    def pays_after_trials(self) -> int | None:
        """Head trials after which the cache has cost less than as many fine-tunes; None: never."""
        if self.cached is None or self.finetune is None:
            return None
        once = self.cached.cost_seconds - self.cached.trial_seconds
        return break_even(once, self.cached.trial_seconds, self.finetune.trial_seconds)


def curve_points(cells: Iterable[Cell]) -> list[Point]:
    """Put runs together by size, fewest images first.

    Where both modes have runs of the same seeds, only those count, so that both have seen the same
    images.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.size, []).append(cell)
    found = sorted(groups.values(), key=lambda group: (group[0].num_train, group[0].size))
    pairs = [_paired(group) for group in found]
    raw = [_p_value(*pair) for pair in pairs]
    return [_point(*pair, p) for pair, p in zip(pairs, holm(raw), strict=True)]


def _paired(group: Sequence[Cell]) -> tuple[dict[int, Cell], dict[int, Cell]]:
    cached = {cell.seed: cell for cell in group if cell.mode == "cached"}
    tuned = {cell.seed: cell for cell in group if cell.mode == "finetune"}
    common = cached.keys() & tuned.keys()
    if common:
        cached = {seed: cached[seed] for seed in sorted(common)}
        tuned = {seed: tuned[seed] for seed in sorted(common)}
    return cached, tuned


def _p_value(cached: dict[int, Cell], tuned: dict[int, Cell]) -> float | None:
    """Of the sign test on images; with one seed that is McNemar's test."""
    if not cached.keys() & tuned.keys():
        return None
    balance = sum(tuned[s].correct.astype(np.int64) - cached[s].correct for s in cached)
    return mcnemar(np.asarray(balance) > 0, np.asarray(balance) < 0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the chance that any of several true zeros looks like a difference.

    Args:
        p_values: Uncorrected; None where there was no test.

    Returns:
        Corrected, in the same order.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, i) in enumerate(tested):
        worst = max(worst, min(1.0, p * (len(tested) - rank)))
        corrected[i] = worst
    return corrected


def _point(cached: dict[int, Cell], tuned: dict[int, Cell], p_value: float | None) -> Point:
    some = next(iter((cached or tuned).values()))
    point = Point(
        size=some.size,
        num_train=some.num_train,
        num_test=len(some.correct),
        cached=_side(cached),
        finetune=_side(tuned),
        p_value=p_value,
        verdict=_verdict(cached, tuned, p_value),
        baseline_top1=majority(some.labels),
        imbalanced=imbalanced(some.labels),
    )
    sound = point.useful and not point.contradicted
    return point if sound or p_value is None else replace(point, verdict="undecided")


def _side(cells: dict[int, Cell]) -> Side | None:
    if not cells:
        return None
    by_seed = {seed: float(cell.correct.mean()) for seed, cell in cells.items()}
    mean, num_test = float(np.mean(list(by_seed.values()))), len(next(iter(cells.values())).correct)
    return Side(
        top1=mean,
        interval=wilson_interval(round(mean * num_test), num_test),
        top1_by_seed=by_seed,
        cost_seconds=float(np.mean([cell.cost_seconds for cell in cells.values()])),
        trial_seconds=float(np.mean([cell.trial_seconds for cell in cells.values()])),
        balanced_top1=float(np.mean([cell.balanced_top1 for cell in cells.values()])),
    )


def _verdict(cached: dict[int, Cell], tuned: dict[int, Cell], p_value: float | None) -> Verdict:
    if p_value is None:
        return "unmeasured"
    gains = [int(tuned[s].correct.sum()) - int(cached[s].correct.sum()) for s in cached]
    if p_value >= LEVEL or not (min(gains) > 0 or max(gains) < 0):
        return "undecided"
    return "finetune" if gains[0] > 0 else "cached"


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Whether one curve overtakes the other within the data.

    `kind` is crosses (a lead beyond chance on either side), none (one mode leads beyond chance at
    the largest size, and the other at none), level (a lead beyond chance is lost before the
    largest size), repeated (the lead changes more than once), or undecided. `before` and `after`
    are the sizes between which the curves cross, `num_train` where by interpolation over the
    logarithm of the number of images; `leader` leads at the larger sizes.
    """

    kind: Literal["crosses", "none", "level", "repeated", "undecided"]
    leader: Mode | None = None
    before: str | None = None
    after: str | None = None
    num_train: int | None = None


def crossing(points: Sequence[Point]) -> Crossing:
    """Find where the lead changes hands."""
    measured = [point for point in points if point.difference is not None]
    decided = [p for p in measured if p.verdict in ("cached", "finetune")]
    if not decided:
        return Crossing(kind="undecided")
    last = decided[-1]
    leader: Mode = "cached" if last.verdict == "cached" else "finetune"
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


def _meeting(points: Sequence[Point]) -> int | None:
    """Train images at which the difference is zero, on straight lines over log images."""
    for a, b in pairwise(points):
        left, right = a.difference, b.difference
        if left is None or right is None or left * right > 0 or left == right:
            continue
        share = left / (left - right)
        log = math.log(a.num_train) + share * (math.log(b.num_train) - math.log(a.num_train))
        return round(math.exp(log))
    return None

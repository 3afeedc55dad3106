"""From single runs to the points of a learning curve, each with a paired test.

Both modes of a point learned from the same images and were scored on the same test images. Over
several seeds, every test image still counts once: the test asks whether one mode
classifies more images correctly more often than the other. Counting an image once per seed would
treat it as several independent images and make chance look significant.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from featcache.config import JsonObject
from featcache.errors import UserError
from featcache.results.metrics import (
    balanced,
    beats,
    imbalanced,
    majority,
    mcnemar,
    wilson_interval,
)
from featcache.results.runs import RunReport, break_even

SIGNIFICANCE = 0.05

CurveMode = Literal["cached", "tail", "finetune"]
Verdict = Literal["cached", "finetune", "undecided", "unmeasured"]
NAMES: dict[CurveMode, str] = {"cached": "the cached head", "finetune": "fine-tuning"}
"""Of the two modes that are tested against each other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveRun:
    """One run of one mode.

    Attributes:
        mode: What was trained.
        size: Train images per class as text, or "all".
        num_train: Train images.
        seed: Which draw of train images.
        labels: Classes of the test images, [N] int64.
        predicted: Predicted classes, [N] int64.
        cost_seconds: What the classifier costs from labeled images on: reading, extraction of its
            train images where there is one, choosing and training; scoring is left out.
        trial_seconds: What another try costs; with a cache, all but the extraction.
        features: What a cached head learned from, in words, where it had a choice.
        held_out: The held-out accuracies that decided, by such words.
        shifted_correct: Whether each image of a second test set was classified correctly, [M].
    """

    mode: CurveMode
    size: str
    num_train: int
    seed: int
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    cost_seconds: float
    trial_seconds: float
    features: str = ""
    held_out: dict[str, float] = field(default_factory=dict)
    shifted_correct: NDArray[np.bool_] | None = None

    @classmethod
    def from_report(cls, report: RunReport) -> Self:
        """Read a run of a comparison from its report.

        Raises:
            UserError: The report is not one of a comparison, or is damaged.
        """
        try:
            stored = report.more["cell"]
            assert report.test is not None
            assert report.test.labels
            if stored["mode"] not in get_args(CurveMode):
                raise ValueError(f"mode {stored['mode']!r:.40}")
            cost, trial = float(stored["cost_seconds"]), float(stored["trial_seconds"])
            if not math.isfinite(cost + trial):
                raise ValueError("seconds are not finite")
            return cls(
                mode=stored["mode"],
                size=str(stored["size"]),
                num_train=int(report.more["num_train"]),
                seed=int(stored["seed"]),
                labels=np.array(report.test.labels, np.int64),
                predicted=np.array(report.test.predicted, np.int64),
                cost_seconds=cost,
                trial_seconds=trial,
                **_choice(report),
                shifted_correct=_shifted_correct(report),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
            raise UserError(f"not a run of a comparison: {error}") from error

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each test image was classified correctly, [N]."""
        return np.asarray(self.labels == self.predicted)

    @property
    def balanced_top1(self) -> float:
        """Mean recall over the classes that have test images."""
        num_classes = 1 + int(max(self.labels.max(), self.predicted.max()))
        return balanced(self.labels, self.predicted, num_classes)


def _choice(report: RunReport) -> JsonObject:
    """What a cached head learned from, if it had a choice."""
    alternatives = report.more.get("alternatives") or []
    if len(alternatives) < 2:
        return {}
    held_out = {str(a["features"]): a["val_top1"] for a in alternatives}
    return {
        "features": str(report.more["features"]),
        "held_out": {name: float(top1) for name, top1 in held_out.items() if top1 is not None},
    }


def _shifted_correct(report: RunReport) -> NDArray[np.bool_] | None:
    shifted = report.more.get("shifted")
    if shifted is None:
        return None
    labels, predicted = (np.array(shifted[name], np.int64) for name in ("labels", "predicted"))
    if labels.shape != predicted.shape or not labels.size:
        raise ValueError(f"{labels.shape} labels, {predicted.shape} predictions")
    return np.asarray(labels == predicted)


@dataclass(frozen=True, kw_only=True)
class ModeScores:
    """One mode at one size, over its seeds.

    `top1` is the mean of `top1_by_seed`; `interval` is its 95% interval over test images, each
    counted once, so that seeds do not narrow it; `balanced_top1`, the mean recall over classes, and
    seconds are means over seeds too. Files of 0.1.0 have no `balanced_top1`. `features` counts the
    seeds by what their cached head learned from, and `held_out` has the mean held-out accuracies
    that decided; both are empty where there was no choice. `shifted_top1` is the mean accuracy on a
    second test set.
    """

    top1: float
    interval: tuple[float, float]
    top1_by_seed: dict[int, float]
    cost_seconds: float
    trial_seconds: float
    balanced_top1: float | None = None
    features: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    shifted_top1: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Both modes at one size.

    `p_value` is that of the paired test, corrected for the number of sizes (Holm); `verdict` names
    the more accurate mode if the difference is significant, every seed agrees, the mode is
    `useful`, and balanced accuracy does not say the opposite. `baseline_top1` is what answering the
    most frequent class of the test images reaches (None in files of 0.1.0); `imbalanced` tells
    whether that class is so common that balanced accuracy has to be read too. `only_cached` and
    `only_finetune` count the test images that one mode classifies correctly more often than the
    other. `num_shifted` and `shifted_p_value` are of a second test set, if there is one. `tail` is
    a third way, trained from cached activations; it takes no part in the tests.
    """

    size: str
    num_train: int
    num_test: int
    cached: ModeScores | None
    finetune: ModeScores | None
    p_value: float | None
    verdict: Verdict
    baseline_top1: float | None = None
    imbalanced: bool = False
    only_cached: int | None = None
    only_finetune: int | None = None
    num_shifted: int | None = None
    shifted_p_value: float | None = None
    tail: ModeScores | None = None

    def scores(self, mode: CurveMode) -> ModeScores | None:
        """Those of a mode; None if it was not measured."""
        return {"cached": self.cached, "tail": self.tail, "finetune": self.finetune}[mode]

    @property
    def ahead(self) -> CurveMode:
        """The mode with the higher top-1, by chance or not; the cached head of two equal ones."""
        return "finetune" if (self.difference or 0.0) > 0 else "cached"

    @property
    def useful(self) -> bool:
        """Whether the mode ahead beats always answering the most frequent class."""
        side = self.scores(self.ahead)
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
        """Additional seconds for each percentage point of accuracy that fine-tuning gains.

        None if it gains none, or takes no longer.
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


def size_text(point: CurvePoint) -> str:
    """A size for people: "20 per class", or "all 2,000 images"."""
    return f"all {point.num_train:,} images" if point.size == "all" else f"{point.size} per class"


def curve_points(runs: Iterable[CurveRun]) -> list[CurvePoint]:
    """Group runs by size, fewest images first.

    Where both modes have runs with the same seeds, only those count, so that both modes have seen
    the same images.
    """
    groups: dict[str, list[CurveRun]] = {}
    for run in runs:
        groups.setdefault(run.size, []).append(run)
    compared = [group for group in groups.values() if any(run.mode != "tail" for run in group)]
    found = sorted(compared, key=lambda group: (group[0].num_train, group[0].size))
    pairs = [_paired(group) for group in found]
    tests = [_SignTest.of(*pair) for pair in pairs]
    shifted = [_SignTest.of(*pair, shifted=True) for pair in pairs]
    corrected, on_shifted = (
        holm([None if test is None else test.p_value for test in each]) for each in (tests, shifted)
    )
    points = [
        _curve_point(*pair, test, p, p_shifted)
        for pair, test, p, p_shifted in zip(pairs, tests, corrected, on_shifted, strict=True)
    ]
    tails = [
        {run.seed: run for run in group if run.mode == "tail" and run.seed in (cached or tuned)}
        for group, (cached, tuned) in zip(found, pairs, strict=True)
    ]
    return [
        dataclasses.replace(point, tail=_mode_scores(tail))
        for point, tail in zip(points, tails, strict=True)
    ]


def _paired(group: Sequence[CurveRun]) -> tuple[dict[int, CurveRun], dict[int, CurveRun]]:
    cached = {run.seed: run for run in group if run.mode == "cached"}
    tuned = {run.seed: run for run in group if run.mode == "finetune"}
    common = cached.keys() & tuned.keys()
    if common:
        cached = {seed: cached[seed] for seed in sorted(common)}
        tuned = {seed: tuned[seed] for seed in sorted(common)}
    return cached, tuned


@dataclass(frozen=True, kw_only=True)
class _SignTest:
    """The sign test on images; with one seed that is McNemar's test.

    The counts are of images that one mode classifies correctly more often than the other.
    """

    only_cached: int
    only_finetune: int
    p_value: float

    @classmethod
    def of(
        cls, cached: dict[int, CurveRun], tuned: dict[int, CurveRun], *, shifted: bool = False
    ) -> Self | None:
        """Test runs with the same seeds on the test images, or on those of the second test set."""
        balance: NDArray[np.int64] | None = None
        for seed in cached.keys() & tuned.keys():
            pair = (cached[seed], tuned[seed])
            head, tune = (run.shifted_correct if shifted else run.correct for run in pair)
            if head is None or tune is None:
                return None
            gain = tune.astype(np.int64) - head
            balance = gain if balance is None else balance + gain
        if balance is None:
            return None
        return cls(
            only_cached=int((balance < 0).sum()),
            only_finetune=int((balance > 0).sum()),
            p_value=mcnemar(balance > 0, balance < 0),
        )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of p values for the number of tests.

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


def _curve_point(
    cached: dict[int, CurveRun],
    tuned: dict[int, CurveRun],
    test: _SignTest | None,
    p_value: float | None,
    shifted_p_value: float | None,
) -> CurvePoint:
    some = next(iter((cached or tuned).values()))
    shifted = some.shifted_correct
    point = CurvePoint(
        size=some.size,
        num_train=some.num_train,
        num_test=len(some.correct),
        cached=_mode_scores(cached),
        finetune=_mode_scores(tuned),
        p_value=p_value,
        verdict=_verdict(cached, tuned, p_value),
        baseline_top1=majority(some.labels),
        imbalanced=imbalanced(some.labels),
        only_cached=None if test is None else test.only_cached,
        only_finetune=None if test is None else test.only_finetune,
        num_shifted=None if shifted is None else len(shifted),
        shifted_p_value=shifted_p_value,
    )
    sound = point.useful and not point.contradicted
    return point if sound or p_value is None else dataclasses.replace(point, verdict="undecided")


def _mode_scores(runs: dict[int, CurveRun]) -> ModeScores | None:
    if not runs:
        return None
    by_seed = {seed: float(run.correct.mean()) for seed, run in runs.items()}
    mean, num_test = float(np.mean(list(by_seed.values()))), len(next(iter(runs.values())).correct)
    names = dict.fromkeys(name for run in runs.values() for name in run.held_out)
    shifted = [r.shifted_correct.mean() for r in runs.values() if r.shifted_correct is not None]
    return ModeScores(
        top1=mean,
        interval=wilson_interval(round(mean * num_test), num_test),
        top1_by_seed=by_seed,
        cost_seconds=float(np.mean([run.cost_seconds for run in runs.values()])),
        trial_seconds=float(np.mean([run.trial_seconds for run in runs.values()])),
        balanced_top1=float(np.mean([run.balanced_top1 for run in runs.values()])),
        features=dict(Counter(run.features for run in runs.values() if run.features).most_common()),
        held_out={
            name: float(np.mean([r.held_out[name] for r in runs.values() if name in r.held_out]))
            for name in names
        },
        shifted_top1=float(np.mean(shifted)) if len(shifted) == len(runs) else None,
    )


def _verdict(
    cached: dict[int, CurveRun], tuned: dict[int, CurveRun], p_value: float | None
) -> Verdict:
    if p_value is None:
        return "unmeasured"
    gains = [int(tuned[s].correct.sum()) - int(cached[s].correct.sum()) for s in cached]
    if p_value >= SIGNIFICANCE or not (min(gains) > 0 or max(gains) < 0):
        return "undecided"
    return "finetune" if gains[0] > 0 else "cached"

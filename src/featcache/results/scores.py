"""What test predictions are worth: scores by class and over classes, with intervals.

Every score is defined as in scikit-learn, and the tests compare the two. It is computed here
because importing `sklearn.metrics` takes as long as all of `train-head`, and because scikit-learn
would rank the rows anew for each of the hundreds of resamples behind the intervals: here they are
ranked once, and a resample is a weight for each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.config.checks import check_range
from featcache.results.metrics import wilson_interval
from featcache.results.ranking import Counts, Doubles, rank, ratio, resample

Interval = tuple[float, float]

NUM_RESAMPLES = 200
"""Of the bootstrap."""
MIN_RESAMPLES = 100
"""With fewer there are no intervals."""
MIN_GROUPS = 5
"""Fewer do not show how groups differ."""
MAX_DRAWN = 10_000_000
"""Values that the bootstrap may work through: resamples * rows, and for rankings * classes."""
MAX_CURVE_POINTS = 60
TAILS = (0.025, 0.975)
DIGITS = 6
"""Kept of every score."""
BY_CLASS = ("precision", "recall", "f1", "auroc", "average_precision")
OVER_CLASSES = ("macro_f1", "weighted_f1", "balanced_top1", "auroc", "average_precision")


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class against the rest.

    What has no meaning is None: the recall of a class without test rows, the AUROC where no row
    belongs to another class. A class that is never predicted has a precision of 0.

    Attributes:
        support: Number of its test rows.
        precision: Share of the rows predicted as this class that belong to it.
        recall: Share of its rows that are predicted as this class.
        f1: Harmonic mean of the two.
        auroc: Area under the ROC curve of its probability.
        average_precision: Mean precision over the thresholds on its probability, weighted by the
            gain in recall.
        intervals: 95% intervals by name of the score.
    """

    support: int
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    auroc: float | None = None
    average_precision: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range("support", self.support, 0)
        _check_shares({name: getattr(self, name) for name in BY_CLASS}, self.intervals)


@dataclass(frozen=True, kw_only=True)
class TwoClassCurves:
    """The curves of two classes; a row counts as positive from a threshold on.

    Attributes:
        positive: The class whose probability is ranked.
        roc: Threshold, false-positive rate, true-positive rate of each point.
        precision_recall: Threshold, recall, precision of each point.
    """

    positive: str
    roc: list[tuple[float, float, float]]
    precision_recall: list[tuple[float, float, float]]

    def __post_init__(self) -> None:
        for point in (*self.roc, *self.precision_recall):
            for share in point:
                check_range("curves", share, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a test split beyond its accuracy.

    Means over classes ("macro") leave out classes where a score has no meaning.

    Attributes:
        macro_f1: Mean F1 over the classes with test rows or predictions.
        weighted_f1: The same, weighted by the classes' test rows.
        balanced_top1: Mean recall.
        auroc: Mean AUROC of each class against the rest.
        average_precision: Mean average precision of each class against the rest.
        log_loss: Mean negative logarithm of the true class's probability.
        intervals: 95% intervals by name of the score.
        intervals_from: How the intervals were made, in words.
        classes: By name.
        curves: Of two classes; None of more.
    """

    macro_f1: float | None
    weighted_f1: float | None
    balanced_top1: float | None
    auroc: float | None
    average_precision: float | None
    log_loss: float | None
    intervals: dict[str, Interval]
    intervals_from: str
    classes: dict[str, ClassScores]
    curves: TwoClassCurves | None = None

    def __post_init__(self) -> None:
        check_range("log_loss", self.log_loss, 0)
        shares = {name: getattr(self, name) for name in OVER_CLASSES}
        _check_shares(shares, {n: ends for n, ends in self.intervals.items() if n != "log_loss"})

    def top1_interval(self, num_correct: int, num_rows: int) -> Interval:
        """95% interval of the accuracy: of the groups if there are any, else Wilson's."""
        return self.intervals.get("top1") or wilson_interval(num_correct, num_rows)


def _check_shares(shares: dict[str, float | None], intervals: dict[str, Interval]) -> None:
    for name, share in shares.items():
        check_range(name, share, 0, 1)
    for name, ends in intervals.items():
        for end in ends:
            check_range(f"the interval of {name}", end, 0, 1)


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Each score of every class and resample [B, C]; resample 0 is the test split itself."""

    support: Doubles
    named: Doubles
    precision: Doubles
    recall: Doubles
    f1: Doubles
    auroc: Doubles
    average_precision: Doubles


def score_predictions(
    labels: ArrayLike,
    predicted: ArrayLike,
    probabilities: ArrayLike | None,
    class_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    seed: int = 42,
) -> Scores:
    """Score predictions of a test split.

    Intervals of precision and recall are Wilson's; those of other scores, and where rows come in
    groups all of them and that of the accuracy ("top1"), are percentiles of a bootstrap over rows
    or groups. Test splits too large for that, or of few groups, have none.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        probabilities: [N, C]; None leaves out what needs them.
        class_names: C names.
        groups: Each row's group [N], where rows come in groups.
        seed: Of the bootstrap.
    """
    truth, guess = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    table = None if probabilities is None else np.asarray(probabilities)
    num_resamples, intervals_from = _plan(len(truth), groups)
    drawn = resample(len(truth), num_resamples, groups, seed)
    found = _by_class(truth, guess, table, len(class_names), drawn)
    overall = _over_classes(found)
    if table is not None:
        own = np.clip(table[np.arange(len(truth)), truth], np.finfo(table.dtype).eps, 1)
        overall["log_loss"] = -(np.log(own) @ drawn) / drawn.sum(axis=0)
    else:
        overall["log_loss"] = np.full(1, np.nan)
    if groups is not None:
        overall["top1"] = (truth == guess) @ drawn / drawn.sum(axis=0)
    intervals = {name: _ends(values)[0] for name, values in overall.items()}
    return Scores(
        **{name: _value(overall[name]) for name in (*OVER_CLASSES, "log_loss")},
        intervals={name: ends for name, ends in intervals.items() if ends is not None},
        intervals_from=intervals_from,
        classes=_class_scores(found, class_names, wilson=groups is None),
        curves=None if table is None else curves_of(truth, table, class_names),
    )


def _plan(num_rows: int, groups: ArrayLike | None) -> tuple[int, str]:
    """How many resamples to draw, and of what, in words."""
    number, units = _affordable(num_rows), "test rows"
    if groups is not None:
        num_groups = len(np.unique(np.asarray(groups)))
        number, units = number if num_groups >= MIN_GROUPS else 0, f"{num_groups} groups"
    return number, f"{number} bootstrap resamples of {units}"


def _affordable(num_values: int) -> int:
    """How many resamples of `num_values` values to draw; 0 if fewer than MIN_RESAMPLES fit."""
    number = min(NUM_RESAMPLES, MAX_DRAWN // max(num_values, 1))
    return number if number >= MIN_RESAMPLES else 0


def _by_class(
    truth: NDArray[np.int64],
    guess: NDArray[np.int64],
    probabilities: NDArray[Any] | None,
    num_classes: int,
    drawn: Counts,
) -> _Resampled:
    shape = (drawn.shape[1], num_classes)
    support, named, right = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    auroc, average = np.full(shape, np.nan), np.full(shape, np.nan)
    ranked = drawn[:, : 1 + _affordable(len(truth) * num_classes)]
    for number in range(num_classes):
        own, said = truth == number, guess == number
        support[:, number] = drawn[own].sum(axis=0)
        named[:, number] = drawn[said].sum(axis=0)
        right[:, number] = drawn[own & said].sum(axis=0)
        if probabilities is not None and own.any():
            ranking = rank(own, probabilities[:, number], ranked)
            auroc[: ranked.shape[1], number] = ranking.auroc()
            average[: ranked.shape[1], number] = ranking.average_precision()
    either = (support > 0) | (named > 0)
    return _Resampled(
        support=support,
        named=named,
        precision=np.where(either, np.nan_to_num(ratio(right, named)), np.nan),
        recall=ratio(right, support),
        f1=ratio(2 * right, support + named),
        auroc=auroc,
        average_precision=average,
    )


def _over_classes(found: _Resampled) -> dict[str, Doubles]:
    """Means over classes [B]."""

    def mean(values: Doubles, weights: Doubles | None = None) -> Doubles:
        known = ~np.isnan(values)
        counted = known if weights is None else known * weights
        return ratio((np.nan_to_num(values) * counted).sum(axis=1), counted.sum(axis=1) * 1.0)

    return {
        "macro_f1": mean(found.f1),
        "weighted_f1": mean(found.f1, found.support),
        "balanced_top1": mean(found.recall),
        "auroc": mean(found.auroc),
        "average_precision": mean(found.average_precision),
    }


def _class_scores(
    found: _Resampled, class_names: Sequence[str], *, wilson: bool
) -> dict[str, ClassScores]:
    ends = {name: _ends(getattr(found, name)) for name in BY_CLASS}
    classes = {}
    for number, class_name in enumerate(class_names):
        intervals = {name: pairs[number] for name, pairs in ends.items()}
        scores = {name: _value(getattr(found, name)[:, number]) for name in BY_CLASS}
        support, named = int(found.support[0, number]), int(found.named[0, number])
        if wilson:
            right = round(support * (scores["recall"] or 0))
            intervals["recall"] = _rounded(*wilson_interval(right, support)) if support else None
            intervals["precision"] = _rounded(*wilson_interval(right, named)) if named else None
        classes[class_name] = ClassScores(
            support=support,
            intervals={name: pair for name, pair in intervals.items() if pair is not None},
            **scores,
        )
    return classes


def _value(resampled: Doubles) -> float | None:
    """The score of the test split itself."""
    value = float(resampled[0])
    return None if math.isnan(value) else round(value, DIGITS)


def _ends(resampled: Doubles) -> list[Interval | None]:
    """The middle 95 % of the resamples in which each score has a meaning.

    Args:
        resampled: [1 + B, C], or [1 + B] of one score; the first is the test split itself.
    """
    values = resampled if resampled.ndim == 2 else resampled[:, None]
    table = np.sort(values[1:], axis=0)  # NaN come last
    known = (~np.isnan(table)).sum(axis=0)
    given = ~np.isnan(values[0]) & (known >= MIN_RESAMPLES)
    ends: list[Interval | None] = [None] * len(given)
    for column in np.flatnonzero(given):
        last = known[column] - 1
        ranked = table[: last + 1, column]
        low, high = (np.interp(q * last, np.arange(last + 1), ranked) for q in TAILS)
        ends[column] = _rounded(float(low), float(high))
    return ends


def _rounded(low: float, high: float) -> Interval:
    return round(low, DIGITS), round(high, DIGITS)


def curves_of(
    labels: ArrayLike, probabilities: ArrayLike, class_names: Sequence[str], positive: int = 1
) -> TwoClassCurves | None:
    """ROC and precision-recall curves of two classes; None of more, or without rows of both.

    Args:
        labels: True classes [N].
        probabilities: [N, C].
        class_names: C names.
        positive: The class that is ranked.
    """
    truth = np.asarray(labels) == positive
    if len(class_names) != 2 or truth.all() or not truth.any():
        return None
    ranking = rank(truth, np.asarray(probabilities)[:, positive])
    true, false = ranking.true[:, 0].cumsum(), ranking.false[:, 0].cumsum()
    recall, precision = true / true[-1], true / (true + false)
    places = np.unique(np.linspace(0, len(true) - 1, MAX_CURVE_POINTS).round().astype(int))

    def points(x: Doubles, y: Doubles) -> list[tuple[float, float, float]]:
        columns = np.stack([ranking.thresholds, x, y], axis=1)[places].round(DIGITS)
        return [(float(t), float(a), float(b)) for t, a, b in columns]

    return TwoClassCurves(
        positive=class_names[positive],
        roc=points(false / false[-1], recall),
        precision_recall=points(recall, precision),
    )

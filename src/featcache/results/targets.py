"""How good predictions of several labels per image, or of a number per image, are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.results.ranking import rank, ratio, resample

Doubles = NDArray[np.float64]
Labels = NDArray[np.bool_]

NUM_RESAMPLES = 500
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class TargetPredictions:
    """A model's predictions for every test image, where an image has no single class.

    The three lists have one entry per image: its id, what is true, and what was predicted: the
    numbers of its labels, or its number.
    """

    ids: list[str]
    truth: list[list[int]] | list[float]
    predicted: list[list[int]] | list[float]

    @classmethod
    def of_labels(cls, ids: list[str], truth: Labels, predicted: Labels) -> Self:
        """From which labels images have and were given, [N, C] each."""
        columns = [[np.flatnonzero(row).tolist() for row in table] for table in (truth, predicted)]
        return cls(ids=ids, truth=columns[0], predicted=columns[1])


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """One label's scores on the test images.

    Attributes:
        support: Test images that have the label.
        average_precision: Area under the precision-recall curve; None without such images.
        precision: Share of the images given the label that have it.
        recall: Share of the images with the label that are given it.
        f1: Harmonic mean of the two.
    """

    support: int
    average_precision: float | None
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class MultilabelScores:
    """Scores of several labels per image.

    Attributes:
        mean_average_precision: Mean over the labels that some test image has.
        interval: Its 95% interval, from resampled test images, or groups where there are any.
        micro_average_precision: Of all pairs of image and label together.
        macro_f1: Mean over the labels.
        micro_f1: Of all pairs together.
        exact_match: Share of images whose labels are all right.
        per_label: By name.
    """

    mean_average_precision: float
    interval: tuple[float, float]
    micro_average_precision: float
    macro_f1: float
    micro_f1: float
    exact_match: float
    per_label: dict[str, LabelScores]

    @property
    def headline(self) -> str:
        """The first score, in words."""
        return f"mean average precision {self.mean_average_precision:.3f}"


@dataclass(frozen=True, kw_only=True)
class RegressionScores:
    """Scores of a number per image, with 95% intervals as of several labels.

    Attributes:
        r2: Share of the variance that is explained; below 0 is worse than always the mean.
        r2_interval: Its interval.
        mae: Mean absolute error, in the target's unit.
        mae_interval: Its interval.
        rmse: Root of the mean squared error, in the target's unit.
        baseline_mae: Of always predicting the median of train.
    """

    r2: float
    r2_interval: tuple[float, float]
    mae: float
    mae_interval: tuple[float, float]
    rmse: float
    baseline_mae: float

    @property
    def headline(self) -> str:
        """The first score, in words."""
        return f"R squared {self.r2:.3f}"


def multilabel_scores(
    truth: Labels,
    probabilities: Doubles,
    predicted: Labels,
    names: list[str],
    *,
    groups: ArrayLike | None = None,
    seed: int,
) -> MultilabelScores:
    """Score several labels per image.

    Args:
        truth: Which labels an image has, [N, C].
        probabilities: Of each label, [N, C].
        predicted: Which labels it was given, [N, C].
        names: The C labels.
        groups: Each image's group [N], where images come in groups.
        seed: Of the resampling.
    """
    from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

    some = truth.any(axis=0)
    of_present = average_precision_score(truth[:, some], probabilities[:, some], average=None)
    precisions = np.full(len(names), np.nan)
    precisions[some] = of_present
    # scikit-learn takes one column for two classes, so a label that no image has goes beside it.
    has, given = (np.pad(table, ((0, 0), (0, 1))) for table in (truth, predicted))
    found = precision_recall_fscore_support(has, given, average=None, zero_division=0.0)
    columns = [column[:-1] for column in found]
    per_label = {
        name: LabelScores(
            support=int(support),
            average_precision=None if np.isnan(ap) else float(ap),
            precision=float(precision),
            recall=float(recall),
            f1=float(f1),
        )
        for name, ap, precision, recall, f1, support in zip(
            names, precisions, *columns, strict=True
        )
    }
    return MultilabelScores(
        mean_average_precision=float(np.nanmean(precisions)),
        interval=_percentiles(_resampled_mean_ap(truth, probabilities, groups, seed)),
        micro_average_precision=float(
            average_precision_score(truth[:, some], probabilities[:, some], average="micro")
        ),
        macro_f1=float(np.mean(columns[2])),
        micro_f1=float(f1_score(has, given, average="micro", zero_division=0.0)),
        exact_match=float((truth == predicted).all(axis=1).mean()),
        per_label=per_label,
    )


def regression_scores(
    truth: Doubles,
    predicted: Doubles,
    train_median: float,
    *,
    groups: ArrayLike | None = None,
    seed: int,
) -> RegressionScores:
    """Score a number per image.

    Args:
        truth: [N].
        predicted: [N].
        train_median: Of the train targets, for the baseline.
        groups: Each image's group [N], where images come in groups.
        seed: Of the resampling.
    """
    counts = resample(len(truth), NUM_RESAMPLES, groups, seed)[:, 1:].T.astype(np.float64)
    drawn = counts.sum(axis=1)  # groups differ in size
    error = predicted - truth
    absolute, squared = np.abs(error), error**2
    mean = counts @ truth / drawn
    spread = counts @ truth**2 - drawn * mean**2
    explained = 1 - (counts @ squared) / np.maximum(spread, 1e-300)
    total = float(((truth - truth.mean()) ** 2).sum())
    return RegressionScores(
        r2=1 - float(squared.sum()) / total if total else float("nan"),
        r2_interval=_percentiles(explained),
        mae=float(absolute.mean()),
        mae_interval=_percentiles(counts @ absolute / drawn),
        rmse=float(np.sqrt(squared.mean())),
        baseline_mae=float(np.abs(truth - train_median).mean()),
    )


def mean_average_precision(labels: Sequence[tuple[Doubles, Doubles]]) -> float | None:
    """Mean over the labels that some row has; None if there is none.

    Args:
        labels: Of each label, whether rows have it [M] and its probabilities [M].
    """
    from sklearn.metrics import average_precision_score

    found = [average_precision_score(y, p) for y, p in labels if y.any()]
    return float(np.mean(found)) if found else None


def _resampled_mean_ap(
    truth: Labels, probabilities: Doubles, groups: ArrayLike | None, seed: int
) -> Doubles:
    """Mean average precision of every bootstrap sample, over the labels that it has."""
    drawn = resample(len(truth), NUM_RESAMPLES, groups, seed)[:, 1:]
    labels = np.flatnonzero(truth.any(axis=0))
    found = [rank(truth[:, n], probabilities[:, n], drawn).average_precision() for n in labels]
    return ratio(np.nansum(found, axis=0), np.isfinite(found).sum(axis=0).astype(np.float64))


def _percentiles(values: Doubles) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)

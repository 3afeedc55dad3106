"""How good a classifier is, and how certain that is. Labels are class indices from 0."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.config import JsonObject
from featcache.errors import UserError


def checked_weights(weights: ArrayLike, split: str) -> NDArray[np.float64]:
    """What rows count for, in float64, where sums of large weights are finite.

    Args:
        weights: One per row [N].
        split: The split's name, for messages.

    Raises:
        UserError: A weight is negative or not finite, or all are zero.
    """
    found = np.asarray(weights, np.float64)
    if not (np.isfinite(found).all() and (found >= 0).all() and found.any()):
        raise UserError(f"the weights of {split} must be numbers from 0 on, not all 0")
    return found


def top1(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Share of rows whose predicted class is correct; NaN for no rows.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].

    Raises:
        ValueError: The two have different lengths.
    """
    correct = _correct(labels, predicted)
    return float(correct.mean()) if correct.size else math.nan


def majority(labels: ArrayLike) -> float:
    """Share of rows in the most frequent class: what always answering it scores; NaN for no rows.

    Args:
        labels: True classes [N].
    """
    truth = np.asarray(labels, np.int64)
    return float(np.bincount(truth).max() / truth.size) if truth.size else math.nan


def beats(top1: float, baseline_top1: float | None) -> bool:
    """Whether a mode is more accurate than a baseline, where that is known.

    Args:
        top1: Of the mode.
        baseline_top1: What answering the most frequent class every time reaches.
    """
    return baseline_top1 is None or top1 > baseline_top1


def topk(labels: ArrayLike, scores: ArrayLike, k: int = 5) -> float:
    """Share of rows whose true class is among the k highest scores; NaN for no rows.

    Equal scores count against the row, so that a constant score earns nothing by its order.

    Args:
        labels: True classes [N].
        scores: One score per row and class [N, C]: logits or probabilities.
        k: How many classes may be named; C or more is always right.
    """
    truth, table = np.asarray(labels), np.asarray(scores)
    if table.ndim != 2 or len(truth) != len(table):
        raise ValueError(f"labels {truth.shape} do not match scores {table.shape}")
    if not truth.size:
        return math.nan
    if k >= table.shape[1]:
        return 1.0
    own = table[np.arange(len(truth)), truth]
    # The true class itself is among those at least as high, hence no strict comparison with k.
    return float(((table >= own[:, None]).sum(axis=1) <= k).mean())


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count rows by true and predicted class.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        num_classes: Number C of classes.

    Returns:
        Counts [C, C] int64, true class by row, predicted class by column.

    Raises:
        ValueError: The lengths differ, or a class lies outside 0 .. C-1.
    """
    truth, guess = _classes(labels, predicted, num_classes)
    flat = np.bincount(truth * num_classes + guess, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def per_class(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> list[float]:
    """Recall of every class: the share of its rows predicted correctly; NaN for an empty class.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        num_classes: Number C of classes.
    """
    truth, guess = _classes(labels, predicted, num_classes)
    totals = np.bincount(truth, minlength=num_classes)
    hits = np.bincount(truth[truth == guess], minlength=num_classes)
    return [float(h / t) if t else math.nan for h, t in zip(hits, totals, strict=True)]


def balanced(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> float:
    """Mean recall over the classes that have rows, so that a rare class counts like a common one.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        num_classes: Number C of classes.
    """
    recalls = [r for r in per_class(labels, predicted, num_classes) if not math.isnan(r)]
    return float(np.mean(recalls)) if recalls else math.nan


def imbalanced(labels: ArrayLike) -> bool:
    """Whether the most frequent class has over a quarter more rows than classes have on average.

    Top-1 then rewards the common classes, so that balanced accuracy has to be shown beside it.

    Args:
        labels: True classes [N].
    """
    counts = np.bincount(np.asarray(labels, np.int64))
    present = counts[counts > 0]
    return bool(present.size) and bool(present.max() > 1.25 * present.mean())


def wilson_interval(num_correct: int, num_samples: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; stays within [0, 1] and holds near its ends.

    Args:
        num_correct: Rows that were right.
        num_samples: All rows; none gives (0, 1).
        level: Coverage, between 0 and 1.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: The counts or the level are impossible.
    """
    if not 0 <= num_correct <= num_samples or not 0 < level < 1:
        raise ValueError(f"{num_correct} of {num_samples} at level {level} is impossible")
    if num_samples == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = num_correct / num_samples
    widening = z * z / num_samples
    center = (share + widening / 2) / (1 + widening)
    half = (
        z
        / (1 + widening)
        * math.sqrt(share * (1 - share) / num_samples + widening / (4 * num_samples))
    )
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if num_correct == 0 else max(0.0, center - half)
    high = 1.0 if num_correct == num_samples else min(1.0, center + half)
    return low, high


def without_leaks(
    labels: ArrayLike, predicted: ArrayLike, leaked: NDArray[np.bool_]
) -> JsonObject | None:
    """Score the test images that train does not have.

    Args:
        labels: True classes of all test images [N].
        predicted: Predicted classes [N].
        leaked: Which images train has too, [N].

    Returns:
        Counts, accuracy and its 95% interval (None where no image is left); None without leaks.
    """
    if not leaked.any():
        return None
    correct = (np.asarray(labels) == np.asarray(predicted))[~leaked]
    right, num = int(correct.sum()), len(correct)
    return {
        "num_leaked": int(leaked.sum()),
        "num_test": num,
        "test_top1": right / num if num else None,
        "test_interval": wilson_interval(right, num) if num else None,
    }


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided p value that two classifiers, scored on the same rows, are equally good.

    Only rows on which they differ tell them apart. Up to 1,000 of those the binomial test is exact;
    beyond that, the normal approximation with continuity correction is used.

    Args:
        correct_a: Whether the first was right, [N] bool.
        correct_b: Whether the second was right, [N] bool, same rows in the same order.

    Raises:
        ValueError: The two have different lengths.
    """
    first, second = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"{first.shape} and {second.shape} are not scores of the same rows")
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_a + only_b
    if differing == 0:
        return 1.0
    if differing > 1000:
        z = max(0.0, abs(only_a - only_b) - 1) / math.sqrt(differing)
        return math.erfc(z / math.sqrt(2))
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    # Whole numbers until the last step: 2**1000 does not fit a float's precision, its ratio does.
    return min(1.0, 2 * tail / (1 << differing))


def samples_to_decide(
    only_a: int, only_b: int, num_samples: int, *, significance: float = 0.05, power: float = 0.8
) -> int | None:
    """How many rows `mcnemar` needs to tell two classifiers apart, if they go on to differ so.

    Connor's formula (Biometrics 43, 1987). With d the difference of the two rates of rows that only
    one got right and s their sum: n = (z(1 - significance / 2) √s + z(power) √(s - d²))² / d².

    Args:
        only_a: Rows that only the first got right.
        only_b: Rows that only the second got right.
        num_samples: All rows.
        significance: The p value has to be below this.
        power: The probability that it will be.

    Returns:
        Rows in total; None where neither is ahead.
    """
    total, difference = (only_a + only_b) / num_samples, (only_b - only_a) / num_samples
    if not difference:
        return None
    normal = NormalDist()
    alpha, beta = normal.inv_cdf(1 - significance / 2), normal.inv_cdf(power)
    root = alpha * math.sqrt(total) + beta * math.sqrt(total - difference**2)
    return math.ceil((root / difference) ** 2)


def _classes(
    labels: ArrayLike, predicted: ArrayLike, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    truth, guess = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if truth.shape != guess.shape or truth.ndim != 1:
        raise ValueError(f"labels {truth.shape} do not match predictions {guess.shape}")
    for name, values in (("labels", truth), ("predictions", guess)):
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name} must lie in 0 .. {num_classes - 1}")
    return truth, guess


def _correct(labels: ArrayLike, predicted: ArrayLike) -> NDArray[np.bool_]:
    truth, guess = np.asarray(labels), np.asarray(predicted)
    if truth.shape != guess.shape or truth.ndim != 1:
        raise ValueError(f"labels {truth.shape} do not match predictions {guess.shape}")
    return np.asarray(truth == guess, dtype=bool)

"""Everything that a report says of a test split's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from featcache.results import metrics
from featcache.results.reliability import CalibrationReport, reliability
from featcache.results.runs import Predictions
from featcache.results.scores import Interval, Scores, score_predictions


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The fields of a `RunReport` that come from predictions.

    Attributes:
        top1: Accuracy.
        interval: Its 95 % interval.
        scores: Beyond accuracy.
        calibration: Whether the probabilities can be believed.
        test: The predictions.
    """

    top1: float
    interval: Interval
    scores: Scores
    calibration: CalibrationReport
    test: Predictions


def evaluate(
    labels: ArrayLike,
    predicted: ArrayLike,
    probabilities: ArrayLike | None,
    *,
    ids: list[str],
    class_names: Sequence[str],
    confidence: ArrayLike,
    uncalibrated: ArrayLike | None = None,
    temperature: float = 1.0,
    fitted_on: str = "nothing",
    groups: ArrayLike | None = None,
    seed: int = 42,
) -> Evaluation:
    """Score predictions.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        probabilities: Of all classes [N, C], if they are at hand.
        ids: N names of rows.
        class_names: C names.
        confidence: The probability of each predicted class [N].
        uncalibrated: The same with a temperature of one; equal unless given.
        temperature: What logits were divided by.
        fitted_on: The rows that the temperature was fitted on, in words.
        groups: Each row's group [N], where rows come in groups.
        seed: Of the bootstrap.
    """
    truth, guess, given = np.asarray(labels), np.asarray(predicted), np.asarray(confidence)
    correct = truth == guess
    scores = score_predictions(truth, guess, probabilities, class_names, groups=groups, seed=seed)
    return Evaluation(
        top1=metrics.top1(truth, guess),
        interval=scores.top1_interval(int(correct.sum()), len(truth)),
        scores=scores,
        calibration=CalibrationReport(
            temperature=temperature,
            fitted_on=fitted_on,
            before=reliability(correct, given if uncalibrated is None else uncalibrated),
            after=reliability(correct, given),
        ),
        test=Predictions(
            ids=ids,
            labels=truth.tolist(),
            predicted=guess.tolist(),
            confidence=[round(float(p), 6) for p in given],
        ),
    )

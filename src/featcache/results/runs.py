"""One run's result as JSON, and one line of the comparison made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from featcache.config import JsonObject
from featcache.config.checks import record_from_json
from featcache.display import Facts
from featcache.errors import UserError
from featcache.files import read_regular, write_json
from featcache.results import metrics
from featcache.results.reliability import CalibrationReport, reliability
from featcache.results.scores import Interval, Scores, score_predictions
from featcache.results.targets import MultilabelScores, RegressionScores, TargetPredictions

MAX_BYTES = 256 << 20
"""Of a report file: predictions of millions of images."""
Approach = Literal["loop", "cached", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A model's predictions for every test image.

    The four lists have one entry per image: its id, the numbers of its true and its predicted
    class, and the probability given to the predicted one.
    """

    ids: list[str]
    labels: list[int]
    predicted: list[int]
    confidence: list[float]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, item.name)) for item in dataclasses.fields(self)}
        if len(lengths) != 1:
            raise UserError(f"test predictions with columns of different lengths: {lengths}")

    def correct(self) -> list[bool]:
        """Whether each image was classified correctly."""
        return [a == b for a, b in zip(self.labels, self.predicted, strict=True)]

    def balanced(self) -> float:
        """Mean recall over the classes that have test images."""
        num_classes = 1 + max([*self.labels, *self.predicted], default=0)
        return metrics.balanced(self.labels, self.predicted, num_classes)


class EpochRecord(TypedDict, total=False):
    """One epoch of training: its number from 1, losses, accuracies, and wall seconds.

    With several labels per image, `val_map` and `test_map` are mean average precisions instead.
    `seconds` is the training pass alone, of which `wait_seconds` were spent waiting for images;
    `eval_seconds` is all scoring, of which `val_seconds` went to held-out images.
    """

    epoch: int
    train_loss: float
    seconds: float
    wait_seconds: float
    eval_seconds: float
    val_top1: float
    val_map: float
    val_loss: float
    val_seconds: float
    test_top1: float
    test_map: float
    test_loss: float


@dataclass(frozen=True, kw_only=True, repr=False)
class RunReport(Facts):
    """What one training run measured, under which settings, on which data.

    `test_interval` is the 95% interval of `test_top1`; fields of one command only are in `more`,
    as is the run's id under "run". Reports of 0.1.0 lack the run's id, `scores` and `calibration`.
    Where images have several labels or a number, `target_scores` and `targets` stand for
    `test_top1`, `test_interval`, `scores` and `test`, which are None.
    """

    command: str
    trainable_params: int
    test_top1: float | None
    test_interval: tuple[float, float] | None
    seconds_total: float
    epochs: list[EpochRecord]
    scored_on: str
    chosen_on: str
    config: JsonObject
    provenance: JsonObject
    environment: JsonObject
    more: JsonObject = field(default_factory=dict)
    class_names: list[str] | None = None
    scores: Scores | None = None
    calibration: CalibrationReport | None = None
    test: Predictions | None = None
    target_scores: MultilabelScores | RegressionScores | None = None
    targets: TargetPredictions | None = None

    def _facts(self) -> dict[str, object]:
        found = str(self.target_scores and self.target_scores.headline)
        if self.test_top1 is not None:
            low, high = self.test_interval or (0.0, 1.0)
            found = f"accuracy {self.test_top1:.3f} [{low:.3f}, {high:.3f}]"
        return {
            "command": self.command,
            "found": found,
            "scored on": self.scored_on,
            "selected on": self.chosen_on,
            "trainable parameters": f"{self.trainable_params:,}",
            "seconds": f"{self.seconds_total:.3g}",
        }

    def to_json(self) -> JsonObject:
        """The fields that a command prints; predictions stay in the report file."""
        hidden = ("more", "class_names", "test", "targets")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown = {name: value for name, value in fields.items() if name not in hidden}
        # Through text, so that returned, printed and saved values are the same plain ones.
        text = json.dumps({**shown, **self.more}, default=dataclasses.asdict)
        plain: JsonObject = json.loads(text)
        return plain

    def save(self, path: Path) -> None:
        """Write the report file, class names and test predictions included.

        Raises:
            StorageError: The file system refused.
        """
        values = self.to_json()
        if self.class_names is not None:
            values["class_names"] = self.class_names
        if self.test is not None:
            values["test"] = dataclasses.asdict(self.test)
        if self.targets is not None:
            values["targets"] = dataclasses.asdict(self.targets)
        write_json(path, values)

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        """Rebuild from what `save` or `to_json` made.

        Raises:
            UserError: A field is missing or has the wrong type.
        """
        try:
            known = {f.name for f in dataclasses.fields(cls)} - {"more"}
            own = {name: values[name] for name in known & values.keys()}
            test, targets = (own.pop(name, None) for name in ("test", "targets"))
            interval = own.pop("test_interval")
            low, high = (float(bound) for bound in interval or (0.0, 1.0))
            several = values.get("task") == "multilabel"
            for name, kind in (
                ("scores", Scores),
                ("calibration", CalibrationReport),
                ("target_scores", MultilabelScores if several else RegressionScores),
            ):
                if own.get(name) is not None:
                    own[name] = record_from_json(kind, own[name])
            report = cls(
                **own,
                test_interval=None if interval is None else (low, high),
                more={name: value for name, value in values.items() if name not in known},
                test=Predictions(**test) if test is not None else None,
                targets=TargetPredictions(**targets) if targets is not None else None,
            )
            if not math.isfinite((report.test_top1 or 0.0) + report.seconds_total):
                raise ValueError("test_top1 and seconds_total must be finite")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"not a run's report: {error}") from error
        return report

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report file.

        Raises:
            UserError: The file is missing, or is not a report.
        """
        try:
            values = json.loads(read_regular(path, MAX_BYTES))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON; give the .json that a command wrote") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is not a run's report; give the .json that a command wrote")
        return cls.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The fields of a `RunReport` that come from predictions.

    Attributes:
        top1: Accuracy.
        interval: Its 95% interval.
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


def report_marks(command: str) -> re.Pattern[bytes]:
    """Matches a command's report file, not other JSON."""
    return re.compile(rb'"command":\s*"%s"' % command.encode())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode of a comparison: a line of its table and a line of its plot.

    All seconds are wall time. `seconds_total` is the whole mode: reading and decoding, the one-time
    extraction where there is one (`extract_seconds`), training, and scoring the test split after
    every epoch. `seconds_per_epoch` is the training pass alone, `images_per_s` what it reaches;
    `eval_seconds_per_epoch` is what scoring adds.
    `points` are (seconds since the mode began, test top-1) at the end of each epoch, or of the run
    where it has no epochs. Where it is not `extraction_known`, the seconds lack an extraction that
    nobody recorded.
    `baseline_top1` is the accuracy of always answering the most frequent class of the test images,
    `balanced_top1` the mode's mean recall over classes; None where the predictions are not known.
    `imbalanced` tells whether classes differ so much in size that the two have to be read together.
    `run` is the id of the run that was measured.
    """

    mode: str
    approach: Approach
    trainable_params: int
    test_top1: float
    test_interval: tuple[float, float]
    num_test: int
    seconds_total: float
    seconds_per_epoch: float
    images_per_s: float
    eval_seconds_per_epoch: float = 0.0
    extract_seconds: float = 0.0
    num_epochs: int = 0
    points: tuple[tuple[float, float], ...] = ()
    extraction_known: bool = True
    baseline_top1: float | None = None
    balanced_top1: float | None = None
    imbalanced: bool = False
    run: str | None = None

    @property
    def later_seconds(self) -> float:
        """What the same run costs again once the cache exists."""
        return self.seconds_total - self.extract_seconds


def benchmark_rows(runs: list[tuple[str, Approach, RunReport, float]]) -> list[Row]:
    """Make the comparison's lines.

    Args:
        runs: For each mode its name, its kind, its report, and the seconds of extraction that
            came before it (0 for a mode that needs none, or whose report counts it).

    Returns:
        One row per run, in the order given.
    """
    return [_row(*run) for run in runs]


def _row(mode: str, approach: Approach, run: RunReport, extract_seconds: float) -> Row:
    if run.test_top1 is None or run.test_interval is None:
        raise UserError(
            f"{mode}: images with several labels or a number have no accuracy to compare"
        )
    num_train = int(run.more["num_train"])
    cached_input = run.more.get("activations") or {}
    extract_within = float(cached_input.get("extract_seconds") or 0.0)
    num_epochs = max(len(run.epochs), 1)
    per_epoch = sum(float(e["seconds"]) for e in run.epochs) / num_epochs
    scoring = sum(float(e.get("eval_seconds", 0.0)) for e in run.epochs) / num_epochs
    return Row(
        mode=mode,
        approach=approach,
        trainable_params=run.trainable_params,
        test_top1=run.test_top1,
        test_interval=run.test_interval,
        num_test=int(run.more["num_test"]),
        seconds_total=run.seconds_total + extract_seconds,
        seconds_per_epoch=per_epoch,
        images_per_s=num_train / per_epoch if per_epoch else 0.0,
        eval_seconds_per_epoch=scoring,
        extract_seconds=extract_seconds + extract_within,
        num_epochs=len(run.epochs),
        points=_points(run, run.test_top1, extract_seconds),
        baseline_top1=metrics.majority(run.test.labels) if run.test else None,
        balanced_top1=run.test.balanced() if run.test else None,
        imbalanced=metrics.imbalanced(run.test.labels) if run.test else False,
        run=run.more.get("run"),
    )


def _points(run: RunReport, top1: float, extract_seconds: float) -> tuple[tuple[float, float], ...]:
    """Seconds since the mode began and accuracy, at the end of each epoch.

    What a run spends outside its epochs (reading the data, building the network) comes before
    the first of them. A run without epochs has one point, at its end.
    """
    if not run.epochs:
        return ((extract_seconds + run.seconds_total, top1),)
    spent = [float(e["seconds"]) + float(e.get("eval_seconds", 0.0)) for e in run.epochs]
    elapsed = extract_seconds + max(run.seconds_total - sum(spent), 0.0)
    points = []
    for seconds, epoch in zip(spent, run.epochs, strict=True):
        elapsed += seconds
        if epoch.get("test_top1") is not None:  # an epoch may go without a score
            points.append((elapsed, float(epoch["test_top1"])))
    return tuple(points)


def break_even(one_time_s: float, cached_s: float, uncached_s: float) -> int | None:
    """After how many repetitions a one-time cost has paid for itself.

    The smallest whole n with `one_time_s + n * cached_s <= n * uncached_s`.

    Args:
        one_time_s: Seconds of extraction.
        cached_s: Seconds of one epoch (or trial) on the cache.
        uncached_s: Seconds of one epoch (or trial) without it.

    Returns:
        That number, at least 1; None when a repetition on the cache saves nothing.
    """
    saved = uncached_s - cached_s
    if not saved > 0:
        return None
    return max(1, math.ceil(one_time_s / saved))

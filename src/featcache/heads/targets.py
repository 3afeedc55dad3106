"""Heads for images with several labels, or with a number instead of a class.

Several labels: one logistic regression per label, with it against without it. Each has its own
settings, chosen as for classes, and its own threshold: the probability from which the label is
predicted, with the highest F1 on the held-out rows. A number: ridge regression; the settings with
the least squared error on held-out rows win. Both are fitted to all of train and scored on the test
split once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import JsonObject, StageColumns, Task, TrainHeadConfig
from featcache.display import progress, say
from featcache.errors import UserError
from featcache.heads.columns import on_columns
from featcache.heads.features import Doubles, Floats
from featcache.heads.linear import ABSENT_BIAS, Decision, LinearHead, sigmoid
from featcache.heads.scoring import TestSplit, open_test
from featcache.heads.selection import Choice, InMemoryData, choose, held_out_logits, load_data
from featcache.heads.solvers.base import FittedHead, Solver, threads_for
from featcache.heads.solvers.logistic import LogisticSolver
from featcache.heads.solvers.ridge import ValueRidgeSolver
from featcache.heads.training_data import Rows
from featcache.results.targets import (
    MultilabelScores,
    RegressionScores,
    TargetPredictions,
    mean_average_precision,
    multilabel_scores,
    regression_scores,
)
from featcache.runtime import StageTimer

# With fewer held-out rows that have a label, its threshold stays at one half.
MIN_POSITIVE = 5
_NO_ROWS = np.empty(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetRun:
    """One pass through the protocol: choose, refit, score once.

    Attributes:
        head: Fitted to all of train.
        chosen: Settings; with several labels, by label, None for those that all or no rows have.
        chosen_on: The rows that chose, in words.
        val_score: Mean average precision, or R squared, on those rows; None if there were none.
        scored_on: The rows that scored, in words.
        scores: On those rows.
        predictions: Of those rows.
        fit_seconds: Wall time of choosing and fitting.
    """

    head: LinearHead
    chosen: JsonObject
    chosen_on: str
    val_score: float | None
    scored_on: str
    scores: MultilabelScores | RegressionScores
    predictions: TargetPredictions
    fit_seconds: float


def target_head(config: TrainHeadConfig, cache: FeatureCache) -> tuple[LinearHead, JsonObject]:
    """Choose, fit and score a head on a cache whose images have several labels or a number.

    Returns:
        The head, and the fields of the report that depend on it.

    Raises:
        UserError: The settings ask for something that these heads do not have.
    """
    run = run_targets(config, cache)
    scores = dataclasses.asdict(run.scores)
    head = run.head.replace(chosen=run.chosen, scores={"val_score": run.val_score, **scores})
    return head, {
        "trainable_params": head.num_params,
        "test_top1": None,
        "test_interval": None,
        "epochs": [],
        "scored_on": run.scored_on,
        "chosen_on": run.chosen_on,
        "more": {
            "task": head.decision.task,
            "solver": head.solver,
            "backend": "numpy",
            "val_score": run.val_score,
            "fit_seconds": run.fit_seconds,
            "chosen": run.chosen,
            "num_train": len(cache.split("train")),
            "num_test": len(run.predictions.ids),
        },
        "target_scores": run.scores,
        "targets": run.predictions,
    }


def run_targets(config: TrainHeadConfig, cache: FeatureCache) -> TargetRun:
    """As `target_head`."""
    task = cache.meta.dataset.task
    check_target_settings(config, task)
    run = _run_labels if task == "multilabel" else _run_value
    return run(config, cache, load_data(cache), open_test(config, cache, in_memory=True))


def check_target_settings(config: TrainHeadConfig, task: Task) -> None:
    """Refuse settings that mean nothing for several labels or a number.

    Raises:
        UserError: Naming what to leave out.
    """
    labels = task == "multilabel"
    what = "several labels per image" if labels else "a number per image"
    own = "logistic" if labels else "ridge"
    if config.solver not in ("logistic", own):
        raise UserError(f"--solver {config.solver} is not for {what}: give --solver {own}")
    for flag, given in (
        ("--shots", config.shots is not None),
        ("--stream on", config.stream == "on"),
        (f"--backend {config.backend}", config.backend not in ("auto", "numpy")),
        ("--C", config.C is not None and not labels),
        ("--class-weight", config.class_weight != "none" and not labels),
    ):
        if given:
            raise UserError(f"{flag} is not for {what}: leave it out")
    if not labels and config.solver == "logistic":
        say("the target is a number: ridge regression instead of logistic")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
    """One output, fitted to all of train; and held-out rows with their logits of these settings."""

    fitted: FittedHead[LinearHead]
    choice: Choice
    held: list[tuple[Rows, Floats]]

    def probabilities(self) -> tuple[Doubles, Doubles]:
        """Classes 0 and 1 of the held-out rows [M], and their probability of class 1 [M]."""
        classes = [rows.y.astype(np.float64) for rows, _ in self.held]
        own = [sigmoid(z[:, 1] - z[:, 0]).astype(np.float64) for _, z in self.held]
        return np.concatenate(classes or [_NO_ROWS]), np.concatenate(own or [_NO_ROWS])


def _fit(
    config: TrainHeadConfig, data: InMemoryData, solver: Solver, stages: StageColumns | None
) -> _Fit:
    selection = data.selection(config)
    if stages is not None:
        solver = on_columns(solver, config, stages)
    choice = choose(solver, selection)
    logits = held_out_logits(solver, choice, selection)
    held = [(rows, part) for (_, rows), part in zip(selection.pairs, logits, strict=True)]
    fitted = solver.prepare(selection.train, [choice.settings]).fit(choice.settings)
    assert isinstance(fitted.head, LinearHead)
    return _Fit(fitted=fitted, choice=choice, held=held)  # type: ignore[arg-type]


def _run_labels(
    config: TrainHeadConfig, cache: FeatureCache, data: InMemoryData, test: TestSplit
) -> TargetRun:
    timer, names, stages = StageTimer(), cache.class_names, cache.meta.backbone.stages
    targets, truth = _targets(cache, "train"), _targets(cache, "test") > 0
    val = None if data.val is None else _targets(cache, "val")
    solver = LogisticSolver(C=config.C, standardize=config.standardize)
    fits: list[_Fit | None] = []
    bar = progress(len(names), "fitting labels", unit=" labels", late=True)
    with timer("fit"), threads_for(2 * data.train.num_values), bar:
        for label, name in enumerate(names):
            column = None if val is None else val[:, label]
            two = _two_classes(data, targets[:, label], column, name)
            fits.append(None if two is None else _fit(config, two, solver, stages))
            bar.update()
    head = _stacked(fits, targets, names)
    probabilities = outputs_on(test, head)
    predicted = head.decision.has_labels(probabilities)
    known = [fit for fit in fits if fit is not None]
    return TargetRun(
        head=head,
        chosen={
            name: None if fit is None else fit.choice.settings
            for name, fit in zip(names, fits, strict=True)
        },
        chosen_on=known[0].choice.chosen_on if known else "nothing: all rows are alike",
        val_score=mean_average_precision([fit.probabilities() for fit in known]),
        scored_on=test.name,
        scores=multilabel_scores(
            truth, probabilities, predicted, names, groups=test.groups, seed=config.seed
        ),
        predictions=TargetPredictions.of_labels(test.ids, truth, predicted),
        fit_seconds=timer.seconds["fit"],
    )


def _targets(cache: FeatureCache, split: str) -> Floats:
    targets = cache.split(split).targets
    assert targets is not None  # checked against the task when the cache was opened
    return targets


def _two_classes(
    data: InMemoryData, column: Floats, val_column: Floats | None, name: str
) -> InMemoryData | None:
    """The rows as two classes, without the label and with it; None if all train rows are alike."""
    if column.min() == column.max():
        return None
    names = [f"not {name}", name]
    train = dataclasses.replace(data.train, y=column.astype(np.int64), class_names=names)
    val = data.val
    if val is not None and val_column is not None:
        val = dataclasses.replace(val, y=val_column.astype(np.int64), class_names=names)
    return dataclasses.replace(data, train=train, val=val)


def _stacked(fits: Sequence[_Fit | None], targets: Floats, names: list[str]) -> LinearHead:
    """The labels' heads as one; a label that all or no rows have always gets the same answer."""
    dim = next((fit.fitted.head.feature_dim for fit in fits if fit is not None), 1)
    weight = np.zeros((len(names), dim), np.float32)
    bias = np.where(targets[0] > 0, -ABSENT_BIAS, ABSENT_BIAS).astype(np.float32)
    thresholds = [0.5] * len(names)
    for label, fit in enumerate(fits):
        if fit is not None:
            pair = fit.fitted.head
            weight[label] = pair.weight[1] - pair.weight[0]
            bias[label] = pair.bias[1] - pair.bias[0]
            thresholds[label] = best_threshold(*fit.probabilities())
    return LinearHead(
        weight=weight,
        bias=bias,
        class_names=names,
        decision=Decision(
            task="multilabel", label_thresholds=tuple(thresholds), fitted_on="held-out rows"
        ),
    )


def best_threshold(truth: Floats, probabilities: Floats) -> float:
    """The probability from which a label is predicted with the highest F1; one half if in doubt.

    It lies halfway between the last row that is given the label and the first that is not.

    Args:
        truth: 0 or 1 of the held-out rows [M].
        probabilities: Of 1, [M].
    """
    from sklearn.metrics import precision_recall_curve

    if truth.sum() < MIN_POSITIVE:
        return 0.5
    precision, recall, thresholds = precision_recall_curve(truth, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(thresholds[max(best - 1, 0)] + thresholds[best]) / 2


def _run_value(
    config: TrainHeadConfig, cache: FeatureCache, data: InMemoryData, test: TestSplit
) -> TargetRun:
    truth, timer = _targets(cache, "test"), StageTimer()
    solver = ValueRidgeSolver(alpha=config.alpha, standardize=config.standardize)
    with timer("fit"), threads_for(data.train.num_values):
        fit = _fit(config, data, solver, cache.meta.backbone.stages)
    head = fit.fitted.head.replace(decision=Decision(task="regression"))
    predicted = outputs_on(test, head)[:, 0]
    median = float(np.median(_targets(cache, "train")))
    return TargetRun(
        head=head,
        chosen={**fit.choice.settings},
        chosen_on=fit.choice.chosen_on,
        val_score=_held_out_r2(fit),
        scored_on=test.name,
        scores=regression_scores(
            truth.astype(np.float64), predicted, median, groups=test.groups, seed=config.seed
        ),
        predictions=TargetPredictions(
            ids=test.ids, truth=truth.tolist(), predicted=predicted.tolist()
        ),
        fit_seconds=timer.seconds["fit"],
    )


def _held_out_r2(fit: _Fit) -> float | None:
    pairs = [(rows.values, z[:, 0]) for rows, z in fit.held if rows.values is not None]
    if not pairs:
        return None
    values, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    spread = float(((values - values.mean()) ** 2).sum())
    return 1 - float(((predicted - values) ** 2).sum() / spread) if spread else None


def outputs_on(test: TestSplit, head: LinearHead) -> Doubles:
    """Probabilities [N, C] of the test rows, or their numbers [N, 1]; the mean over views."""
    blocks = [
        np.mean([head.predict_proba(view) for view in views], axis=0, dtype=np.float64)
        for views in test.blocks()
    ]
    return np.concatenate(blocks)

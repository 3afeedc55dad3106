"""Heads for images with several labels, or with a number instead of a class.

Several labels: one logistic regression per label, with it against without it. Each has its own
settings, chosen as for classes, and its own threshold: the probability from which the label is
predicted, with the highest F1 on the held-out rows. A number: ridge regression; the settings with
the least squared error on held-out rows win. Both are fitted to all of train and scored on test once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import StageColumns, TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.columns import on_columns
from featcache.heads.linear import ABSENT_BIAS, Doubles, Floats, LinearHead
from featcache.heads.selection import (
    Choice,
    InMemoryData,
    Selection,
    choose_solver,
    load_data,
)
from featcache.heads.solvers.base import FittedHead, Solver, threads_for
from featcache.heads.solvers.logistic import LogisticSolver
from featcache.heads.solvers.ridge import ValueRidgeSolver
from featcache.heads.training_data import TestSplit, open_test
from featcache.results.targets import (
    MultilabelScores,
    RegressionScores,
    TargetPredictions,
    multilabel_scores,
    regression_scores,
)
from featcache.runtime import StageTimer, progress, say

# With fewer held-out rows that have a label, its threshold stays at one half.
MIN_POSITIVE = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetRun:
    """One pass through the protocol: choose, refit, score once.

    Attributes:
        head: Fitted to all of train.
        chosen: Settings; of several labels, by label.
        chosen_on: The rows that chose, in words.
        val_score: Mean average precision, or R squared, on those rows; None if there were none.
        scores: On the test split.
        predictions: Of the test split.
        converged: Whether every fit reached its tolerance.
        num_train: Rows that were fitted, views not counted.
        fit_seconds: Wall time of choosing and fitting.
    """

    head: LinearHead
    chosen: dict[str, Any]
    chosen_on: str
    val_score: float | None
    scores: MultilabelScores | RegressionScores
    predictions: TargetPredictions
    converged: bool
    num_train: int
    fit_seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """What choosing and fitting one output gave.

    Attributes:
        fitted: On all of train.
        choice: How its settings were chosen.
        num_train: Rows that were fitted.
        truth: Of the rows that chose [M]: classes, or numbers.
        predicted: Their probabilities of class 1, or numbers [M].
    """

    fitted: FittedHead[LinearHead]
    choice: Choice
    num_train: int
    truth: Doubles = field(default_factory=lambda: np.empty(0))
    predicted: Doubles = field(default_factory=lambda: np.empty(0))


def run_targets(config: TrainHeadConfig, cache: FeatureCache) -> TargetRun:
    """Choose, fit and score a head on a cache whose images have several labels or a number.

    Raises:
        UserError: The settings ask for something that these heads do not have.
    """
    check_target_settings(config, cache.meta.dataset.task)
    run = _run_labels if cache.meta.dataset.task == "multilabel" else _run_value
    return run(config, cache, load_data(cache), open_test(config, cache, in_memory=True))


def check_target_settings(config: TrainHeadConfig, task: str) -> None:
    """Refuse flags that mean nothing for several labels or a number.

    Raises:
        UserError: Naming what to leave out.
    """
    several = task == "multilabel"
    what = "several labels per image" if several else "a number per image"
    own = "logistic" if several else "ridge"
    if config.solver not in ("logistic", own):
        raise UserError(f"--solver {config.solver}: {what} needs --solver {own}")
    if not several and config.solver == "logistic":
        say("the target is a number: ridge regression instead of logistic")
    for flag, given in (
        ("--shots", config.shots is not None),
        ("--stream on", config.stream == "on"),
        ("--backend", config.backend not in ("auto", "numpy")),
        ("--C", config.C is not None and not several),
        ("--alpha", config.alpha is not None and several),
        ("--class-weight balanced", config.class_weight == "balanced" and not several),
    ):
        if given:
            raise UserError(f"{flag} is not for {what}: leave it out")


def _run_labels(
    config: TrainHeadConfig, cache: FeatureCache, data: InMemoryData, test: TestSplit
) -> TargetRun:
    timer, names = StageTimer(), cache.class_names
    truth = cache.split("test").targets
    targets = cache.split("train").targets
    val_targets = cache.split("val").targets if data.val is not None else None
    assert truth is not None
    assert targets is not None
    solver = LogisticSolver(C=config.C, standardize=config.standardize)
    found: list[Chosen | None] = []
    bar = progress(len(names), "fitting labels", unit=" labels", late=True)
    with timer("fit"), threads_for(2 * data.train.num_values):
        for label, name in enumerate(names):
            of_label = _of_label(
                data, targets[:, label], None if val_targets is None else val_targets[:, label], name
            )
            found.append(
                None if of_label is None else _choose(config, of_label, solver, cache)
            )
            bar.update()
    bar.close()
    thresholds = np.array([0.5 if one is None else best_threshold(one) for one in found])
    head = _stacked(found, targets, names, thresholds)
    probabilities = _outputs(test, head)
    predicted = probabilities >= head.predict_thresholds
    return TargetRun(
        head=head,
        chosen={
            name: None if one is None else one.choice.settings
            for name, one in zip(names, found, strict=True)
        },
        chosen_on=next((one.choice.chosen_on for one in found if one is not None), "nothing"),
        val_score=_held_out_map(found),
        scores=multilabel_scores(truth > 0, probabilities, predicted, names, seed=config.seed),
        predictions=TargetPredictions(
            ids=test.ids,
            truth=[np.flatnonzero(row).tolist() for row in truth],
            predicted=[np.flatnonzero(row).tolist() for row in predicted],
        ),
        converged=all(one.fitted.converged for one in found if one is not None),
        num_train=max((one.num_train for one in found if one is not None), default=0),
        fit_seconds=timer.seconds["fit"],
    )

"""The protocol: choose on a part of train, fit all of train, score the test split once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from featcache.config import TrainHeadConfig
from featcache.heads.choose import Choice, Selection, choose, make_selection
from featcache.heads.closed_solvers import KnnSolver, RidgeSolver
from featcache.heads.data import Data, TestSplit
from featcache.heads.linear import Floats, LinearHead
from featcache.heads.logistic_solver import LogisticSolver
from featcache.heads.rows import Ints, Rows
from featcache.heads.solver import Fitted, Solver
from featcache.heads.steps import Epoch
from featcache.heads.steps_solver import StepsSolver
from featcache.heads.threads import threads_for
from featcache.results import metrics
from featcache.runtime import StageTimer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One pass through the protocol.

    Attributes:
        solver: The one that won.
        choice: How its settings were chosen.
        fitted: On all of train.
        predicted: Classes of the test rows, [N].
        confidence: The probability given to each, [N].
        test_top1: The share that is right.
        epochs: Loss and accuracy after each epoch, for adam and sgd.
        fit_seconds: Wall time of choosing and fitting.
        num_train: Rows that were fitted, views not counted.
        compared: For `auto`, what each solver reached.
    """

    solver: Solver
    choice: Choice
    fitted: Fitted
    predicted: Ints
    confidence: Floats
    test_top1: float
    epochs: list[dict[str, Any]]
    fit_seconds: float
    num_train: int
    compared: list[dict[str, Any]]

    def chosen(self) -> dict[str, Any]:
        """Settings and how they came about, for reports."""
        chosen = {
            **self.choice.settings,
            "score": self.choice.score,
            "chosen_on": self.choice.chosen_on,
            "candidates": self.choice.table,
        }
        return {**chosen, "solvers": self.compared} if self.compared else chosen


def make_solvers(config: TrainHeadConfig, class_names: list[str]) -> list[Solver]:
    """The solver that the settings name, or those that `auto` tries."""
    if config.solver in ("adam", "sgd"):
        return [StepsSolver(class_names=class_names, config=config)]
    logistic = LogisticSolver(
        class_names=class_names,
        strength=config.strength,
        standardize=config.standardize,
        backend="numpy" if config.backend == "auto" else config.backend,
    )
    if config.solver == "logistic":
        return [logistic]
    ridge = RidgeSolver(
        class_names=class_names, strength=config.strength, standardize=config.standardize
    )
    if config.solver == "ridge":
        return [ridge]
    knn = KnnSolver(class_names=class_names, strength=config.strength)
    return [knn] if config.solver == "knn" else [logistic, ridge, knn]


def run_protocol(
    config: TrainHeadConfig, class_names: list[str], data: Data, test: TestSplit
) -> Run:
    """Choose, fit all of train, score test once.

    Args:
        config: The command's settings.
        class_names: C names.
        data: Rows to learn from: all, or those of a few-shot sample.
        test: What scores.
    """
    timer, train = StageTimer(), data.train
    epochs: list[dict[str, Any]] = []
    with timer("fit"), threads_for(train.views.size * train.num_classes):
        selection = make_selection(train, config, data.val, data.content)
        solver, choice, compared = choose_solver(config, class_names, train, selection)
        if not isinstance(solver, StepsSolver):
            fitted = solver.prepare(train, [choice.settings]).fit(choice.settings)
    if isinstance(solver, StepsSolver):
        # A batch is small whatever the number of rows.
        with threads_for(0):
            fitted, epochs = watch_epochs(solver.epochs(train, [choice.settings]), test)
        timer.seconds["fit"] += sum(epoch["seconds"] for epoch in epochs)
    predicted, confidence = test.score(fitted.head)
    return Run(
        solver=solver,
        choice=choice,
        fitted=fitted,
        predicted=predicted,
        confidence=confidence,
        test_top1=metrics.top1(test.y, predicted),
        epochs=epochs,
        fit_seconds=timer.seconds["fit"],
        num_train=train.num_rows,
        compared=compared,
    )


def choose_solver(
    config: TrainHeadConfig, class_names: list[str], train: Rows, selection: Selection
) -> tuple[Solver, Choice, list[dict[str, Any]]]:
    """Choose settings, and among several solvers the one with the best selection score.

    Returns:
        Solver, choice, and for several solvers what each reached; ties go to the first.
    """
    solvers = make_solvers(config, class_names)
    if len(solvers) > 1 and not selection.pairs:
        solvers = solvers[:1]  # nothing can tell them apart: logistic regression
    return best_of(solvers, lambda solver: choose(solver, train, selection))


def best_of(
    solvers: Sequence[Solver], choose_for: Callable[[Solver], Choice]
) -> tuple[Solver, Choice, list[dict[str, Any]]]:
    """Choose each solver's settings, then the solver; returns as `choose_solver` does."""
    tried, compared = [], []
    for solver in solvers:
        start = time.perf_counter()
        choice = choose_for(solver)
        seconds = time.perf_counter() - start
        tried.append((solver, choice))
        reached = {"score": choice.best_score, "seconds": seconds}
        compared.append({"solver": solver.name, **choice.settings, **reached})
    best = max(tried, key=lambda pair: pair[1].best_score or 0.0)
    return *best, compared if len(tried) > 1 else []


def watch_epochs(
    training: Iterator[tuple[Epoch, list[LinearHead]]], test: TestSplit
) -> tuple[Fitted, list[dict[str, Any]]]:
    """Train one head to the end; test accuracy after each epoch is shown, not used."""
    epochs: list[dict[str, Any]] = []
    for epoch, heads in training:
        start = time.perf_counter()
        predicted, _ = test.score(heads[0])
        epochs.append(
            {
                "epoch": len(epochs) + 1,
                "train_loss": epoch.losses[0],
                "test_top1": metrics.top1(test.y, predicted),
                "seconds": epoch.seconds,
                "eval_seconds": time.perf_counter() - start,
            }
        )
    return Fitted(head=heads[0], num_passes=len(epochs)), epochs

"""The protocol in bounded memory: `train-head --stream`.

One first pass keeps held-out rows and a sample in memory and adds up moments. ridge needs no other
pass. logistic chooses its strength by fitting the sample (scikit-learn's C means the same prior
whatever the number of rows), then fits all rows in passes that begin where the sample ended, with
the curvature learnt there. adam and sgd read shuffled windows, see row_stream.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from featcache.cache import FeatureCache, FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.heads.closed_solvers import RidgeSolver
from featcache.heads.data import TestSplit
from featcache.heads.logistic_solver import LogisticSolver
from featcache.heads.protocol import Run, best_of, make_solvers, watch_epochs
from featcache.heads.row_stream import open_stream
from featcache.heads.steps_solver import StepsSolver
from featcache.heads.stream_solvers import (
    choose_streamed,
    first_pass,
    fit_logistic_streamed,
    fit_ridge_streamed,
    refuse_unstreamable,
    train_steps_streamed,
)
from featcache.results import metrics
from featcache.runtime import StageTimer

# With --stream auto, train splits larger than this part of the free memory are streamed.
MEMORY_SHARE = 0.25


def wants_stream(config: TrainHeadConfig, split: FeatureSplit) -> bool:
    """Whether to stream: as --stream says, or when train is large against free memory.

    Few-shot samples are small whatever the size of train: they are never streamed by themselves.

    Raises:
        UserError: What was asked for needs all rows in memory.
    """
    size = split.num_views * len(split) * split.dim * 4
    large = size > MEMORY_SHARE * available_memory() and config.shots is None
    if config.stream == "off" or not (large or config.stream == "on"):
        return False
    refuse_unstreamable(config, split)
    return True


def available_memory() -> int:
    """Bytes of memory that can be used without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # Linux
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run_stream(config: TrainHeadConfig, cache: FeatureCache, test: TestSplit) -> Run:
    """Choose on held-out rows, fit all of train, score test once, in bounded memory."""
    timer = StageTimer()
    stream = open_stream(config, cache.split("train"), cache.class_names)
    solvers = [s for s in make_solvers(config, cache.class_names) if s.name != "knn"]
    closed_form = any(isinstance(solver, RidgeSolver) for solver in solvers)
    epochs: list[dict[str, Any]] = []
    with timer("fit"):
        first = first_pass(config, stream, closed_form=closed_form)
        name = f"a held-out random {first.held.num_rows} rows of train, seed {config.seed}"
        solver, choice, compared = best_of(
            solvers, lambda solver: choose_streamed(solver, stream, first, name)
        )
        if isinstance(solver, LogisticSolver):
            fitted = fit_logistic_streamed(solver, choice.settings, stream, first)
        elif isinstance(solver, RidgeSolver):
            fitted = fit_ridge_streamed(solver, choice.settings, first)
    if isinstance(solver, StepsSolver):
        settings = [choice.settings]
        training = train_steps_streamed(solver, stream, first, settings, whole=True)
        fitted, epochs = watch_epochs(training, test)
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
        num_train=stream.num_rows,
        compared=compared,
    )

"""`train-head`: choose without the test split, fit all of train, score test once, write both.

The protocol: candidates are fitted to a part of train and scored on the rest (choose.py); the best
is fitted to all of train; the test split is scored once. The accuracy after each epoch of adam and
sgd is printed because the notebook prints it; nothing is chosen by it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache import metrics
from featcache.cache import FeatureCache, FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.choose import Choice, choose, make_selection
from featcache.heads.files import Head, save_head
from featcache.heads.linear import Floats
from featcache.heads.logistic_solver import LogisticSolver
from featcache.heads.rows import Ints, Rows, balanced_weights, check_classes, check_rows
from featcache.heads.solver import Fitted, Solver
from featcache.heads.steps_solver import StepsSolver
from featcache.report import RunReport
from featcache.report.run import Predictions
from featcache.runtime import StageTimer, environment


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A cache's splits, checked and ready.

    Attributes:
        cache: Where they come from.
        train: What heads learn from.
        content: A digest per train row [N, 32].
        val: The dataset's own validation rows, if it has any.
        test: What heads are scored on, once.
        test_ids: Their names.
    """

    cache: FeatureCache
    train: Rows
    content: Any
    val: Rows | None
    test: Rows
    test_ids: list[str]


def train_head(config: TrainHeadConfig) -> dict[str, Any]:
    """Fit a head on a cache, score it, write it and its report.

    Args:
        config: The command's settings.

    Returns:
        The report as `--json` prints it; the report file also has the test predictions.

    Raises:
        UserError: The cache or the settings are wrong.
        StorageError: The head cannot be written.
    """
    timer = StageTimer()
    with timer("total"):
        check_settings(config)
        data = load_data(config)
        run = run_protocol(config, data, data.train, data.content)
        path = head_path(config)
        provenance = provenance_of(data.cache)
        scores = {"val_top1": run.choice.val_top1, "test_top1": run.test_top1}
        head = run.fitted.head.replace(
            chosen=json.loads(json.dumps(run.chosen())), scores=scores, provenance=provenance
        )
        save_head(path, head)
    report = make_report(config, data, run, path, provenance, timer.seconds["total"])
    report.save(path.with_suffix(".json"))
    return report.to_json()


def check_settings(config: TrainHeadConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: Naming what to leave out.
    """
    if config.backend == "sklearn" and config.solver != "logistic":
        raise UserError(f"--backend sklearn fits logistic only: leave it out for {config.solver}")
    if config.backend == "torch" and config.solver in ("ridge", "knn"):
        raise UserError(f"--backend torch fits logistic, adam and sgd: leave it out for "
                        f"{config.solver}")  # fmt: skip
    if config.sweep and config.solver not in ("adam", "sgd"):
        raise UserError(f"--sweep is for adam and sgd: leave it out for {config.solver}")
    if config.strength is not None and config.solver in ("adam", "sgd"):
        raise UserError("--strength is for logistic, ridge and knn: give --weight-decay instead")


def head_path(config: TrainHeadConfig) -> Path:
    """Where the head goes: --output, or a name in --cache-dir made from cache and solver."""
    if config.output is None:
        return config.cache_dir / f"{config.cache.stem}.{config.solver}.safetensors"
    if config.output.suffix != ".safetensors":
        raise UserError(f"--output {config.output}: a head's name ends in .safetensors")
    return config.output


def load_data(config: TrainHeadConfig) -> Data:
    """Read the splits that a head needs.

    Raises:
        UserError: A split is missing, or its rows are of no use.
    """
    cache = FeatureCache(config.cache)
    for name in ("train", "test"):
        if name not in cache.splits:
            raise UserError(
                f"{config.cache} has splits {', '.join(cache.splits)} but no {name}: run "
                "extract-features on a dataset with train and test (or with --test-fraction)"
            )
    splits = {name: cache.split(name) for name in ("train", "test", "val") if name in cache.splits}
    rows = {name: load_rows(split, cache.class_names) for name, split in splits.items()}
    train = rows["train"]
    check_classes(train.y, cache.class_names)
    if config.class_weight == "balanced":
        weights = train.weights * balanced_weights(train.y, train.num_classes)
        train = dataclasses.replace(train, weights=weights)
    return Data(
        cache=cache,
        train=train,
        content=splits["train"].content,
        val=rows.get("val"),
        test=rows["test"],
        test_ids=splits["test"].ids,
    )


def load_rows(split: FeatureSplit, class_names: Sequence[str]) -> Rows:
    """One split as checked rows.

    Raises:
        UserError: It has no rows, or rows that are of no use.
    """
    views = split.views
    check_rows(views, split.y, split.ids, class_names, split.name)
    weights = np.ones(len(split)) if split.weights is None else split.weights.astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError(f"the weights of {split.name} must be numbers from 0 on, not all 0")
    return Rows(views=views, y=split.y, weights=weights, num_classes=len(class_names))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One pass through the protocol.

    Attributes:
        solver: The one that won.
        choice: How its settings were chosen.
        fitted: On all of train.
        probabilities: Of the test rows, [N, C].
        predicted: Their classes, [N].
        test_top1: The share that is right.
        epochs: Loss and accuracy after each epoch, for adam and sgd.
        fit_seconds: Wall time of choosing and fitting.
    """

    solver: Solver
    choice: Choice
    fitted: Fitted
    probabilities: Floats
    predicted: Ints
    test_top1: float
    epochs: list[dict[str, Any]]
    fit_seconds: float

    def chosen(self) -> dict[str, Any]:
        """Settings and how they came about, for reports."""
        return {
            **self.choice.settings,
            "score": self.choice.score,
            "chosen_on": self.choice.chosen_on,
            "candidates": self.choice.table,
        }


def make_solver(config: TrainHeadConfig, class_names: list[str]) -> Solver:
    """The solver that the settings name."""
    if config.solver in ("adam", "sgd"):
        return StepsSolver(class_names=class_names, config=config)
    if config.solver != "logistic":
        raise UserError(f"--solver {config.solver} is not here yet: logistic, adam or sgd")
    return LogisticSolver(
        class_names=class_names,
        strength=config.strength,
        standardize=config.standardize,
        backend="numpy" if config.backend == "auto" else config.backend,
    )


def run_protocol(config: TrainHeadConfig, data: Data, train: Rows, content: Any) -> Run:
    """Choose, fit all of train, score test once."""
    timer = StageTimer()
    solver = make_solver(config, data.cache.class_names)
    epochs: list[dict[str, Any]] = []
    with timer("fit"):
        choice = choose(solver, train, make_selection(train, config, data.val, content))
        if not isinstance(solver, StepsSolver):
            fitted = solver.prepare(train, [choice.settings]).fit(choice.settings)
    if isinstance(solver, StepsSolver):
        fitted, epochs = watch_epochs(solver, train, choice, data.test, config)
        timer.seconds["fit"] += sum(epoch["seconds"] for epoch in epochs)
    probabilities = probabilities_of(fitted.head, data.test, config)
    predicted = probabilities.argmax(axis=1).astype(np.int64)
    return Run(
        solver=solver,
        choice=choice,
        fitted=fitted,
        probabilities=probabilities,
        predicted=predicted,
        test_top1=metrics.top1(data.test.y, predicted),
        epochs=epochs,
        fit_seconds=timer.seconds["fit"],
    )


def watch_epochs(
    solver: StepsSolver, train: Rows, choice: Choice, test: Rows, config: TrainHeadConfig
) -> tuple[Fitted, list[dict[str, Any]]]:
    """Train with the chosen settings; test accuracy after each epoch is shown, not used."""
    epochs = []
    for number, (epoch, heads) in enumerate(solver.epochs(train, [choice.settings]), start=1):
        start = time.perf_counter()
        probabilities = probabilities_of(heads[0], test, config)
        epochs.append(
            {
                "epoch": number,
                "train_loss": epoch.losses[0],
                "test_top1": metrics.top1(test.y, probabilities.argmax(axis=1)),
                "seconds": epoch.seconds,
                "eval_seconds": time.perf_counter() - start,
            }
        )
    return Fitted(head=heads[0], num_passes=config.epochs), epochs


def probabilities_of(head: Head, test: Rows, config: TrainHeadConfig) -> Floats:
    """Probabilities [N, C] of view 0, or with `--tta` their mean over the views."""
    views = test.views if config.tta else test.views[:1]
    total = head.predict_proba(views[0])
    for view in views[1:]:
        total = total + head.predict_proba(view)
    return np.asarray(total / len(views))


def provenance_of(cache: FeatureCache) -> dict[str, Any]:
    """What the features are: the cache's metadata, name and digest."""
    meta = dataclasses.asdict(cache.meta)
    return {**meta, "cache": cache.path.name, "cache_digest": cache.digest.hex()}


def make_report(
    config: TrainHeadConfig,
    data: Data,
    run: Run,
    path: Path,
    provenance: dict[str, Any],
    seconds: float,
) -> RunReport:
    """Everything that was measured, as the command reports it."""
    test, names = data.test, data.cache.class_names
    recalls = metrics.per_class(test.y, run.predicted, len(names))
    num_views = len(test.views) if config.tta else 1
    view_name = f"mean over {num_views} views" if config.tta else "view 0"
    more = {
        "head": str(path),
        "solver": run.solver.name,
        "backend": run.solver.backend,
        "val_top1": run.choice.val_top1,
        "balanced_top1": metrics.balanced(test.y, run.predicted, len(names)),
        "per_class": {
            name: None if math.isnan(recall) else recall
            for name, recall in zip(names, recalls, strict=True)
        },
        "fit_seconds": run.fit_seconds,
        "chosen": run.chosen(),
        "converged": run.fitted.converged,
        "num_train": data.train.num_rows,
        "num_test": test.num_rows,
    }
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return RunReport(
        command="train-head",
        trainable_params=run.fitted.head.num_params,
        test_top1=run.test_top1,
        test_interval=metrics.wilson_interval(int((run.predicted == test.y).sum()), test.num_rows),
        seconds_total=seconds,
        epochs=run.epochs,
        scored_on=f"test, {view_name} ({test.num_rows} rows)",
        chosen_on=run.choice.chosen_on,
        config=settings,
        provenance=provenance,
        environment=environment(),
        more=more,
        class_names=names,
        test=Predictions(
            ids=data.test_ids,
            labels=test.y.tolist(),
            predicted=run.predicted.tolist(),
            confidence=np.round(run.probabilities.max(axis=1), 6).tolist(),
        ),
    )

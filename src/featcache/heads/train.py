"""`train-head`: choose without the test split, fit all of train, score test once, write files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from featcache.cache import FeatureCache
from featcache.config import JsonObject, StageColumns, TrainHeadConfig, config_json
from featcache.display import say
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.groups import draw_shots
from featcache.heads.calibration import fit_decision, fit_known, out_of_fold, positive_class
from featcache.heads.columns import num_params, on_columns
from featcache.heads.features import Ints
from featcache.heads.files import MARKS, Head, save_head
from featcache.heads.scoring import TestPredictions, TestSplit, open_test
from featcache.heads.selection import Choice, InMemoryData, choose_solver
from featcache.heads.solvers.base import FittedHead, Solver, threads_for
from featcache.heads.solvers.knn import KnnSolver
from featcache.heads.solvers.logistic import LogisticSolver
from featcache.heads.solvers.ridge import RidgeSolver
from featcache.heads.solvers.sgd import SgdSolver
from featcache.heads.streaming import StreamedData, open_data
from featcache.heads.summary import ShotScore, shots_summary
from featcache.heads.targets import target_head
from featcache.heads.training_data import extraction_of, open_cache
from featcache.results import RunReport, metrics, report_marks
from featcache.runtime import StageTimer, environment

# What sets the strength of each solver's regularization; for knn, its number of neighbors.
STRENGTH_FLAGS = {"logistic": "C", "ridge": "alpha", "knn": "k"}


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRun:
    """One pass through the protocol: choose, refit, score once.

    Attributes:
        solver: The one that won.
        choice: How its settings were chosen.
        fitted: On all of train.
        tested: Predictions of the test rows.
        test_top1: The share that is right.
        fit_seconds: Wall time of choosing and fitting.
        num_train: Rows that were fitted, views not counted.
        compared: For `auto`, what each solver reached.
    """

    solver: Solver
    choice: Choice
    fitted: FittedHead[Head]
    tested: TestPredictions
    test_top1: float
    fit_seconds: float
    num_train: int
    compared: list[JsonObject]

    def chosen(self) -> JsonObject:
        """Settings and how they were chosen, for reports."""
        chosen = {
            **self.choice.settings,
            "score": self.choice.score,
            "chosen_on": self.choice.chosen_on,
            "candidates": self.choice.table,
        }
        return {**chosen, "solvers": self.compared} if self.compared else chosen


def train_head(config: TrainHeadConfig) -> JsonObject:
    """Do the work of the command `train-head`, as `train_head_report` does.

    Returns:
        The command's JSON report.
    """
    return train_head_report(config).to_json()


def train_head_report(config: TrainHeadConfig, rows: Ints | None = None) -> RunReport:
    """Fit a head on a cache, score it, write it and its report.

    Args:
        config: The command's settings.
        rows: Learn from these train rows alone, and choose on a part of them; all unless given.

    Returns:
        What the run measured, as in the report file.

    Raises:
        UserError: The cache or the settings are wrong, or a file of another kind would be
            replaced.
        StorageError: The head cannot be written.
    """
    report, head = fit_and_score(config, rows)
    write_head(report, head)
    return report


def fit_and_score(config: TrainHeadConfig, rows: Ints | None = None) -> tuple[RunReport, Head]:
    """As `train_head_report`, but the head is returned too and no file is written."""
    timer = StageTimer()
    with timer("total"):
        check_settings(config)
        config = without_strength(config)
        cache = of_features(open_cache(config))
        if config.threshold_for is not None:
            positive_class(config, cache.class_names)
        path = head_path(config, cache)
        outputs = {path: MARKS, path.with_suffix(".json"): report_marks("train-head")}
        check_outputs(outputs, [config.cache])
        provenance = provenance_of(cache)
        if cache.meta.dataset.task == "multiclass":
            head, fields = _class_head(config, cache, rows)
        else:
            head, fields = target_head(config, cache)
        head = head.replace(provenance=provenance)
    more = {"head": str(path), "extraction": extraction_of(cache)}
    more |= {"run": run_key(config, cache, rows)[:16], **fields.pop("more")}
    report = RunReport(
        command="train-head",
        seconds_total=timer.seconds["total"],
        config=config_json(config),
        provenance=provenance,
        environment=environment(),
        class_names=cache.class_names,
        more=more,
        **fields,
    )
    return report, head


def write_head(report: RunReport, head: Head) -> None:
    """Write a head where its report says, and the report beside it.

    Raises:
        StorageError: A file cannot be written.
    """
    path = Path(report.more["head"])
    save_head(path, head)
    report.save(path.with_suffix(".json"))


def _class_head(
    config: TrainHeadConfig, cache: FeatureCache, rows: Ints | None
) -> tuple[Head, JsonObject]:
    """A head for images of one class each, and the report's fields that depend on it."""
    run, test, more = run_all(config, cache, rows)
    scores = {"val_top1": run.choice.val_top1, "test_top1": run.test_top1}
    head = run.fitted.head.replace(chosen=json.loads(json.dumps(run.chosen())), scores=scores)
    found = test.evaluate(run.tested, head, config.seed)
    return head, {
        "trainable_params": num_params(head, cache.meta.backbone.stages),
        "test_top1": run.test_top1,
        "test_interval": found.interval,
        "epochs": run.fitted.epochs,
        "scored_on": test.name,
        "chosen_on": run.choice.chosen_on,
        "more": more | solver_fields(run, test) | {"without_leaks": test.without_leaks(run.tested)},
        "scores": found.scores,
        "calibration": found.calibration,
        "test": found.test,
    }


def run_all(
    config: TrainHeadConfig, cache: FeatureCache, rows: Ints | None
) -> tuple[HeadRun, TestSplit, JsonObject]:
    """The protocol once, or on each few-shot sample.

    With given rows or --shots, settings are chosen within each sample, since a large val split is
    no few-shot choice; with --shots the first sample's head is kept.

    Returns:
        The run, the test split, and fields for the report.
    """
    data, stages = open_data(config, cache, rows), cache.meta.backbone.stages
    test = open_test(config, cache, in_memory=not data.streamed)
    more: JsonObject = {"streamed": data.streamed}
    if config.shots is None or rows is not None:
        return run_protocol(config, data, test, stages), test, more
    assert isinstance(data, InMemoryData)  # --shots is never streamed
    labels, names = data.train.y, data.train.class_names
    samples = [
        draw_shots(labels, config.shots, config.seed, i, data.groups)
        for i in range(config.num_seeds)
    ]
    runs = [run_protocol(config, data.take(index), test, stages) for index in samples]
    scores: list[ShotScore] = [
        {"seed": i, "test_top1": run.test_top1, "val_top1": run.choice.val_top1}
        for i, run in enumerate(runs)
    ]
    return runs[0], test, {**more, "shots": shots_summary(config.shots, labels, names, scores)}


def run_protocol(
    config: TrainHeadConfig,
    data: InMemoryData | StreamedData,
    test: TestSplit,
    stages: StageColumns | None = None,
) -> HeadRun:
    """Choose, fit all of train, score test once.

    Args:
        config: The command's settings.
        data: What to learn from.
        test: What scores.
        stages: Which columns are which, if the features have several stages.
    """
    timer = StageTimer()
    with timer("fit"):
        selection = data.selection(config)
        train = selection.train
        with threads_for(train.num_values * train.num_classes):
            solvers = make_solvers(config, test, streamed=data.streamed)
            if not data.streamed:
                solvers = [on_columns(solver, config, stages) for solver in solvers]
            elif config.columns not in ("auto", "all"):
                raise UserError(
                    f"--columns {config.columns} needs rows in memory, and these are streamed: add "
                    "--stream off, or leave --columns out"
                )
            solver, choice, compared = choose_solver(solvers, selection)
            fitted = solver.prepare(train, [choice.settings]).fit(choice.settings)
            held = out_of_fold(solver, choice, selection, config.seed)
    decision = fit_decision(held, config, fitted.head, selection.name)
    known = fit_known(held, decision, train.sample, config.seed)
    head = fitted.head.replace(decision=decision, known=known)
    fitted = dataclasses.replace(fitted, head=head)
    scoring = sum(epoch["eval_seconds"] for epoch in fitted.epochs)
    tested = test.predict(fitted.head)
    return HeadRun(
        solver=solver,
        choice=choice,
        fitted=fitted,
        tested=tested,
        test_top1=metrics.top1(test.y, tested.classes),
        fit_seconds=timer.seconds["fit"] - scoring,
        num_train=train.num_rows,
        compared=compared,
    )


def make_solvers(config: TrainHeadConfig, test: TestSplit, *, streamed: bool) -> list[Solver]:
    """The solver that the settings name, or those that `auto` tries.

    Args:
        config: The command's settings.
        test: Is scored after each epoch of adam and sgd.
        streamed: Whether rows are not in memory, as knn needs them.
    """
    logistic = LogisticSolver(
        C=config.C,
        standardize=config.standardize,
        backend="numpy" if config.backend == "auto" else config.backend,
    )
    ridge = RidgeSolver(alpha=config.alpha, standardize=config.standardize)
    knn = KnnSolver(k=config.k)
    if config.solver == "auto":
        return [logistic, ridge] if streamed else [logistic, ridge, knn]
    if config.solver in ("adam", "sgd"):

        def score(head: Head) -> float:
            return metrics.top1(test.y, test.predict(head).classes)

        return [SgdSolver(config=config, score_epoch=score)]
    return [solver for solver in (logistic, ridge, knn) if solver.name == config.solver]


def check_settings(config: TrainHeadConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: Naming what to leave out.
    """
    solver = config.solver
    if config.backend == "sklearn" and solver != "logistic":
        raise UserError(f"--backend sklearn fits logistic only: leave it out for {solver}")
    if config.backend == "torch" and solver not in ("logistic", "adam", "sgd"):
        raise UserError(f"--backend torch fits logistic, adam and sgd: leave it out for {solver}")
    if config.sweep and solver not in ("adam", "sgd"):
        raise UserError(f"--sweep is for adam and sgd: leave it out for {solver}")
    if config.sweep and config.backend == "torch":
        raise UserError("--sweep trains in numpy: leave --backend torch out")
    if config.lr is not None and solver not in ("adam", "sgd"):
        raise UserError(f"--lr is for adam and sgd: leave it out for {solver}")
    if config.standardize != "auto" and solver == "knn":
        raise UserError("knn compares features as they are: leave --standardize out")
    if config.columns not in ("auto", "all") and (solver == "knn" or config.stream == "on"):
        raise UserError(
            f"--columns {config.columns} needs a linear solver and rows in memory: leave it out"
        )
    for owner, flag in STRENGTH_FLAGS.items():
        if getattr(config, flag) is not None and owner != solver:
            own = STRENGTH_FLAGS.get(solver, "weight-decay")
            instead = f"give --{own} for {solver}"
            if solver == "auto":
                instead = f"leave it out for auto, or add --solver {owner}"
            raise UserError(f"--{flag} is for {owner}: {instead}")


def without_strength(config: TrainHeadConfig) -> TrainHeadConfig:
    """The settings with `--strength` under the name that the solver gives it; says so.

    Raises:
        UserError: The solver has no strength, has two, or needs a whole number.
    """
    value, solver = config.strength, config.solver
    if value is None:
        return config
    if solver in ("adam", "sgd"):
        raise UserError("--strength is for logistic, ridge and knn: give --weight-decay instead")
    if solver == "auto":
        raise UserError("--strength means something else to each solver: name one with --solver")
    flag = STRENGTH_FLAGS[solver]
    if getattr(config, flag) is not None:
        raise UserError(f"--strength is the old name of --{flag}: give one of them")
    if flag == "k" and (value < 1 or value % 1):
        raise UserError(f"--strength {value:g}: knn needs a whole number of neighbors")
    say(f"--strength is the old name of --{flag}: give --{flag} {value:g} for {solver}")
    renamed: JsonObject = {flag: int(value) if flag == "k" else value}
    return dataclasses.replace(config, strength=None, **renamed)


def head_path(config: TrainHeadConfig, cache: FeatureCache) -> Path:
    """Where the head goes: --output, or a name beside the cache, from its content and the settings.

    Raises:
        UserError: The name does not end as head files do.
    """
    if config.output is None:
        key = run_key(config, cache)[:8]
        folder = config.cache.parent if config.cache_dir is None else config.cache_dir
        return folder / f"{config.cache.stem}.{config.solver}-{key}.safetensors"
    if config.output.suffix != ".safetensors":
        raise UserError(f"--output {config.output}: a head's name ends in .safetensors")
    return config.output


def run_key(config: TrainHeadConfig, cache: FeatureCache, rows: Ints | None = None) -> str:
    """Identify a run by its settings, the cache's content and the chosen rows: 64 hex digits."""
    asked = {**config_json(config), "cache": cache.digest.hex()}
    for name in ("json", "verbose", "output", "cache_dir"):
        del asked[name]
    if rows is not None:
        asked["rows"] = hashlib.sha256(rows.tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def of_features(cache: FeatureCache) -> FeatureCache:
    """The cache, unless it is one of activations.

    Raises:
        UserError: It is one.
    """
    if (cut := cache.meta.backbone.stage_input) is not None:
        raise UserError(
            f"{cache.path} holds the input of {cut.stage}, not features: type featcache finetune "
            f"DATASET --from-stage {cut.stage} to train on it, or extract-features without "
            "--from-stage for a cache that heads can use"
        )
    return cache


def provenance_of(cache: FeatureCache) -> JsonObject:
    """What the features are: the cache's metadata, name and digest."""
    return {**cache.meta.to_dict(), "cache": cache.path.name, "cache_digest": cache.digest.hex()}


def solver_fields(run: HeadRun, test: TestSplit) -> JsonObject:
    """The report's fields that only this command has."""
    class_names, threshold = run.fitted.head.class_names, run.fitted.head.decision.threshold
    num_classes, predicted = len(class_names), run.tested.classes
    recalls = metrics.per_class(test.y, predicted, num_classes)
    return {
        "solver": run.solver.name,
        "backend": run.solver.backend,
        "val_top1": run.choice.val_top1,
        "balanced_top1": metrics.balanced(test.y, predicted, num_classes),
        "per_class": {
            name: None if math.isnan(recall) else recall
            for name, recall in zip(class_names, recalls, strict=True)
        },
        "threshold": threshold
        and {"class": class_names[threshold.positive], **dataclasses.asdict(threshold)},
        "rejections": run.tested.rejections(predicted == test.y),
        "fit_seconds": run.fit_seconds,
        "chosen": run.chosen(),
        "converged": run.fitted.converged,
        "num_passes": run.fitted.num_passes,
        "num_train": run.num_train,
        "num_test": test.num_rows,
    }

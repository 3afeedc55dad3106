"""`train-head`: choose without the test split, fit all of train, score test once, write both.

The protocol is in protocol.py. The accuracy after each epoch of adam and sgd is printed because
the notebook prints it; nothing is chosen by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from featcache.cache import FeatureCache, cost_of, seconds_of
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.heads.data import TestSplit, load_data, open_cache, open_test
from featcache.heads.files import MARKS, save_head
from featcache.heads.protocol import Run, run_protocol
from featcache.heads.rows import Ints
from featcache.heads.shots import draw_shots, shots_summary
from featcache.heads.stream import run_stream, wants_stream
from featcache.results import RunReport, config_json, metrics, report_marks
from featcache.results.runs import Predictions
from featcache.runtime import StageTimer, environment


def train_head(config: TrainHeadConfig) -> dict[str, Any]:
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
        UserError: The cache or the settings are wrong, or a stranger's file would be replaced.
        StorageError: The head cannot be written.
    """
    timer = StageTimer()
    with timer("total"):
        check_settings(config)
        cache = open_cache(config)
        path = head_path(config, cache)
        outputs = {path: MARKS, path.with_suffix(".json"): report_marks("train-head")}
        check_outputs(outputs, [config.cache])
        run, test, more = run_all(config, cache, rows)
        provenance = provenance_of(cache)
        scores = {"val_top1": run.choice.val_top1, "test_top1": run.test_top1}
        head = run.fitted.head.replace(
            chosen=json.loads(json.dumps(run.chosen())), scores=scores, provenance=provenance
        )
        save_head(path, head)
    more = {"head": str(path), **more, "extraction": extraction_of(cache)}
    more |= {"run": run_key(config, cache, rows)[:16]}
    more |= solver_fields(run, test, cache.class_names)
    report = RunReport(
        command="train-head",
        trainable_params=head.num_params,
        test_top1=run.test_top1,
        test_interval=metrics.wilson_interval(int((run.predicted == test.y).sum()), test.num_rows),
        seconds_total=timer.seconds["total"],
        epochs=run.epochs,
        scored_on=test.name,
        chosen_on=run.choice.chosen_on,
        config=config_json(config),
        provenance=provenance,
        environment=environment(),
        more=more,
        class_names=cache.class_names,
        test=Predictions(
            ids=test.ids,
            labels=test.y.tolist(),
            predicted=run.predicted.tolist(),
            confidence=[round(p, 6) for p in run.confidence.tolist()],
        ),
    )
    report.save(path.with_suffix(".json"))
    return report


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
    if config.strength is not None and solver in ("adam", "sgd"):
        raise UserError("--strength is for logistic, ridge and knn: give --weight-decay instead")
    if config.strength is not None and solver == "auto":
        raise UserError("--strength means something else to each solver: name one with --solver")


def head_path(config: TrainHeadConfig, cache: FeatureCache) -> Path:
    """Where the head goes: --output, or a name beside the cache made from its content and settings.

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


def run_all(
    config: TrainHeadConfig, cache: FeatureCache, rows: Ints | None
) -> tuple[Run, TestSplit, dict[str, Any]]:
    """The protocol in memory, as a stream, on given rows, or on each few-shot sample.

    With given rows or --shots, settings are chosen within each sample, since a large val split is
    no few-shot choice; with --shots the first sample's head is kept.

    Returns:
        The run, the test split, and fields for the report.
    """
    names = cache.class_names
    streamed = rows is None and wants_stream(config, cache.split("train"))
    test = open_test(config, cache, in_memory=not streamed)
    if streamed:
        return run_stream(config, cache, test), test, {"streamed": True}
    data = load_data(cache)
    if rows is not None or config.shots is None:
        part = (data if rows is None else data.take(rows)).ready(config, names)
        return run_protocol(config, names, part, test), test, {"streamed": False}
    runs = []
    for number in range(config.num_seeds):
        index = draw_shots(data.train.y, config.shots, config.seed, number)
        few = data.take(index).ready(config, names)
        runs.append(run_protocol(config, names, few, test))
    scores = [
        {"seed": i, "test_top1": run.test_top1, "val_top1": run.choice.val_top1}
        for i, run in enumerate(runs)
    ]
    shots = shots_summary(config.shots, data.train.y, names, scores)
    return runs[0], test, {"streamed": False, "shots": shots}


def provenance_of(cache: FeatureCache) -> dict[str, Any]:
    """What the features are: the cache's metadata, name and digest."""
    meta = dataclasses.asdict(cache.meta)
    return {**meta, "cache": cache.path.name, "cache_digest": cache.digest.hex()}


def extraction_of(cache: FeatureCache) -> dict[str, Any] | None:
    """What extract-features recorded beside the cache: seconds and settings; None if nothing."""
    record = cost_of(cache.path, cache.digest)
    if record is None:
        return None
    return {"seconds": seconds_of(record), "config": record.get("config")}


def solver_fields(run: Run, test: TestSplit, class_names: list[str]) -> dict[str, Any]:
    """The report's fields that only this command has."""
    num_classes = len(class_names)
    recalls = metrics.per_class(test.y, run.predicted, num_classes)
    return {
        "solver": run.solver.name,
        "backend": run.solver.backend,
        "val_top1": run.choice.val_top1,
        "balanced_top1": metrics.balanced(test.y, run.predicted, num_classes),
        "per_class": {
            name: None if math.isnan(recall) else recall
            for name, recall in zip(class_names, recalls, strict=True)
        },
        "fit_seconds": run.fit_seconds,
        "chosen": run.chosen(),
        "converged": run.fitted.converged,
        "num_passes": run.fitted.num_passes,
        "num_train": run.num_train,
        "num_test": test.num_rows,
    }

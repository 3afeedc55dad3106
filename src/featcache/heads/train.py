"""`train-head`: choose without the test split, fit all of train, score test once, write both.

The protocol is in protocol.py. The accuracy after each epoch of adam and sgd is printed because
the notebook prints it; nothing is chosen by it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from featcache import metrics
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.data import Data, load_data, open_cache
from featcache.heads.files import save_head
from featcache.heads.protocol import Run, run_protocol
from featcache.heads.shots import draw_shots, shots_summary
from featcache.report import RunReport
from featcache.report.run import Predictions
from featcache.runtime import StageTimer, environment


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
        path = head_path(config)
        data = load_data(config, open_cache(config))
        run, shots = run_all(config, data)
        provenance = provenance_of(data.cache)
        scores = {"val_top1": run.choice.val_top1, "test_top1": run.test_top1}
        head = run.fitted.head.replace(
            chosen=json.loads(json.dumps(run.chosen())), scores=scores, provenance=provenance
        )
        save_head(path, head)
    more = {"head": str(path), **({"shots": shots} if shots else {})}
    report = make_report(config, data, run, provenance, timer.seconds["total"], more)
    report.save(path.with_suffix(".json"))
    return report.to_json()


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
    if config.strength is not None and solver in ("adam", "sgd"):
        raise UserError("--strength is for logistic, ridge and knn: give --weight-decay instead")
    if config.strength is not None and solver == "auto":
        raise UserError("--strength means something else to each solver: name one with --solver")


def head_path(config: TrainHeadConfig) -> Path:
    """Where the head goes: --output, or a name in --cache-dir made from cache and solver.

    Raises:
        UserError: The name does not end as head files do.
    """
    if config.output is None:
        return config.cache_dir / f"{config.cache.stem}.{config.solver}.safetensors"
    if config.output.suffix != ".safetensors":
        raise UserError(f"--output {config.output}: a head's name ends in .safetensors")
    return config.output


def run_all(config: TrainHeadConfig, data: Data) -> tuple[Run, dict[str, Any] | None]:
    """The protocol on all of train, or on each few-shot sample; the first sample's head is kept.

    With --shots, settings are chosen within the sample: a large val split is no few-shot choice.
    """
    if config.shots is None:
        return run_protocol(config, data, data.train, data.content, data.val), None
    runs = []
    for number in range(config.num_seeds):
        index = draw_shots(data.train.y, config.shots, config.seed, number)
        rows, content = data.train.take(index), data.content[index]
        runs.append(run_protocol(config, data, rows, content, None))
    scores = [
        {"seed": i, "test_top1": run.test_top1, "val_top1": run.choice.val_top1}
        for i, run in enumerate(runs)
    ]
    return runs[0], shots_summary(config.shots, data.train.y, data.class_names, scores)


def provenance_of(cache: FeatureCache) -> dict[str, Any]:
    """What the features are: the cache's metadata, name and digest."""
    meta = dataclasses.asdict(cache.meta)
    return {**meta, "cache": cache.path.name, "cache_digest": cache.digest.hex()}


def make_report(
    config: TrainHeadConfig,
    data: Data,
    run: Run,
    provenance: dict[str, Any],
    seconds: float,
    more: dict[str, Any],
) -> RunReport:
    """Everything that was measured, as the command reports it."""
    test = data.test
    view = f"mean over {len(test.views)} views" if config.tta else "view 0"
    num_correct = int((run.predicted == test.y).sum())
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return RunReport(
        command="train-head",
        trainable_params=run.fitted.head.num_params,
        test_top1=run.test_top1,
        test_interval=metrics.wilson_interval(num_correct, test.num_rows),
        seconds_total=seconds,
        epochs=run.epochs,
        scored_on=f"test, {view} ({test.num_rows} rows)",
        chosen_on=run.choice.chosen_on,
        config=settings,
        provenance=provenance,
        environment=environment(),
        more={**more, **solver_fields(run, data)},
        class_names=data.class_names,
        test=Predictions(
            ids=data.test_ids,
            labels=test.y.tolist(),
            predicted=run.predicted.tolist(),
            confidence=np.round(run.probabilities.max(axis=1), 6).tolist(),
        ),
    )


def solver_fields(run: Run, data: Data) -> dict[str, Any]:
    """The report's fields that only this command has."""
    test, names = data.test, data.class_names
    recalls = metrics.per_class(test.y, run.predicted, len(names))
    return {
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
        "num_passes": run.fitted.num_passes,
        "num_train": run.num_train,
        "num_test": test.num_rows,
    }

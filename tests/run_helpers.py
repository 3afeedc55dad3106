"""Invented runs: report files as the commands write them, and runs of a learning curve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from featcache.config import FinetuneConfig, TrainHeadConfig, config_json
from featcache.results import Predictions, RunReport
from featcache.results.learning_curve import CurveRun
from featcache.results.reliability import CalibrationReport, reliability
from featcache.results.scores import score_predictions

NAMES = ["cat", "dog", "eel"]
LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
HEAD = [0, 0, 0, 1, 1, 1, 0, 2, 2, 2]  # one cat taken for a dog, one dog for a cat
TUNE = [0, 0, 0, 0, 1, 1, 1, 2, 2, 0]  # one eel taken for a cat
IDS = [f"test/{NAMES[label]}/{i}.png" for i, label in enumerate(LABELS)]
ENVIRONMENT = {"processor": "abacus", "num_cores": 2, "featcache": "0.1.0", "torch": "2.9"}
PROVENANCE = {
    "backbone": {
        "backbone": "resnet18",
        "weights": "bundled",
        "weights_sha256": "ab" * 32,
        "feature_dim": 512,
        "preprocessing": {"image_px": 64, "resize": "squash"},
    },
    "dataset": {"name": "pets", "kind": "folder", "fingerprint": "cd" * 32, "seed": 0},
    "cache": "pets.h5",
}


def predictions(predicted: list[int], ids: list[str] | None = None) -> Predictions:
    confidence = [0.5 + 0.04 * i for i in range(len(predicted))]
    return Predictions(ids=ids or IDS, labels=LABELS, predicted=predicted, confidence=confidence)


def epochs(*top1: float, seconds: float) -> list[dict[str, Any]]:
    return [
        {"epoch": i, "train_loss": 1 / i, "test_top1": t, "seconds": seconds, "eval_seconds": 0.5}
        for i, t in enumerate(top1, start=1)
    ]


def head_report(**changes: Any) -> RunReport:
    values = {
        "command": "train-head",
        "trainable_params": 1539,
        "test_top1": 0.8,
        "test_interval": (0.49, 0.94),
        "seconds_total": 0.5,
        "epochs": [],
        "scored_on": "test, view 0 (10 rows)",
        "chosen_on": "a held-out 20% of train",
        "config": config_json(TrainHeadConfig(cache=Path("cache/pets.h5"))),
        "provenance": PROVENANCE,
        "environment": ENVIRONMENT,
        "more": {"solver": "logistic", "num_train": 30, "num_test": 10},
        "class_names": NAMES,
        "test": predictions(HEAD),
    }
    return RunReport(**{**values, **changes})


def scored(report: RunReport) -> RunReport:
    """The report with scores and calibration as the commands write them, of its predictions."""
    assert report.test is not None
    assert report.class_names is not None
    labels, predicted = np.array(report.test.labels), np.array(report.test.predicted)
    confidence, num_classes = np.array(report.test.confidence), len(report.class_names)
    table = np.repeat(((1 - confidence) / (num_classes - 1))[:, None], num_classes, axis=1)
    table[np.arange(len(labels)), predicted] = confidence
    right = labels == predicted
    return dataclasses.replace(
        report,
        scores=score_predictions(labels, predicted, table, report.class_names),
        calibration=CalibrationReport(
            temperature=1.5,
            fitted_on="a held-out 20% of train",
            before=reliability(right, np.minimum(confidence + 0.1, 1)),
            after=reliability(right, confidence),
        ),
    )


def two_class_report() -> RunReport:
    """A head for two classes, with scores and curves."""
    predicted = [1, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    test = Predictions(
        ids=IDS,
        labels=[1, 0, 0, 0, 0, 1, 1, 0, 1, 1],
        predicted=predicted,
        confidence=[0.5 + 0.04 * i for i in range(len(predicted))],
    )
    rejections = [{"level": 0.05, "unknown": 0.1, "answered_top1": 8 / 9}]
    more = {**head_report().more, "rejections": rejections}
    return scored(head_report(class_names=["no", "yes"], test=test, more=more))


def tune_report(**changes: Any) -> RunReport:
    config = FinetuneConfig(dataset="pets", weights="bundled", epochs=2, lr=1e-4)
    values = {
        "command": "finetune",
        "trainable_params": 11_178_051,
        "test_top1": 0.9,
        "test_interval": (0.6, 0.98),
        "seconds_total": 90.0,
        "epochs": epochs(0.7, 0.9, seconds=40.0),
        "config": config_json(config),
        "more": {"num_train": 30, "num_test": 10, "recipe": {"lr": 1e-4, "unfreeze": []}},
        "test": predictions(TUNE),
    }
    return head_report(**{**values, **changes})


def cell_report(mode: str, size: str, num_train: int, draw: int = 0) -> RunReport:
    """A run of a comparison."""
    make = head_report if mode == "cached" else tune_report
    cost, trial = (6.0, 0.5) if mode == "cached" else (90.0, 90.0)
    cell = {
        "key": "k", "mode": mode, "size": size, "draw": draw, "seed": 42 + draw,
        "cost_seconds": cost, "trial_seconds": trial, "spent_seconds": cost,
    }  # fmt: skip
    report = make()
    return make(more={**report.more, "num_train": num_train, "cell": cell})


def save_pair(folder: Path) -> Path:
    """A head's and a fine-tune's report in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    head_report().save(folder / "head.json")
    tune_report().save(folder / "tune.json")
    return folder


def extraction_json(path: Path) -> None:
    """What `extract-features --json` printed, kept by the user."""
    values = {"command": "extract-features", "cache": "cache/pets.h5", "seconds_total": 5.5}
    path.write_text(json.dumps(values))


NUM_TEST = 500


def cell(
    mode: str,
    size: str,
    num_train: int,
    num_right: int,
    *,
    seed: int = 0,
    cost: float = 1.0,
    trial: float = 0.5,
    first_right: int = 0,
) -> CurveRun:
    """`num_right` of 500 test images right, counted from image `first_right` on."""
    labels = np.arange(NUM_TEST) % 10
    predicted = (labels + 1) % 10
    right = slice(first_right, first_right + num_right)
    predicted[right] = labels[right]
    assert (labels == predicted).sum() == num_right
    return CurveRun(
        mode=mode,
        size=size,
        num_train=num_train,
        seed=seed,
        labels=labels,
        predicted=predicted,
        cost_seconds=cost,
        trial_seconds=trial,
    )


def pair(size: str, num_train: int, cached: int, tuned: int, seed: int = 0) -> list[CurveRun]:
    """Both modes; a fine-tune costs 120 s, a first head 6 s, each further one 0.5 s."""
    return [
        cell("cached", size, num_train, cached, seed=seed, cost=6.0, trial=0.5),
        cell("finetune", size, num_train, tuned, seed=seed, cost=120.0, trial=120.0),
    ]

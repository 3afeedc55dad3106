"""Whether heads' probabilities can be believed, and whether they notice other classes.

For bench_heads.py: calibration error and log loss before and after the temperature, and how well
images of left-out classes are told from the others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.display import say
from featcache.heads import load_head, train_head
from featcache.heads.linear import nearest_distance, softmax
from featcache.results.ranking import rank
from heads_stream import make_cache

SOLVERS = ("logistic", "ridge", "adam")
NUM_DRAWS = 10
NUM_LEFT_OUT = 2
LEVEL = 0.05


def probabilities(caches: tuple[Path, ...], work_dir: Path) -> dict[str, Any]:
    """Both tables, for each cache.

    Args:
        caches: Files that extract-features wrote, of at least four classes.
        work_dir: Where caches without the left-out classes go while they are needed.
    """
    calibrated, unknown = [], []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for path in caches:
            cache = FeatureCache(path)
            for solver in SOLVERS:
                calibrated.append(calibration_of(cache, solver, Path(name)))
                say(calibration_line(calibrated[-1]))
            unknown.append(unknown_of(cache, Path(name)))
            say(unknown_line(unknown[-1]))
    first = "| cache | solver | temperature | calibration error | log loss |"
    second = (
        "| cache | AUROC | by confidence alone | by distance alone | known called unknown "
        "| left-out called unknown |"
    )
    summary = [first, "| --- " * 5 + "|", *map(calibration_line, calibrated)]
    summary += ["", second, "| --- " * 6 + "|", *map(unknown_line, unknown)]
    return {"calibration": calibrated, "unknown": unknown, "summary": summary}


def calibration_of(cache: FeatureCache, solver: Any, folder: Path) -> dict[str, Any]:
    """A head's calibration error and log loss on the test split, without and with temperature."""
    output = folder / f"{cache.path.stem}-{solver}.safetensors"
    report = train_head(TrainHeadConfig(cache=cache.path, solver=solver, output=output))
    head, test = load_head(output), cache.split("test")
    table = softmax(head.decision_function(test.X))
    own = np.maximum(table[np.arange(len(test.y)), test.y], np.finfo(table.dtype).eps)
    calibration = report["calibration"]
    return {
        "cache": cache.path.stem,
        "solver": solver,
        "temperature": calibration["temperature"],
        "ece": [calibration[side]["ece"] for side in ("before", "after")],
        "log_loss": [float(-np.log(own).mean()), report["scores"]["log_loss"]],
    }


def unknown_of(cache: FeatureCache, folder: Path) -> dict[str, Any]:
    """Leave two classes out of train, ten times, and look for their test images."""
    train, test = cache.split("train"), cache.split("test")
    num_classes, random = len(cache.class_names), np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for draw in range(NUM_DRAWS):
        left_out = random.choice(num_classes, NUM_LEFT_OUT, replace=False)
        kept = np.setdiff1d(np.arange(num_classes), left_out)
        known, other = (np.isin(split.y, kept) for split in (train, test))
        splits = {
            "train": (np.asarray(train.X)[known], np.searchsorted(kept, train.y[known])),
            "test": (np.asarray(test.X)[other], np.searchsorted(kept, test.y[other])),
        }
        path = folder / f"{cache.path.stem}-without-{draw}.h5"
        groups = None
        if train.groups is not None:
            groups = {"train": list(train.groups[known]), "test": list(test.groups[other])}
        make_cache(path, splits, len(kept), groups)
        head = load_head(train_head(TrainHeadConfig(cache=path))["head"])
        assert head.known is not None
        sure = head.predict_proba(test.X).max(axis=1)
        p_values = head.known.p_values(test.X, sure)
        strange = {
            "auroc": -p_values,
            "confidence": -sure,
            "distance": nearest_distance(head.known.rows.astype(np.float32), test.X),
        }
        measured = {name: float(rank(~other, s).auroc()[0]) for name, s in strange.items()}
        measured["known"] = float((p_values[other] <= LEVEL).mean())
        measured["left_out"] = float((p_values[~other] <= LEVEL).mean())
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {"cache": cache.path.stem, **means, "draws": found}


def calibration_line(row: dict[str, Any]) -> str:
    """One head as a line of a Markdown table."""
    ece, loss = (f"{row[key][0]:.3f} to {row[key][1]:.3f}" for key in ("ece", "log_loss"))
    return f"| {row['cache']} | {row['solver']} | {row['temperature']:.2f} | {ece} | {loss} |"


def unknown_line(row: dict[str, Any]) -> str:
    """One cache as a line of a Markdown table."""
    return (
        f"| {row['cache']} | {row['auroc']:.3f} | {row['confidence']:.3f} "
        f"| {row['distance']:.3f} | {row['known']:.1%} | {row['left_out']:.1%} |"
    )

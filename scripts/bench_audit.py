"""How well `featcache audit` finds wrong labels, and how fast it compares all images.

    python scripts/bench_audit.py cache/NAME.h5 ...    # labels flipped at random, then looked for
    python scripts/bench_audit.py --rows 50000         # all pairs of cosines, seconds

A share of the train labels is changed to another class at random, several times. Of as many labels
as were changed, the share that was, is both precision and recall. Rivals are the plain rule (the
lowest out-of-fold probability of the own class, from the same head) and, if it is installed,
cleanlab, which is given those probabilities.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from featcache import cli
from featcache.audit.findings import ODDS
from featcache.audit.labels import check_labels
from featcache.audit.neighbors import near_threshold, neighborhood
from featcache.audit.rows import AllRows, all_rows
from featcache.cache import FeatureCache
from featcache.config import AuditConfig, OutputConfig
from featcache.errors import UserError
from featcache.files import write_json
from featcache.runtime import environment, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """Measure audit: wrong labels found, or the time to compare all images."""

    caches: tuple[Path, ...] = ()
    """Caches whose train labels to change and look for."""
    flip: float = 0.05
    """The share of train labels to change."""
    num_seeds: int = 5
    """How often."""
    rows: int | None = None
    """Compare this many made rows with each other instead."""
    feature_dim: int = 512
    """Their width."""
    output: Path | None = None
    """Also write the results here, as JSON."""


def flipped(rows: AllRows, share: float, seed: int) -> tuple[AllRows, np.ndarray]:
    """The rows with some train labels changed, and which."""
    random = np.random.default_rng(seed)
    num = round(share * rows.num_train)
    changed = random.choice(rows.num_train, num, replace=False)
    y = rows.y.copy()
    num_classes = len(rows.class_names)
    y[changed] = (y[changed] + random.integers(1, num_classes, num)) % num_classes
    wrong = np.zeros(rows.num_train, bool)
    wrong[changed] = True
    return dataclasses.replace(rows, y=y), wrong


def top_share(doubt: np.ndarray, wrong: np.ndarray) -> float:
    """Of as many most doubtful rows as are wrong, the share that is."""
    order = np.argsort(-np.nan_to_num(doubt, nan=-np.inf), kind="stable")
    return float(wrong[order[: wrong.sum()]].mean())


def measure_labels(path: Path, config: BenchConfig) -> dict[str, Any]:
    """Precision and recall on one cache, mean over seeds."""
    cache = FeatureCache(path)
    clean, found = all_rows(cache), []
    for seed in range(config.num_seeds):
        rows, wrong = flipped(clean, config.flip, seed)
        start = time.perf_counter()
        check = check_labels(AuditConfig(cache=path, seed=seed), cache, rows)
        seconds = time.perf_counter() - start
        labels = rows.y[: rows.num_train]
        own = check.unmixed[np.arange(len(labels)), labels]
        suspects = check.suspects[check.suspects < rows.num_train]
        suspects = suspects[check.doubt[suspects] >= math.log(ODDS)]
        one = {
            "audit": top_share(check.doubt[: rows.num_train], wrong),
            "plain": top_share(-own, wrong),
            "suspects": len(suspects),
            "suspects_precision": float(wrong[suspects].mean()) if len(suspects) else 1.0,
            "suspects_recall": float(wrong[suspects].sum() / wrong.sum()),
            "weight": check.weight,
            "seconds": seconds,
        }
        if importlib.util.find_spec("cleanlab") is not None:
            one |= cleanlab_of(labels, check.unmixed[: rows.num_train], wrong)
        found.append(one)
        say(f"{path.stem}, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in one.items()))
    names = found[0]
    mean = {name: float(np.mean([one[name] for one in found])) for name in names}
    return {"cache": path.name, "num_train": clean.num_train, "mean": mean, "seeds": found}


def cleanlab_of(labels: np.ndarray, probabilities: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """What cleanlab finds from the same probabilities."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    issues = find_label_issues(labels, probabilities)
    quality = get_label_quality_scores(labels, probabilities, adjust_pred_probs=True)
    return {
        "cleanlab": top_share(-quality, wrong),
        "cleanlab_suspects": int(issues.sum()),
        "cleanlab_precision": float(wrong[issues].mean()) if issues.any() else 1.0,
        "cleanlab_recall": float(wrong[issues].sum() / wrong.sum()),
    }


def measure_speed(config: BenchConfig) -> dict[str, Any]:
    """Seconds to compare all rows with each other, and how many planted copies were found."""
    assert config.rows is not None
    random = np.random.default_rng(0)
    X = np.maximum(random.normal(size=(config.rows, config.feature_dim)), 0).astype(np.float32)
    copies = config.rows // 100
    noise = random.normal(size=(copies, config.feature_dim)).astype(np.float32)
    X[-copies:] = np.maximum(X[:copies] + 0.05 * noise, 0)
    rows = AllRows(
        split=np.full(config.rows, "train"),
        ids=[str(i) for i in range(config.rows)],
        X=X,
        y=np.zeros(config.rows, np.int64),
        content=random.integers(0, 256, (config.rows, 32), dtype=np.uint8),
        groups=None,
        class_names=["x"],
        num_train=config.rows,
    )
    start = time.perf_counter()
    near = neighborhood(rows, 10)
    seconds = time.perf_counter() - start
    found = (near.cosine[-copies:] >= near_threshold(near)) & (
        near.index[-copies:] == np.arange(copies)[:, None]
    )
    others = (near.cosine[copies:-copies, 0] >= near_threshold(near)).sum()
    return {
        "rows": config.rows,
        "feature_dim": config.feature_dim,
        "seconds": seconds,
        "copies_found": float(found.any(axis=1).mean()),
        "others_found": int(others),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown."""
    columns = [name for name in ("audit", "plain", "cleanlab") if name in rows[0]["mean"]]
    lines = [
        f"| cache | {' | '.join(columns)} | called wrong | precision | recall | seconds |",
        "| --- |" + " ---: |" * (len(columns) + 4),
    ]
    for row in rows:
        mean = row["mean"]
        cells = [f"{mean[name]:.3f}" for name in columns]
        cells += [f"{mean['suspects']:.0f}", f"{mean['suspects_precision']:.2f}"]
        cells += [f"{mean['suspects_recall']:.2f}", f"{mean['seconds']:.1f}"]
        lines.append(f"| {row['cache']} | {' | '.join(cells)} |")
    return lines


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure what was asked for."""
    if config.rows is not None:
        report: dict[str, Any] = {"speed": measure_speed(config)}
        speed = report["speed"]
        summary = [
            f"{speed['rows']:,} x {speed['rows']:,} cosines of {speed['feature_dim']} features: "
            f"{speed['seconds']:.1f} s; {speed['copies_found']:.1%} of planted near-copies found, "
            f"{speed['others_found']} other images"
        ]
    elif config.caches:
        report = {"labels": [measure_labels(path, config) for path in config.caches]}
        summary = table(report["labels"])
    else:
        raise UserError("nothing to measure: name caches, or give --rows 50000")
    report |= {"command": "bench_audit", "summary": summary, "environment": environment()}
    if config.output is not None:
        write_json(config.output, report)
    return report


if __name__ == "__main__":
    sys.exit(cli.run("bench_audit.py", BenchConfig, run, summary=lambda r: r["summary"]))

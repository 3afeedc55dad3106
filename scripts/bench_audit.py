"""How well `featcache audit` finds wrong labels, how fast it compares images, what groups matter.

    python scripts/bench_audit.py cache/NAME.h5 ...    # labels flipped at random, then looked for
    python scripts/bench_audit.py --rows 50000         # all pairs of cosines, seconds
    python scripts/bench_audit.py cache/NAME.h5 --groups   # random split against split by group

A share of the train labels is changed to another class at random, several times. Of as many labels
as were changed, the share that was, is both precision and recall. Rivals are the plain rule (the
lowest out-of-fold probability of the own class, from the same head) and, if it is installed,
cleanlab, which is given those probabilities.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
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
from featcache.config import AuditConfig, OutputConfig, TrainHeadConfig
from featcache.display import say
from featcache.errors import UserError
from featcache.files import write_json
from featcache.groups import hold_out_units, kept_together
from featcache.heads.scoring import TestSplit
from featcache.heads.selection import InMemoryData
from featcache.heads.train import run_protocol
from featcache.heads.training_data import Rows
from featcache.runtime import environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """Measure audit: wrong labels found, or the time to compare all images."""

    caches: tuple[Path, ...] = ()
    """Caches whose train labels to change and look for."""
    flip: float = 0.05
    """The share of train labels to change."""
    num_seeds: int = 5
    """How often."""
    groups: bool = False
    """Compare the scores of random splits with those of splits by group instead."""
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
        start = time.process_time()
        check = check_labels(AuditConfig(cache=path, seed=seed), cache, rows)
        seconds = time.process_time() - start
        labels = rows.y[: rows.num_train]
        at = np.arange(len(labels)), labels
        suspects = check.suspects[check.suspects < rows.num_train]
        suspects = suspects[check.odds[suspects] >= ODDS]
        one = {
            "audit": top_share(-check.probabilities[at], wrong),
            "plain": top_share(-check.unmixed[at], wrong),
            "suspects": len(suspects),
            "suspects_precision": float(wrong[suspects].mean()) if len(suspects) else 1.0,
            "suspects_recall": float(wrong[suspects].sum() / wrong.sum()),
            "weight": check.weight,
            "processor_seconds": seconds,
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


def measure_groups(path: Path, config: BenchConfig) -> dict[str, Any]:
    """Test accuracy of heads when groups are divided between train and test, and when not."""
    cache = FeatureCache(path)
    every = all_rows(cache)
    if every.groups is None:
        raise UserError(f"{path} has no groups: extract it with --group-from")
    found: dict[str, dict[str, list[float]]] = {}
    for seed, solver in itertools.product(range(config.num_seeds), ("logistic", "ridge", "knn")):
        for how, groups in (("random", None), ("by group", every.groups)):
            order = np.random.default_rng(seed).permutation(len(every.y))
            units = kept_together(every.content, groups)
            test = hold_out_units(order, units, every.y, 0.2)
            settings = TrainHeadConfig(cache=path, solver=solver, seed=seed)
            top1 = score_split(settings, cache, every, test, groups)
            found.setdefault(solver, {}).setdefault(how, []).append(top1)
            say(f"{path.stem}, {solver}, seed {seed}, {how}: {top1:.3f}")
    return {"cache": path.name, "top1": found}


def score_split(
    config: TrainHeadConfig, cache: FeatureCache, every: AllRows, test: Any, groups: Any
) -> float:
    """Fit a head as train-head does on all rows but some, and score it on those."""
    train = np.setdiff1d(np.arange(len(every.y)), test)
    rows = Rows(
        views=every.X[None, train],
        y=every.y[train],
        weights=np.ones(len(train)),
        class_names=every.class_names,
    )
    data = InMemoryData(
        train=rows, content=every.content[train], groups=None if groups is None else groups[train]
    )
    split = TestSplit(
        y=every.y[test],
        ids=[every.ids[row] for row in test],
        num_views=1,
        blocks=lambda: iter([[every.X[test]]]),
    )
    return run_protocol(config, data, split, cache.meta.backbone.stages).test_top1


def groups_table(rows: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown: means over seeds, and the difference with its standard error."""
    lines = [
        "| cache | solver | random split | split by group | difference |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        for solver, scores in row["top1"].items():
            random, grouped = np.array(scores["random"]), np.array(scores["by group"])
            gain = random - grouped
            error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
            lines.append(
                f"| {row['cache']} | {solver} | {random.mean():.3f} | {grouped.mean():.3f} | "
                f"{gain.mean():+.3f} ± {error:.3f} |"
            )
    return lines


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
    start, used = time.perf_counter(), time.process_time()
    near = neighborhood(rows, 10)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    found = (near.cosine[-copies:] >= near_threshold(near)) & (
        near.index[-copies:] == np.arange(copies)[:, None]
    )
    others = (near.cosine[copies:-copies, 0] >= near_threshold(near)).sum()
    return {
        "rows": config.rows,
        "feature_dim": config.feature_dim,
        "seconds": seconds,
        "processor_seconds": used,
        "copies_found": float(found.any(axis=1).mean()),
        "others_found": int(others),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown."""
    columns = [name for name in ("audit", "plain", "cleanlab") if name in rows[0]["mean"]]
    lines = [
        f"| cache | {' | '.join(columns)} | called wrong | precision | recall | processor s |",
        "| --- |" + " ---: |" * (len(columns) + 4),
    ]
    for row in rows:
        mean = row["mean"]
        cells = [f"{mean[name]:.3f}" for name in columns]
        cells += [f"{mean['suspects']:.0f}", f"{mean['suspects_precision']:.2f}"]
        cells += [f"{mean['suspects_recall']:.2f}", f"{mean['processor_seconds']:.1f}"]
        lines.append(f"| {row['cache']} | {' | '.join(cells)} |")
    return lines


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure what was asked for."""
    if config.rows is not None:
        report: dict[str, Any] = {"speed": measure_speed(config)}
        speed = report["speed"]
        summary = [
            f"{speed['rows']:,} x {speed['rows']:,} cosines of {speed['feature_dim']} features: "
            f"{speed['seconds']:.1f} s ({speed['processor_seconds']:.1f} s of processor time); "
            f"{speed['copies_found']:.1%} of planted near-copies found, "
            f"{speed['others_found']} other images"
        ]
    elif config.caches and config.groups:
        report = {"groups": [measure_groups(path, config) for path in config.caches]}
        summary = groups_table(report["groups"])
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

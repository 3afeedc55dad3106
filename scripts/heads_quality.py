"""Accuracy of heads against plain LogisticRegression, and of views; for bench_heads.py."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import FeatureCache
from featcache.config import ExtractConfig, TrainHeadConfig
from featcache.display import say
from featcache.heads import train_head
from featcache.results.metrics import mcnemar
from heads_stream import make_cache

SOLVERS = ("logistic", "ridge", "knn", "auto")
SEEDS = 5
TEST_SHARE = 0.3

Split = tuple[Any, Any]


def table(folders: tuple[Path, ...], work_dir: Path) -> dict[str, Any]:
    """Test accuracy of each solver, settings chosen on train, against scikit-learn's default.

    scikit-learn's bundled datasets are split five times; a folder has its own test split. The
    p value is McNemar's, over the test rows of all splits.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for dataset, splits in [*bundled_datasets(), *folder_features(folders, Path(name))]:
            rows.append(compare(dataset, splits, Path(name)))
            say(table_line(rows[-1]))
    header = "| dataset | rows, width, classes | LogisticRegression | " + " | ".join(SOLVERS)
    lines = [f"{header} | p (logistic) |", "| --- " * (4 + len(SOLVERS)) + "|"]
    return {"rows": rows, "summary": [*lines, *map(table_line, rows)]}


def compare(dataset: str, splits: list[dict[str, Split]], folder: Path) -> dict[str, Any]:
    """One dataset's row."""
    from sklearn.linear_model import LogisticRegression

    right: dict[str, list[Any]] = {name: [] for name in ("plain", *SOLVERS)}
    for number, split in enumerate(splits):
        (X, y), (Z, t) = split["train"], split["test"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged within 1,000 steps: that is "plain"
            plain = LogisticRegression(max_iter=1000).fit(X, y)
        right["plain"].append(plain.predict(Z) == t)
        cache = folder / f"{dataset}-{number}.h5"
        make_cache(cache, split, int(max(y.max(), t.max())) + 1)
        for solver in SOLVERS:
            output = folder / f"{dataset}-{number}-{solver}.safetensors"
            train_head(TrainHeadConfig(cache=cache, solver=solver, output=output))
            right[solver].append(predictions(output, Z) == t)
    scores = {name: float(np.mean(np.concatenate(parts))) for name, parts in right.items()}
    p = mcnemar(np.concatenate(right["logistic"]), np.concatenate(right["plain"]))
    shape = (len(y) + len(t), X.shape[1], int(y.max()) + 1)
    return {"dataset": dataset, "shape": shape, "scores": scores, "p": p}


def predictions(head: Path, features: Any) -> Any:
    """What a saved head says."""
    from featcache.heads import load_head

    return load_head(head).predict(features)


def table_line(row: dict[str, Any]) -> str:
    """One dataset as a line of a Markdown table."""
    num_rows, dim, num_classes = row["shape"]
    scores = " | ".join(f"{row['scores'][name]:.4f}" for name in ("plain", *SOLVERS))
    shape = f"{num_rows:,}, {dim}, {num_classes}"
    return f"| {row['dataset']} | {shape} | {scores} | {row['p']:.2f} |"


def bundled_datasets() -> Iterator[tuple[str, list[dict[str, Split]]]]:
    """scikit-learn's own small datasets, raw, each split five times."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    for name in ("digits", "wine", "breast_cancer", "iris"):
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        splits = []
        for seed in range(SEEDS):
            train, test = train_test_split(
                np.arange(len(y)), test_size=TEST_SHARE, random_state=seed, stratify=y
            )
            data = X.astype(np.float32)
            splits.append({"train": (data[train], y[train]), "test": (data[test], y[test])})
        yield name, splits


def folder_features(
    folders: tuple[Path, ...], work_dir: Path
) -> Iterator[tuple[str, list[dict[str, Split]]]]:
    """Features of image folders by the bundled weights, with the folder's own test split."""
    from featcache.extract import extract

    for folder in folders:
        path = work_dir / f"{folder.name}.h5"
        extract(ExtractConfig(dataset=str(folder), weights="bundled", output=path))
        cache = FeatureCache(path)
        split = {}
        for name in ("train", "test"):
            X, y = cache.split(name)
            split[name] = (np.asarray(X), y)
        yield folder.name, [split]


def views(folder: Path, work_dir: Path) -> dict[str, Any]:
    """Heads on no, flipped and random views of one folder: accuracy, seconds, megabytes."""
    from featcache.extract import extract

    rows = []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for kind in ("none", "flip", "4", "8"):
            path = Path(name) / f"views-{kind}.h5"
            start = time.perf_counter()
            extract(ExtractConfig(dataset=str(folder), weights="bundled", views=kind, output=path))
            row = {
                "views": kind, "extract_seconds": time.perf_counter() - start,
                "megabytes": path.stat().st_size / 1e6, **fit_views(path, kind),
            }  # fmt: skip
            rows.append(row)
            say(views_line(row))
    header = "| views | extraction | file | logistic | its fit | with --tta | adam | with --tta |"
    return {"rows": rows, "summary": [header, "| --- " * 8 + "|", *map(views_line, rows)]}


def fit_views(path: Path, kind: str) -> dict[str, Any]:
    """Test accuracy of both solvers on one cache, with view 0 and averaged over the views."""
    found: dict[str, Any] = {}
    for solver in ("logistic", "adam"):
        for tta in (False, True):
            if tta and kind == "none":
                continue
            config = TrainHeadConfig(
                cache=path, solver=solver, tta=tta, epochs=10, cache_dir=path.parent
            )  # fmt: skip
            report = train_head(config)
            found[f"{solver}{'_tta' if tta else ''}"] = report["test_top1"]
            if not tta:
                found[f"{solver}_seconds"] = report["fit_seconds"]
    return found


def views_line(row: dict[str, Any]) -> str:
    """One kind of views as a line of a Markdown table."""

    def score(name: str) -> str:
        return f"{row[name]:.3f}" if name in row else ""

    return (
        f"| {row['views']} | {row['extract_seconds']:.0f} s | {row['megabytes']:.0f} MB "
        f"| {score('logistic')} | {row['logistic_seconds']:.2f} s | {score('logistic_tta')} "
        f"| {score('adam')} | {score('adam_tta')} |"
    )

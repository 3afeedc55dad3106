"""Telling images of other classes: p-values hold on known classes, and are low on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cache_helpers import blobs, rows_cache, toy_cache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, summary_lines, train_head
from featcache.heads.calibration import bank_of, some_rows
from featcache.heads.linear import KnownRows, nearest_distance, unit_rows
from featcache.heads.training_data import Rows


def run(cache: Path, **settings: object) -> dict:
    return train_head(TrainHeadConfig(cache=cache, cache_dir=cache.parent, **settings))


def test_distance_is_one_less_the_cosine() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 2.0]])).astype(np.float32)
    found = nearest_distance(rows, np.array([[6.0, 8.0], [1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))
    assert found == pytest.approx([0, 0.4, 1.8, 1], abs=1e-3)


def test_p_values_by_hand() -> None:
    known = KnownRows.ranking(
        np.array([[1, 0]], np.float16), np.array([0.9, 0.6, 0.8]), np.array([0.1, 0.3, 0.2])
    )
    assert known.confidence == pytest.approx([0.6, 0.8, 0.9])
    # The least sure row is the farthest: of 3, 1 row is as strange by each rank, then 2, then 3.
    assert known.strangeness == pytest.approx([2 * np.log(3 / k) for k in (3, 2, 1)])
    at = {distance: np.array([[1 - distance, np.sqrt(1 - (1 - distance) ** 2)]]) for distance in
          (0.05, 0.25, 0.9)}  # fmt: skip
    assert known.p_values(at[0.05], np.array([0.95])) == pytest.approx([1.0])
    assert known.p_values(at[0.25], np.array([0.7])) == pytest.approx([0.5])
    assert known.p_values(at[0.9], np.array([0.3])) == pytest.approx([0.25])


@pytest.mark.parametrize("num_held", [19, 100])
def test_at_most_the_level_of_known_rows_are_rejected(num_held: int) -> None:
    random = np.random.default_rng(0)
    rejected, level = [], 0.05
    for _ in range(400):
        bank = unit_rows(random.normal(size=(30, 4)))
        rows = random.normal(size=(num_held + 10, 4))
        sure = random.uniform(size=len(rows))
        distance = nearest_distance(bank.astype(np.float32), rows)
        known = KnownRows.ranking(bank, sure[:num_held], distance[:num_held])
        rejected.append(known.p_values(rows[num_held:], sure[num_held:]) <= level)
    share = np.mean(rejected)
    assert share <= level + 3 * np.sqrt(level / np.size(rejected))
    assert share > level / 2  # and not far fewer


@pytest.mark.parametrize("solver", ["logistic", "ridge", "knn", "adam"])
def test_rows_of_another_class_are_strange(tmp_path: Path, solver: str) -> None:
    X, y = blobs(900, dim=16, num_classes=4, spread=0.5, seed=1)
    Z, t = blobs(400, dim=16, num_classes=4, spread=0.5, seed=2)
    splits = {"train": (X[y < 3], y[y < 3]), "test": (Z[t < 3], t[t < 3])}
    report = run(rows_cache(tmp_path / "k.h5", splits, ["a", "b", "c"]), solver=solver)
    head = load_head(report["head"])
    assert head.known is not None
    assert len(head.known.strangeness) == 135  # a fifth of 675
    p_values = head.known.p_values(Z, head.predict_proba(Z).max(axis=1))
    assert (p_values[t < 3] <= 0.05).mean() < 0.1
    assert (p_values[t == 3] <= 0.05).mean() > 0.6
    row = report["rejections"][1]
    assert row["level"] == 0.05
    assert row["unknown"] == pytest.approx((p_values[t < 3] <= 0.05).mean())
    right = head.predict(Z) == t
    answered = right[(t < 3) & (p_values > 0.05)].mean()
    assert row["answered_top1"] == pytest.approx(answered)
    line = f"predict --reject 0.05 would call {row['unknown']:.1%} of the test rows unknown"
    assert line in "\n".join(summary_lines(report))


def test_the_rows_kept_fit_a_megabyte() -> None:
    rows = Rows(
        views=np.ones((1, 3000, 1024), np.float32),
        y=np.zeros(3000, np.int64),
        weights=np.ones(3000),
        class_names=["a"],
    )
    assert bank_of(rows, 1).nbytes == 1 << 20
    index = some_rows(np.arange(10), 4, seed=1)
    assert np.array_equal(index, np.unique(index))
    assert np.array_equal(index, some_rows(np.arange(10), 4, seed=1))
    assert not np.array_equal(index, some_rows(np.arange(10), 4, seed=2))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("known.confidence", lambda a: a[::-1].copy(), "columns of known rows are not ascending"),
        ("known.distance", lambda a: a[1:].copy(), "three columns of equal length"),
        ("known.rows", lambda a: a[:, 1:].copy(), r"known.rows has shape \(240, 7\), not \[m, 8\]"),
        ("known.strangeness", lambda a: a * 0 + np.inf, "values that are not finite"),
        ("known.rows", None, "damaged"),
        ("known.other", lambda a: np.zeros(3, np.float32), "unknown parts known.other"),
    ],
)
def test_damaged_known_rows_are_refused(tmp_path: Path, name: str, change, message: str) -> None:
    from safetensors import safe_open

    path = Path(run(toy_cache(tmp_path / "toy.h5"))["head"])
    assert load_head(path).known is not None
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message):
        load_head(path)

"""The heads' benchmark script, on sizes that take a moment."""

import json

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache
from conftest import REPO
from data_helpers import make_pets
from featcache.config import StageColumns
from featcache.heads.training_data import Rows

SCRIPTS = REPO / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_heads

    return bench_heads


def test_speed_rows_compare_with_scikit_learn(bench, tmp_path, capsys):
    words = ["--num-rows", "400", "--feature-dim", "12", "--num-classes", "3", "--C", "1.0"]
    assert bench.main([*words, "--rounds", "1", "--work-dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["objective_against_sklearn"] < 1e-6
    assert rows[0]["speedup"] > 0
    assert [row["name"].split()[0] for row in rows] == ["logistic", "20", "50", "train-head"]


def test_probabilities_are_measured_on_left_out_classes(bench, tmp_path, capsys, monkeypatch):
    import heads_probabilities

    monkeypatch.setattr(heads_probabilities, "NUM_DRAWS", 2)
    monkeypatch.setattr(heads_probabilities, "SOLVERS", ("logistic", "adam"))
    splits = {
        name: blobs(num, dim=16, num_classes=5, spread=0.5, seed=num)
        for name, num in (("train", 600), ("test", 100))
    }
    cache = rows_cache(tmp_path / "blobs.h5", splits, "abcde")
    words = ["--probabilities", str(cache), "--work-dir", str(tmp_path), "--json"]
    assert bench.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["solver"] for row in report["calibration"]] == ["logistic", "adam"]
    adam = report["calibration"][1]
    assert adam["log_loss"][1] < adam["log_loss"][0]
    (row,) = report["unknown"]
    assert row["auroc"] > 0.9
    assert row["left_out"] > 0.5 > row["known"]
    assert {path.name for path in tmp_path.iterdir()} == {"blobs.h5", "blobs.h5.lock"}


@pytest.mark.slow
def test_streaming_demo_runs_small_and_cleans_up(bench, tmp_path, capsys):
    words = ["--stream", "--stream-rows", "20000", "--feature-dim", "16"]
    assert bench.main([*words, "--work-dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows[1:]] == ["ridge", "logistic", "adam"]
    assert all(row["test_top1"] > 0.1 for row in rows[1:])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_table_scores_bundled_datasets(bench, tmp_path, capsys):
    assert bench.main(["--table", "--work-dir", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scores = {row["dataset"]: row["scores"] for row in report["rows"]}
    assert scores.keys() == {"digits", "wine", "breast_cancer", "iris"}
    for row in report["rows"]:
        worse = row["scores"]["logistic"] < row["scores"]["plain"]
        assert not worse or row["p"] > 0.05


def test_a_head_fitted_in_the_span_of_its_rows_is_the_same(bench):
    import heads_gains

    random = np.random.default_rng(0)
    rows = [
        Rows(
            views=random.normal(size=(1, num, 60)).astype(np.float32),
            y=np.arange(num) % 3,
            weights=np.ones(num),
            class_names=["a", "b", "c"],
        )
        for num in (30, 12, 9)
    ]
    part = heads_gains.Part(
        fit=rows[0],
        scored=(rows[1], rows[2]),
        places=(np.arange(30), np.arange(30, 42)),
        content=random.integers(256, size=(30, 32), dtype=np.uint8),
        stages=StageColumns(pool="avg", names=("layer1.mean", "last"), widths=(20, 40)),
        seed=0,
    )
    narrow = part.in_row_space()
    assert narrow.fit.feature_dim == 30
    pairs = zip(
        heads_gains.answer(part).probabilities,
        heads_gains.answer(narrow).probabilities,
        strict=True,
    )
    for whole, same in pairs:
        np.testing.assert_allclose(same, whole, atol=2e-3)


def test_gains_are_means_over_seeds_with_their_standard_error(bench):
    import heads_gains

    runs = [
        {"held_out": gain, "test": -gain, "held_out_top1": 0.5, "test_top1": 0.5, "seconds": 2.0}
        for gain in (0.01, 0.03)
    ]
    row = heads_gains.averaged("pets", "flips", runs)
    assert heads_gains.gains_line(row) == "| pets | flips | +2.0 ± 1.0 | -2.0 ± 1.0 | +2.0 |"


@pytest.mark.slow
def test_every_cheap_change_has_a_row(bench, tmp_path, capsys, monkeypatch):
    import heads_gains

    monkeypatch.setattr(heads_gains, "SEEDS", 2)
    monkeypatch.setattr(heads_gains, "RANDOM_FEATURES", 100)
    pets = make_pets(tmp_path / "pets")
    words = ["--gains", str(pets), "--wise-seeds", "1", "--work-dir", str(tmp_path), "--json"]
    assert bench.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 12
    assert [row["seeds"] for row in rows] == [2] * 11 + [1]
    assert all(row["held_out_se"] is not None for row in rows[:-1])

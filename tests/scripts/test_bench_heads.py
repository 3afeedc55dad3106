"""The heads' benchmark script, on sizes that take a moment."""

import json
import sys
import types

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cache_helpers import blobs, rows_cache, toy_cache
from conftest import REPO
from data_helpers import make_pets
from featcache.config import StageColumns
from featcache.heads.selection import InMemoryData
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
    rival = rows[0]["rivals"]["sklearn"]
    assert rival["objective_against"] < 1e-6
    assert rival["speedup"] > 0
    names = [row["name"].split()[0] for row in rows]
    assert names == ["logistic", "choosing", "20", "50", "train-head"]
    assert rows[1]["rival_seconds"].keys() >= {"sklearn"}
    assert rows[1]["num_tried"] > 4


def test_rivals_that_stop_early_are_given_a_tolerance_that_ends_as_low(bench, monkeypatch):
    X, y = bench.made_features(400, 12, 3)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "RIVAL_TOLERANCES", (0.1, 1e-6))
    found = bench.against_rivals(X, y, 1.0, 1, as_low=True)["rivals"]
    assert found.keys() == {"sklearn", "sklearn to 1e-06"}
    assert found["sklearn"]["objective_against"] < -1e-5
    assert found["sklearn to 1e-06"]["objective_against"] >= -1e-5


def test_an_optional_rival_takes_its_turn_only_where_it_is_installed(bench, monkeypatch, capsys):
    X, y = bench.made_features(200, 6, 3)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.against_rivals(X, y, 1.0, 1)["rivals"].keys() == {"sklearn"}
    rival = types.ModuleType("sklearnex.linear_model")
    rival.LogisticRegression = LogisticRegression
    monkeypatch.setitem(sys.modules, "sklearnex.linear_model", rival)
    monkeypatch.setitem(sys.modules, "sklearnex", types.ModuleType("sklearnex"))
    monkeypatch.setattr(bench, "find_spec", lambda name: name == "sklearnex")
    row = bench.against_rivals(X, y, 1.0, 1)
    assert row["rivals"].keys() == {"sklearn", "intelex"}
    assert "intelex" in bench.logistic_line(row)


def test_a_caches_train_rows_can_be_measured(bench, tmp_path):
    cache = toy_cache(tmp_path / "toy.h5")
    ((_, X, y),) = bench.load_rows(bench.BenchConfig(features=(cache,)))
    assert X.shape == (240, 8)
    assert np.bincount(y).tolist() == [80, 80, 80]


def test_few_rows_of_many_classes(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FEW_CASES", ((30, 2),))
    assert bench.main(["--few", "--feature-dim", "16", "--rounds", "1", "--json"]) == 0
    out, table = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [row.get("C") for row in rows] == [*bench.FEW_C, None] * 2
    assert {row["num_rows"] for row in rows if "C" in row} == {60}
    lines = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert lines == [8] * 4


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
        fit=InMemoryData(
            train=rows[0], content=random.integers(256, size=(30, 32), dtype=np.uint8)
        ),
        scored=(rows[1], rows[2]),
        places=(np.arange(30), np.arange(30, 42)),
        stages=StageColumns(pool="avg", names=("layer1.mean", "last"), widths=(20, 40)),
        seed=0,
    )
    narrow = part.in_row_space()
    assert narrow.fit.train.feature_dim == 30
    pairs = zip(
        heads_gains.answer(part).probabilities,
        heads_gains.answer(narrow).probabilities,
        strict=True,
    )
    for whole, same in pairs:
        np.testing.assert_allclose(same, whole, atol=2e-3)


def test_gains_are_means_over_seeds_and_win_beyond_two_standard_errors(bench):
    import heads_gains

    rows = [
        heads_gains.averaged(dataset, "flips", [run_that_gains(gain) for gain in gains])
        for dataset, gains in (("pets", (0.01, 0.03)), ("signs", (0.02, 0.03)), ("digits", (0.5,)))
    ]
    assert heads_gains.summary(rows) == [
        "| change | pets | signs | digits | processor s | wins |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| flips | +2.0 ± 1.0 (-2.0) | +2.5 ± 0.5 (-2.5) | +50.0 (-50.0) | +2.0 | 1 of 3 |",
    ]


def run_that_gains(held_out):
    scores = {"held_out_top1": 0.5, "test_top1": 0.5}
    return {"held_out": held_out, "test": -held_out, "seconds": 2.0, **scores}


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

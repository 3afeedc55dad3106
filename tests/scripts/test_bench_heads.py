"""The heads' benchmark script, on sizes that take a moment."""

import json
import sys
import types

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cache_helpers import toy_cache
from conftest import REPO

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
    assert [row["name"].split()[0] for row in rows] == ["logistic", "20", "50", "train-head"]


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
    X, y = bench.load_rows(bench.BenchConfig(features=cache), 10)
    assert X.shape == (240, 8)
    assert np.bincount(y).tolist() == [80, 80, 80]


def test_few_rows_of_many_classes(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FEW_CLASSES", 30)
    assert bench.main(["--few", "--feature-dim", "16", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row.get("C") for row in rows] == [*bench.FEW_C, None]
    assert all(row["num_rows"] == 60 for row in rows[:-1])


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

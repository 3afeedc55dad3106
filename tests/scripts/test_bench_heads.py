"""The heads' benchmark script, on sizes that take a moment."""

import json

import pytest

from cache_helpers import blobs, rows_cache
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

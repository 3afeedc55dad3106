"""The heads' benchmark script, on sizes that take a moment."""

import json

import pytest

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

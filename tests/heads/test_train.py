"""`train-head` from cache to head file, report and summary."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featcache
from cache_helpers import blobs, rows_cache, toy_cache
from featcache import cli
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, summary_lines, train_head

NAMES = ["ape", "bee", "cat"]
FIELDS = {
    "command", "head", "solver", "backend", "trainable_params", "val_top1", "test_top1",
    "test_interval", "balanced_top1", "per_class", "fit_seconds", "seconds_total", "chosen",
    "epochs", "converged", "chosen_on", "scored_on", "num_train", "num_test", "config",
    "provenance", "environment",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    return toy_cache(tmp_path / "toy.h5")


def run(cache, **settings):
    return train_head(TrainHeadConfig(cache=cache, cache_dir=cache.parent, **settings))


def test_other_settings_and_other_caches_keep_the_earlier_head(cache, tmp_path):
    (tmp_path / "b").mkdir()
    other = rows_cache(
        tmp_path / "b" / "toy.h5",
        {"train": blobs(60, seed=3), "test": blobs(30, seed=2)},
        NAMES,
    )
    paths = [
        train_head(TrainHeadConfig(cache=path, cache_dir=folder, **settings))["head"]
        for path, folder, settings in (
            (cache, None, {}),
            (cache, None, {"C": 1.0}),
            (cache, None, {"seed": 1}),
            (other, None, {}),
            (other, cache.parent, {}),
        )
    ]
    assert [Path(path).parent for path in paths] == [
        *[cache.parent] * 3, other.parent, cache.parent,
    ]  # fmt: skip
    assert len({Path(path).name for path in paths[:4]}) == 4
    assert all(re.fullmatch(r"toy\.logistic-[0-9a-f]{8}", Path(path).stem) for path in paths)
    again = train_head(TrainHeadConfig(cache=cache, json=True, verbose=True))
    assert again["head"] == paths[0]
    assert again["run"].startswith(Path(again["head"]).stem[-8:])


def test_what_strangers_wrote_beside_the_head_is_not_replaced(cache, tmp_path):
    output = tmp_path / "model.safetensors"
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_text('{"architectures": ["mine"]}')
        with pytest.raises(UserError, match=f"{name} exists and was not written by this"):
            run(cache, output=output)
        assert (tmp_path / name).read_text() == '{"architectures": ["mine"]}'
        (tmp_path / name).unlink()
    run(cache, output=output)
    run(cache, output=output, C=1.0)  # one of ours


@pytest.mark.parametrize("solver", ["logistic", "adam", "sgd"])
def test_report_has_what_others_rely_on(cache, solver):
    report = run(cache, solver=solver, epochs=2)
    assert report.keys() >= FIELDS
    assert json.loads(json.dumps(report)) == report
    assert report["trainable_params"] == 3 * 8 + 3
    assert report["test_top1"] > 0.4
    assert report["test_interval"][0] < report["test_top1"] < report["test_interval"][1]
    assert report["per_class"].keys() == {"ape", "bee", "cat"}
    assert report["provenance"]["backbone"]["weights_sha256"] == "ab" * 32
    text = "\n".join(summary_lines(report))
    assert f"{report['test_top1']:.3f}" in text
    assert report["head"] in text


def test_the_time_of_extraction_comes_from_beside_the_cache(cache):
    assert run(cache)["extraction"] is None
    record = {"seconds_total": 12.3, "config": {"dataset": "toys"}}
    for digest, wanted in (
        (FeatureCache(cache).digest.hex(), {"seconds": 12.3, "config": {"dataset": "toys"}}),
        ("of another cache", None),
    ):
        path = cache.with_name("toy.h5.json")
        path.write_text(json.dumps({**record, "cache_digest": digest}))
        assert run(cache)["extraction"] == wanted


@pytest.mark.parametrize("seconds", [None, "1", True, -1, 1e308, float("nan"), 10**400, [1]])
def test_junk_as_time_of_extraction_is_no_time(cache, seconds):
    record = {"seconds_total": seconds, "cache_digest": FeatureCache(cache).digest.hex()}
    cache.with_name("toy.h5.json").write_text(json.dumps(record))
    assert run(cache)["extraction"] == {"seconds": None, "config": None}


def test_saved_report_matches_the_saved_head(cache):
    report = run(cache)
    saved = json.loads(Path(report["head"]).with_suffix(".json").read_text())
    head = load_head(report["head"])
    X, y = blobs(90, seed=2)
    assert saved["class_names"] == NAMES == head.class_names
    assert saved["test"]["labels"] == y.tolist()
    assert saved["test"]["predicted"] == head.predict(X).tolist()
    assert saved["test"]["ids"][0] == "test/00000"
    confidence = head.predict_proba(X).max(axis=1)
    assert saved["test"]["confidence"] == pytest.approx(confidence, abs=1e-5)
    assert head.score(X, y) == report["test_top1"]
    assert head.scores == {"val_top1": report["val_top1"], "test_top1": report["test_top1"]}


def test_choice_is_shown_with_its_candidates(cache):
    report = run(cache)
    chosen = report["chosen"]
    best = max(row["score"] for row in chosen["candidates"])
    least = best - (best * (1 - best) / 48) ** 0.5
    near = [row for row in chosen["candidates"] if row["score"] >= least]
    winner = min(near, key=lambda row: row["loss"])
    assert report["val_top1"] == winner["top1"]
    assert (chosen["C"], chosen["standardize"]) == (winner["C"], winner["standardize"])
    assert {row["standardize"] for row in chosen["candidates"]} == {True, False}
    assert "held-out 20% of train" in report["chosen_on"]
    assert "(48 rows)" in report["chosen_on"]


def test_nothing_is_chosen_when_all_is_given(cache):
    report = run(cache, C=0.5, standardize="off")
    assert report["val_top1"] is None
    assert report["chosen"]["C"] == 0.5
    assert report["chosen_on"].startswith("nothing")


def test_adam_reports_every_epoch_and_counts_no_choice(cache):
    report = run(cache, solver="adam", epochs=3)
    assert [e["epoch"] for e in report["epochs"]] == [1, 2, 3]
    losses = [e["train_loss"] for e in report["epochs"]]
    assert losses == sorted(losses, reverse=True)
    assert report["val_top1"] is None
    assert report["epochs"][-1]["test_top1"] == report["test_top1"]


def test_two_runs_with_one_seed_agree(cache, tmp_path):
    for solver in ("logistic", "adam"):
        one = run(cache, solver=solver, output=tmp_path / "a.safetensors")
        two = run(cache, solver=solver, output=tmp_path / "b.safetensors")
        first, second = load_head(one["head"]), load_head(two["head"])
        assert np.array_equal(first.weight, second.weight)
        assert np.array_equal(first.bias, second.bias)


def test_test_labels_do_not_influence_the_head(tmp_path):
    train, (X, y) = blobs(240, seed=1), blobs(90, seed=2)
    names = NAMES
    for solver in ("logistic", "adam"):
        heads = []
        for name, labels in (("a", y), ("b", (y + 1) % 3)):
            path = rows_cache(
                tmp_path / f"{solver}-{name}.h5", {"train": train, "test": (X, labels)}, names
            )
            heads.append(load_head(run(path, solver=solver)["head"]))
        assert np.array_equal(heads[0].weight, heads[1].weight)
        assert heads[0].chosen == heads[1].chosen


def test_val_split_chooses_where_there_is_one(tmp_path):
    splits = {"train": blobs(120, seed=1), "val": blobs(60, seed=3), "test": blobs(60, seed=2)}
    report = run(rows_cache(tmp_path / "v.h5", splits, ["a", "b", "c"]))
    assert report["chosen_on"] == "the val split (60 rows)"
    assert report["num_train"] == 120


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "adam", "backend": "sklearn"}, "--backend sklearn fits logistic only"),
        ({"sweep": True}, "--sweep is for adam and sgd"),
        ({"solver": "adam", "sweep": True, "backend": "torch"}, "--sweep trains in numpy: leave"),
        ({"solver": "adam", "strength": 1.0}, "--weight-decay instead"),
        ({"output": "head.bin"}, "ends in .safetensors"),
    ],
)
def test_contradictions_are_refused(cache, settings, message):
    from pathlib import Path

    if "output" in settings:
        settings = {"output": Path(settings["output"])}
    with pytest.raises(UserError, match=message):
        run(cache, **settings)


def test_a_cache_without_test_split_is_refused(tmp_path):
    path = rows_cache(tmp_path / "t.h5", {"train": blobs(30)}, ["a", "b", "c"])
    with pytest.raises(UserError, match="has rows in train but none in test"):
        run(path)


def test_no_heavy_import_where_none_is_needed(cache):
    code = (
        "import sys; from featcache.cli import run_command\n"
        f"place = [{str(cache)!r}, '--cache-dir', {str(cache.parent)!r}]\n"
        "for words in ([], ['--solver', 'adam'], ['--backend', 'sklearn']):\n"
        "    assert run_command('train-head', [*place, *words]) == 0\n"
        "    loaded = {'torch', 'h5py', 'sklearn', 'scipy'} & sys.modules.keys()\n"
        "    allowed = {'sklearn', 'scipy'} if 'sklearn' in words else set()\n"
        "    assert loaded <= allowed, (words, loaded)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_series_ends_where_ties_bring_more_loss():
    from types import SimpleNamespace

    from featcache.heads.selection import evaluate_grid
    from featcache.heads.solvers.base import HeldOutPredictions
    from featcache.heads.training_data import Rows

    held = Rows(
        views=np.zeros((1, 2, 3)), y=np.array([0, 1]), weights=np.ones(2), class_names=["a", "b"]
    )
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7}
    prepared = SimpleNamespace(
        predict=lambda s, rows: HeldOutPredictions(rows.y, np.full(2, losses[s["C"]]))
    )
    grid = evaluate_grid(prepared, [[{"C": C} for C in losses]], held, 3)
    assert [settings["C"] for settings, _ in grid] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, "alpha is for ridge: give C for logistic"),
        ({"solver": "ridge", "C": 1.0}, "C is for logistic: give alpha for ridge"),
        ({"solver": "ridge", "k": 3}, "k is for knn: give alpha for ridge"),
        ({"solver": "knn", "C": 1.0}, "C is for logistic: give k for knn"),
        ({"solver": "adam", "alpha": 1.0}, "alpha is for ridge: give weight_decay for adam"),
        ({"solver": "auto", "k": 3}, 'k is for knn: leave it out for auto, or add solver="knn"'),
        ({"strength": 1.0, "C": 1.0}, "strength is the old name of C: give one of them"),
        ({"solver": "auto", "strength": 1.0}, "strength means something else to each solver"),
        ({"solver": "knn", "strength": 2.5}, "knn needs a whole number of neighbors"),
    ],
)
def test_each_solver_has_its_own_flag(cache, settings, message):
    with pytest.raises(UserError) as error:
        featcache.train_head(TrainHeadConfig(cache=cache, cache_dir=cache.parent, **settings))
    assert message in str(error.value)
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("solver", "flag", "value"),
    [("logistic", "C", "0.5"), ("ridge", "alpha", "2"), ("knn", "k", "4")],
)
def test_the_old_name_of_the_flags_still_works(cache, capsys, solver, flag, value):
    place = [str(cache), "--cache-dir", str(cache.parent), "--solver", solver, "--json"]
    found = {}
    for name in (flag, "strength"):
        assert cli.run_command("train-head", [*place, f"--{name}", value]) == 0
        printed = capsys.readouterr()
        found[name] = json.loads(printed.out)
        note = f"--strength is the old name of --{flag}: give --{flag} {value} for {solver}\n"
        assert (note in printed.err) == (name == "strength")
        assert f"{flag} {value}" in "\n".join(summary_lines(found[name]))
    assert found["strength"]["chosen"][flag] == float(value)
    for field in ("head", "chosen", "test_top1", "config"):
        assert found["strength"][field] == found[flag][field]


def test_the_strength_in_reports_of_version_0_1_is_printed(cache):
    report = run(cache, C=0.5)
    report["chosen"]["strength"] = report["chosen"].pop("C")
    assert any("logistic (numpy): strength 0.5, standardize" in x for x in summary_lines(report))


def test_the_score_without_leaked_test_images_is_given_too(tmp_path):
    (X, y), (tested, labels) = blobs(120, seed=1), blobs(30, seed=2)
    tested[:20], labels[:20] = X[:20], y[:20]
    cache = rows_cache(tmp_path / "l.h5", {"train": (X, y), "test": (tested, labels)}, NAMES)
    report = run(cache, solver="knn", k=1)
    found = report["without_leaks"]
    assert (found["num_leaked"], found["num_test"]) == (20, 10)
    assert report["test_top1"] == pytest.approx((20 + 10 * found["test_top1"]) / 30)
    (line,) = [line for line in summary_lines(report) if line.startswith("without the 20 test im")]
    assert line.endswith("on 10 images")
    assert run(toy_cache(tmp_path / "t.h5"))["without_leaks"] is None

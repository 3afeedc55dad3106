"""Odd training sets: the right head, or one clear line."""

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache, toy_cache
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.groups import draw_shots
from featcache.heads import load_head, train_head
from featcache.heads.selection import load_data
from featcache.heads.streaming import draw_held
from featcache.heads.training_data import check_rows

NAMES = ["ape", "bee", "cat"]
SOLVERS = ["logistic", "ridge", "knn", "auto"]
STREAMED = [(s, "off") for s in [*SOLVERS, "adam"]] + [("logistic", "on"), ("ridge", "on")]


def run(path, splits, names=NAMES, weights=None, **settings):
    cache = rows_cache(path / "c.h5", splits, names, weights=weights)
    report = train_head(TrainHeadConfig(cache=cache, cache_dir=path, **settings))
    return report, load_head(report["head"])


@pytest.mark.parametrize(("solver", "stream"), STREAMED)
def test_a_class_absent_from_train_is_never_predicted(tmp_path, solver, stream):
    X, y = blobs(120, seed=1)
    splits = {"train": (X[y != 1], y[y != 1]), "test": blobs(60, seed=2)}
    report, head = run(tmp_path, splits, solver=solver, stream=stream)
    if solver != "adam":  # the notebook's loop knows no such rule
        assert 1 not in head.predict(X * 100)
        assert head.predict_proba(X)[:, 1].max() < 1e-6
        assert report["per_class"]["bee"] == 0.0
        assert report["test_top1"] > 0.5
    assert report["trainable_params"] == (0 if solver == "knn" else 27)


@pytest.mark.parametrize(("solver", "stream"), STREAMED)
def test_a_class_with_one_sample_is_fitted(tmp_path, solver, stream):
    X, y = blobs(120, seed=1)
    keep = (y != 1) | (np.arange(120) == 1)
    splits = {"train": (X[keep], y[keep]), "test": blobs(60, seed=2)}
    _, head = run(tmp_path, splits, solver=solver, stream=stream)
    if solver == "knn":
        assert 1 in head.labels
    elif solver != "adam":
        assert head.bias.min() > -1e3  # it has its own output
    assert np.isfinite(head.predict_proba(X)).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("standardize", ["on", "off"])
def test_constant_features_do_no_harm(tmp_path, solver, standardize):
    X, y = blobs(120, seed=1)
    X[:, 2], X[:, 5] = 0.0, 1234.5
    Z, t = blobs(60, seed=2)
    Z[:, 2], Z[:, 5] = 0.0, 1234.5
    splits = {"train": (X, y), "test": (Z, t)}
    changes = {} if solver == "knn" else {"standardize": standardize}  # knn knows none
    report, head = run(tmp_path, splits, solver=solver, **changes)
    assert report["test_top1"] > 0.6
    if solver in ("logistic", "ridge"):
        assert np.abs(head.weight[:, [2, 5]]).max() < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_class_only_is_refused(tmp_path, solver):
    X, y = blobs(30)
    with pytest.raises(UserError, match=r"every train row is 'bee'.*at least two classes"):
        run(tmp_path, {"train": (X, y * 0 + 1), "test": (X, y)}, solver=solver)


@pytest.mark.parametrize("stream", ["on", "off"])
def test_classes_that_weigh_nothing_are_absent(tmp_path, stream):
    X, y = blobs(90)
    weights = {"train": (y != 2).astype(np.float32), "test": np.ones(90, np.float32)}
    _, head = run(tmp_path, {"train": (X, y), "test": (X, y)}, weights=weights, stream=stream)
    assert 2 not in head.predict(X)
    weights["train"] = (y == 2).astype(np.float32)
    with pytest.raises(UserError, match="every train row is 'cat'"):
        run(tmp_path / "b", {"train": (X, y), "test": (X, y)}, weights=weights, stream=stream)


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("solver", ["logistic", "ridge", "adam"])
def test_one_scale_of_all_weights_changes_nothing(tmp_path, stream, solver):
    X, y = blobs(90)
    X[:, 1:] *= 0.05  # hard enough for the strength to matter
    own = np.where(np.arange(90) % 3, 1.0, 4.0) * (np.arange(90) % 7 > 0)
    found = []
    for scale in (1.0, 2.0**-33, 2.0**125):  # exact in float32, up to 1.7e38
        weights = {"train": (own * scale).astype(np.float32), "test": np.ones(90, np.float32)}
        report, head = run(
            tmp_path / f"{scale}", {"train": (X, y), "test": (X, y)},
            weights=weights, stream=stream, solver=solver,
        )  # fmt: skip
        found.append((report["chosen"], report["test_top1"], head.weight, head.bias))
    for chosen, top1, weight, bias in found[1:]:
        assert (chosen, top1) == found[0][:2]
        np.testing.assert_array_equal(weight, found[0][2])
        np.testing.assert_array_equal(bias, found[0][3])


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_classes_than_samples(tmp_path, solver):
    names = [f"c{i:02d}" for i in range(40)]
    X, _ = blobs(12)
    y = np.arange(12) * 3
    report, head = run(tmp_path, {"train": (X, y), "test": (X, y)}, names, solver=solver)
    assert report["val_top1"] is None  # no class has a row to spare
    assert report["chosen_on"].startswith("nothing")
    assert head.score(X, y) == 1.0
    assert head.predict_proba(X).shape == (12, 40)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fewer_samples_than_features(tmp_path, solver):
    splits = {"train": blobs(12, dim=60, seed=1), "test": blobs(60, dim=60, seed=2)}
    report, _ = run(tmp_path, splits, solver=solver)
    assert report["test_top1"] > 0.6


def test_duplicates_do_not_choose_for_themselves(tmp_path):
    """Labels are noise: nearest neighbors would score 1 on copies of fitted rows."""
    random = np.random.default_rng(0)
    X, y = random.normal(size=(100, 8)).astype(np.float32), random.integers(3, size=100)
    twice = (np.concatenate([X, X]), np.concatenate([y, y]))
    report, _ = run(tmp_path, {"train": twice, "test": (X, y)}, solver="knn")
    assert report["val_top1"] < 0.6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    X, y = blobs(20)
    X[13, 4] = value
    ids = [f"train/{i}.jpg" for i in range(20)]
    with pytest.raises(UserError, match=r"features of sample 'train/13\.jpg' in 'train' are"):
        check_rows(X[None], y, ids, NAMES, "train")


def test_labels_outside_the_classes_are_refused_by_name():
    X, y = blobs(20)
    y[3] = 7
    with pytest.raises(UserError, match="sample '3' of 'train' has label 7, but there are 3"):
        check_rows(X[None], y, [str(i) for i in range(20)], NAMES, "train")
    with pytest.raises(UserError, match="has no rows"):
        check_rows(X[None, :0], y[:0], [], NAMES, "train")


def test_shots_give_mean_and_spread(tmp_path):
    cache = toy_cache(tmp_path / "toy.h5")
    config = TrainHeadConfig(cache=cache, cache_dir=tmp_path, shots=4, num_seeds=3)
    report = train_head(config)
    shots = report["shots"]
    scores = [s["test_top1"] for s in shots["seeds"]]
    assert report["num_train"] == 12
    assert shots["mean"] == pytest.approx(np.mean(scores))
    assert shots["std"] == pytest.approx(np.std(scores, ddof=1))
    assert len(set(scores)) > 1
    assert report["test_top1"] == scores[0]
    assert shots["short_classes"] == []


def test_one_shot_has_nothing_to_choose_on(tmp_path):
    cache = toy_cache(tmp_path / "toy.h5")
    config = TrainHeadConfig(cache=cache, cache_dir=tmp_path, shots=1, num_seeds=1, solver="auto")
    report = train_head(config)
    assert report["val_top1"] is None
    assert report["shots"]["std"] is None


def test_balanced_weights_raise_the_rare_class(tmp_path):
    X, y = blobs(400, num_classes=2, spread=4.0, seed=1)
    rare = (y == 0) | (np.arange(400) % 20 == 1)
    splits = {"train": (X[rare], y[rare]), "test": blobs(200, num_classes=2, spread=4.0, seed=2)}
    scores = {}
    for weight in ("none", "balanced"):
        report, _ = run(tmp_path, splits, ["a", "b"], class_weight=weight)
        scores[weight] = report
        (tmp_path / "c.h5").unlink()
    assert scores["balanced"]["per_class"]["b"] > scores["none"]["per_class"]["b"]
    assert scores["balanced"]["balanced_top1"] > scores["none"]["balanced_top1"]


@pytest.mark.parametrize("solver", ["logistic", "ridge", "adam"])
def test_views_train_and_tta_averages_them(tmp_path, solver):
    X, y = blobs(120, seed=1)
    Z, t = blobs(60, seed=2)
    random = np.random.default_rng(0)
    train = np.stack([X, X + random.normal(size=X.shape).astype(np.float32)])
    test = np.stack([Z, Z + random.normal(size=Z.shape).astype(np.float32)])
    splits = {"train": (train, y), "test": (test, t)}
    report, head = run(tmp_path, splits, solver=solver, tta=True)
    mean = (head.predict_proba(test[0]) + head.predict_proba(test[1])) / 2
    assert report["test_top1"] == np.mean(mean.argmax(axis=1) == t)
    assert report["scored_on"] == "test, mean over 2 views (60 rows)"
    (tmp_path / "c.h5").unlink()
    plain, _ = run(tmp_path, splits, solver=solver)
    assert plain["scored_on"] == "test, view 0 (60 rows)"


def test_tta_needs_views(tmp_path):
    cache = toy_cache(tmp_path / "toy.h5")
    with pytest.raises(UserError, match="this cache has one"):
        train_head(TrainHeadConfig(cache=cache, tta=True))


@pytest.fixture
def students(tmp_path):
    """Labels are noise, but ten students repeat their own pictures almost exactly."""
    random = np.random.default_rng(0)
    y = random.integers(3, size=(10, 6)).repeat(5)
    X = random.normal(size=(60, 8)).repeat(5, axis=0) + 0.01 * random.normal(size=(300, 8))
    groups = [f"s{i // 30}" for i in range(300)]
    splits = {"train": (X.astype(np.float32), y), "test": (X[:60].astype(np.float32), y[:60])}
    return rows_cache(tmp_path / "g.h5", splits, NAMES, groups={"train": groups})


@pytest.mark.parametrize("select", ["holdout", "cv"])
def test_groups_do_not_choose_for_themselves(students, select):
    config = TrainHeadConfig(cache=students, solver="knn", select=select)
    data = load_data(FeatureCache(students))
    for fit, held in data.selection(config).pairs:
        assert 0 < held.num_rows < 300
        assert held.num_rows % 30 == fit.num_rows % 30 == 0
    report = train_head(config)
    assert report["val_top1"] < 0.6  # 1.0 where pictures of a student choose for each other
    assert "groups kept together, seed 42" in report["chosen_on"]


def test_groups_stay_together_when_streamed(students):
    split = FeatureCache(students).split("train")
    held = draw_held(TrainHeadConfig(cache=students), split, 3)
    assert len(held) == 60
    assert len(set(split.groups[held])) == 2


def test_few_shots_come_from_few_groups(students):
    split = FeatureCache(students).split("train")
    rows = draw_shots(split.y, 4, 42, 0, split.groups)
    assert np.bincount(split.y[rows]).tolist() == [4, 4, 4]
    assert len(set(split.groups[rows])) <= 3
    assert len(set(split.groups[draw_shots(split.y, 4, 42, 0)])) > 5
    assert not np.array_equal(rows, draw_shots(split.y, 4, 42, 1, split.groups))
    report = train_head(TrainHeadConfig(cache=students, shots=4, num_seeds=2))
    assert report["shots"]["num_seeds"] == 2

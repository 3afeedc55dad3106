"""Heads for several labels per image, and for a number."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score

from cache_helpers import rows_cache
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, summary_lines, train_head
from featcache.heads.targets import best_threshold

NAMES = ["red", "round", "shiny"]


def label_rows(num, seed):
    """Three labels that depend on different directions, one of them rare."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(num, 8)).astype(np.float32)
    noise = random.normal(size=(num, 3))
    y = (X[:, :3] * [2, 2, 3] + noise > [0, 1, 3]).astype(np.uint8)
    return X, y


def value_rows(num, seed):
    random = np.random.default_rng(seed)
    X = random.normal(size=(num, 8)).astype(np.float32)
    return X, 100 + 10 * X[:, 0] - 5 * X[:, 1] + random.normal(size=num)


@pytest.fixture
def labels(tmp_path):
    splits = {"train": label_rows(400, 1), "test": label_rows(200, 2)}
    return rows_cache(tmp_path / "labels.h5", splits, NAMES)


@pytest.fixture
def values(tmp_path):
    splits = {"train": value_rows(300, 1), "test": value_rows(100, 2)}
    return rows_cache(tmp_path / "values.h5", splits, ["age"])


def run(cache, **settings):
    return train_head(TrainHeadConfig(cache=cache, **settings))


def test_the_cache_gives_labels_and_numbers_to_estimators(labels, values):
    _, y = FeatureCache(labels).split("train")
    assert np.array_equal(y, label_rows(400, 1)[1])
    _, y = FeatureCache(values).split("train")
    assert np.array_equal(y, value_rows(300, 1)[1])
    assert FeatureCache(values).split("train")[3:5][1].tolist() == y[3:5].tolist()


def test_each_label_is_a_logistic_regression_of_its_own(labels):
    report = run(labels, C=1.0, standardize="off")
    head = load_head(report["head"])
    (X, y), (X_test, y_test) = label_rows(400, 1), label_rows(200, 2)
    rivals = [LogisticRegression(C=1.0, tol=1e-8).fit(X, column) for column in y.T]
    expected = np.stack([rival.predict_proba(X_test)[:, 1] for rival in rivals], axis=1)
    assert np.abs(head.predict_proba(X_test) - expected).max() < 1e-4
    precision = average_precision_score(y_test, expected)
    assert report["target_scores"]["mean_average_precision"] == pytest.approx(precision, abs=1e-3)
    low, high = report["target_scores"]["interval"]
    assert low < precision < high
    assert report["test_top1"] is None
    assert np.array_equal(
        head.predict(X_test), expected >= np.array(head.decision.label_thresholds)
    )


def test_labels_choose_their_settings_and_thresholds_on_held_out_rows(labels):
    report = run(labels)
    assert set(report["chosen"]) == set(NAMES)
    assert report["chosen_on"].startswith("a held-out 20% of train")
    assert report["scored_on"] == "test, view 0 (200 rows)"
    thresholds = np.array(load_head(report["head"]).decision.label_thresholds)
    assert ((thresholds > 0) & (thresholds < 1)).all()
    scores = report["target_scores"]
    assert scores["per_label"]["shiny"]["support"] == int(label_rows(200, 2)[1][:, 2].sum())
    assert 0.8 < scores["mean_average_precision"] < 1
    assert run(labels)["target_scores"] == scores
    text = "\n".join(summary_lines(report))
    assert "test mean average precision 0." in text
    assert "  shiny: average precision 0." in text


def test_a_label_that_no_train_row_has_is_never_predicted(tmp_path):
    (X, y), test = label_rows(300, 1), label_rows(100, 2)
    y[:, 1] = 0
    path = rows_cache(tmp_path / "x.h5", {"train": (X, y), "test": test}, NAMES)
    report = run(path)
    assert report["chosen"]["round"] is None
    head = load_head(report["head"])
    assert not head.predict(test[0])[:, 1].any()
    assert head.predict_proba(test[0])[:, 1].max() == 0


def test_best_threshold_has_the_highest_f1():
    truth = np.array([0, 0, 1, 0, 1, 1, 1, 1.0])
    probabilities = np.array([0.1, 0.2, 0.3, 0.35, 0.4, 0.6, 0.7, 0.9])
    assert best_threshold(truth, probabilities) == pytest.approx(0.25)
    assert best_threshold(truth[:4], probabilities[:4]) == 0.5  # one positive row is too few


def test_a_number_is_a_ridge_regression(values):
    report = run(values, solver="ridge", alpha=2.0, standardize="off")
    head = load_head(report["head"])
    (X, y), (X_test, y_test) = value_rows(300, 1), value_rows(100, 2)
    expected = Ridge(alpha=2.0).fit(X, y).predict(X_test)
    assert np.abs(head.predict(X_test) - expected).max() < 1e-3
    scores = report["target_scores"]
    assert scores["r2"] == pytest.approx(r2_score(y_test, expected), abs=1e-5)
    assert scores["mae"] == pytest.approx(np.abs(expected - y_test).mean(), abs=1e-4)
    assert scores["r2_interval"][0] < scores["r2"] < scores["r2_interval"][1]


def test_a_number_chooses_alpha_by_squared_error(values, capsys):
    report = run(values)
    assert "the target is a number: ridge regression instead of logistic" in capsys.readouterr().err
    assert report["chosen"]["alpha"] < 100
    assert 0.98 < report["val_score"] < 1
    assert report["target_scores"]["mae"] < 1 < report["target_scores"]["baseline_mae"]
    assert "test R squared 0.9" in "\n".join(summary_lines(report))
    json.dumps(report)


def test_the_offset_of_a_target_does_not_matter(tmp_path):
    reports = []
    for offset in (0.0, 1e6):
        splits = {}
        for name, seed in (("train", 1), ("test", 2)):
            X, y = value_rows(200, seed)
            splits[name] = (X, y + offset)
        reports.append(run(rows_cache(tmp_path / f"{offset}.h5", splits, ["age"])))
    assert reports[0]["chosen"] == reports[1]["chosen"]
    assert reports[0]["target_scores"]["r2"] == pytest.approx(
        reports[1]["target_scores"]["r2"], abs=1e-2
    )


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("labels", {"solver": "knn"}, "--solver knn is not for {}: give --solver logistic"),
        ("values", {"solver": "knn"}, "--solver knn is not for {}: give --solver ridge"),
        ("labels", {"shots": 5}, "--shots is not for {}: leave it out"),
        ("values", {"class_weight": "balanced"}, "--class-weight is not for {}: leave it out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind, settings, message, request):
    with pytest.raises(UserError) as caught:
        run(request.getfixturevalue(kind), **settings)
    what = {"labels": "several labels per image", "values": "a number per image"}[kind]
    assert str(caught.value) == message.format(what)

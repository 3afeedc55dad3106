"""Temperature and threshold: fitted on rows the head had not seen, stored, and used everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache, toy_cache
from conftest import TESTS
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, save_head, summary_lines, train_head
from featcache.heads.calibration import choose_threshold, fit_temperature
from featcache.heads.linear import PLAIN, Decision, softmax

SOLVERS = ["logistic", "ridge", "adam"]


def two_classes(path: Path) -> Path:
    splits = {
        name: blobs(400, num_classes=2, seed=seed, spread=3)
        for seed, name in enumerate(("train", "test"), start=1)
    }
    return rows_cache(path, splits, ["no", "yes"])


def run(cache: Path, **settings: object) -> dict:
    return train_head(TrainHeadConfig(cache=cache, cache_dir=cache.parent, **settings))


def drawn_logits(num_rows: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times as large as probabilities of the labels say."""
    random = np.random.default_rng(0)
    true = random.normal(size=(num_rows, 5)) * 2
    cumulated = softmax(true).cumsum(axis=1)
    labels = (random.uniform(size=(num_rows, 1)) > cumulated).sum(axis=1)
    return true * temperature, np.minimum(labels, 4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_found(temperature: float) -> None:
    logits, labels = drawn_logits(20_000, temperature)
    found = fit_temperature(logits, labels, np.ones(len(labels)))
    assert found == pytest.approx(temperature, rel=0.03)


def test_the_temperature_is_that_of_scikit_learn_and_weights_count() -> None:
    from scipy.optimize import minimize_scalar

    logits, labels = drawn_logits(5000, 2.0)
    weights = np.random.default_rng(1).uniform(size=len(labels))

    def loss(log_temperature: float) -> float:
        table = softmax(logits / np.exp(log_temperature))
        return float(-weights @ np.log(table[np.arange(len(labels)), labels]))

    wanted = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    assert fit_temperature(logits, labels, weights) == pytest.approx(wanted, rel=0.005)


def test_a_few_right_rows_do_not_promise_certainty() -> None:
    logits = np.array([[3.0, 0.0], [0.0, 2.0], [4.0, 1.0]])
    temperature = fit_temperature(logits, np.array([0, 1, 0]), np.ones(3))
    assert softmax(logits / temperature).max() < 0.9


@pytest.mark.parametrize("solver", SOLVERS)
def test_probabilities_of_every_solver_are_calibrated(tmp_path: Path, solver: str) -> None:
    report = run(toy_cache(tmp_path / "toy.h5"), solver=solver)
    head = load_head(report["head"])
    assert head.decision.temperature == report["calibration"]["temperature"] != 1
    assert head.decision.fitted_on.startswith("a held-out 20% of train")
    X, y = blobs(90, seed=2)
    assert head.predict_proba(X) == pytest.approx(
        softmax(head.decision_function(X) / head.decision.temperature), abs=1e-6
    )
    own = head.predict_proba(X)[np.arange(90), y]
    assert report["scores"]["log_loss"] == pytest.approx(-np.log(own).mean(), abs=1e-4)
    plain = softmax(head.decision_function(X))[np.arange(90), y]
    assert -np.log(own).mean() < -np.log(np.maximum(plain, 1e-7)).mean() + 0.02


def test_intervals_and_held_out_rows_keep_groups_together(tmp_path: Path) -> None:
    splits = {"train": blobs(240, seed=1), "test": blobs(90, seed=2)}
    groups = {name: [f"g{i // 6}" for i in range(len(y))] for name, (_, y) in splits.items()}
    cache = rows_cache(tmp_path / "g.h5", splits, ["a", "b", "c"], groups=groups)
    report = run(cache)
    assert report["scores"]["intervals_from"] == "200 bootstrap resamples of 15 groups"
    assert report["test_interval"] == report["scores"]["intervals"]["top1"]
    assert "groups" in report["calibration"]["fitted_on"]


def test_votes_stay_as_they_are(tmp_path: Path) -> None:
    report = run(toy_cache(tmp_path / "toy.h5"), solver="knn")
    head = load_head(report["head"])
    assert head.decision.temperature == report["calibration"]["temperature"] == 1
    X, _ = blobs(90, seed=2)
    assert head.predict_proba(X) == pytest.approx(head.shares(X), abs=1e-6)


def test_what_choosing_saw_calibrates(tmp_path: Path) -> None:
    """Given settings are fitted again to the other part of train, with the same result."""
    cache = toy_cache(tmp_path / "toy.h5")
    chosen = run(cache)
    settings = chosen["chosen"]
    given = run(cache, C=settings["C"], standardize="on" if settings["standardize"] else "off")
    temperatures = [r["calibration"]["temperature"] for r in (chosen, given)]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=0.05)
    folds = run(cache, select="cv", folds=3)["calibration"]
    assert folds["fitted_on"].startswith("3-fold cross-validation")


def test_without_held_out_rows_nothing_is_calibrated(tmp_path: Path) -> None:
    X, y = blobs(3)
    cache = rows_cache(tmp_path / "few.h5", {"train": (X, y), "test": blobs(9)}, ["a", "b", "c"])
    report = run(cache)
    assert report["calibration"]["temperature"] == 1
    assert report["calibration"]["fitted_on"] == "nothing"
    assert load_head(report["head"]).decision == PLAIN


def test_a_class_without_fitted_rows_does_not_spoil_the_temperature(tmp_path: Path) -> None:
    X, y = blobs(120, seed=1)
    val, labels = blobs(60, seed=3)
    splits = {"train": (X[y < 2], y[y < 2]), "val": (val, labels), "test": blobs(60, seed=2)}
    report = run(rows_cache(tmp_path / "v.h5", splits, ["a", "b", "c"]))
    assert 0.2 < report["calibration"]["temperature"] < 5


def test_threshold_by_hand() -> None:
    truth = np.array([True, True, False, True, False])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    sure = choose_threshold(truth, scores, "precision", 1.0, positive=1)
    assert sure.probability == pytest.approx(0.75)
    assert (sure.precision, sure.recall) == (1.0, pytest.approx(2 / 3))
    most = choose_threshold(truth, scores, "recall", 1.0, positive=1)
    assert most.probability == pytest.approx(0.35)
    assert (most.precision, most.recall) == (0.75, 1.0)
    with pytest.raises(UserError, match=r"precision=0.9: no threshold .* \(at most 0.667\): ask"):
        choose_threshold(~truth, np.array([0.1, 0.9, 0.8, 0.2, 0.85]), "precision", 0.9, positive=0)


def test_the_threshold_is_stored_and_decides(tmp_path: Path) -> None:
    cache = two_classes(tmp_path / "two.h5")
    plain, report = run(cache), run(cache, threshold_for="precision=0.9")
    head, threshold = load_head(report["head"]), report["threshold"]
    assert threshold["class"] == "yes"
    assert threshold["precision"] >= 0.9
    X, y = blobs(400, num_classes=2, seed=2, spread=3)
    wanted = head.predict_proba(X)[:, 1] >= threshold["probability"]
    assert np.array_equal(head.predict(X), wanted)
    saved = json.loads(Path(report["head"]).with_suffix(".json").read_text())
    assert saved["test"]["predicted"] == wanted.astype(int).tolist()
    classes = report["scores"]["classes"]
    assert classes["yes"]["precision"] > plain["scores"]["classes"]["yes"]["precision"]
    assert report["test_top1"] == head.score(X, y)
    text = "\n".join(summary_lines(report))
    assert f"yes from a probability of {threshold['probability']:.3f}: precision" in text
    recall = run(cache, threshold_for="recall=0.95", positive="no")
    assert recall["threshold"]["class"] == "no"
    assert recall["scores"]["classes"]["no"]["recall"] > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold_for": "accuracy=0.9"}, "give precision=LEVEL or recall=LEVEL"),
        ({"threshold_for": "recall=2"}, "give precision=LEVEL or recall=LEVEL"),
        ({"threshold_for": "recall"}, "give precision=LEVEL or recall=LEVEL"),
        ({"positive": "yes"}, "positive is for threshold_for: leave it out, or give both"),
        ({"threshold_for": "recall=1", "positive": "x"}, "positive 'x': give 'no' or 'yes'"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    cache = two_classes(tmp_path / "two.h5")
    with pytest.raises(UserError, match=message):
        run(cache, **settings)


def test_a_threshold_needs_two_classes_and_held_out_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is for two classes, and .* has 3: leave it out"):
        run(toy_cache(tmp_path / "toy.h5"), threshold_for="recall=0.9")
    splits = {"train": blobs(2, num_classes=2), "test": blobs(9, num_classes=2)}
    few = rows_cache(tmp_path / "few.h5", splits, ["a", "b"])
    with pytest.raises(UserError, match="no row can be held out"):
        run(few, threshold_for="recall=0.9")


def test_old_heads_calibrate_nothing_and_new_ones_are_checked(tmp_path: Path) -> None:
    old = load_head(TESTS / "formats" / "v0.1.0" / "logistic.safetensors")
    assert old.decision == PLAIN
    path = tmp_path / "h.safetensors"
    save_head(path, old)
    assert b"decision" not in path.read_bytes()
    save_head(path, old.replace(decision=Decision(temperature=2.0)))
    assert load_head(path).decision.temperature == 2.0
    data = path.read_bytes()
    for junk in (b"-2.0", b"null", b"1e99", b"true"):
        path.write_bytes(data.replace(b'\\"temperature\\": 2.0', b'\\"temperature\\":' + junk[:4]))
        with pytest.raises(UserError, match="damaged"):
            load_head(path)


def test_the_estimator_predicts_as_the_head(tmp_path: Path) -> None:
    from featcache.heads.estimator import FeatureHeadClassifier

    cache = two_classes(tmp_path / "two.h5")
    head = load_head(run(cache, threshold_for="recall=0.95")["head"])
    model = FeatureHeadClassifier.from_head(head)
    X, _ = blobs(100, num_classes=2, seed=5)
    assert np.array_equal(model.predict_proba(X), head.predict_proba(X))
    assert np.array_equal(model.predict(X), head.predict(X))
    assert model.to_head().decision == head.decision
    assert model.fit(X, np.arange(100) % 2).decision_ == PLAIN

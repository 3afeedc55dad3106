"""The scores are scikit-learn's; intervals cover; what has no meaning is None."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from featcache.config.checks import record_from_json
from featcache.results.ranking import rank, resample
from featcache.results.scores import Scores, score_predictions

NAMES = ["ape", "bee", "cat", "dog"]


def drawn(num_rows: int, num_classes: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Labels, predictions and probabilities with many ties."""
    random = np.random.default_rng(seed)
    labels = random.integers(num_classes, size=num_rows)
    logits = random.normal(size=(num_rows, num_classes))
    logits[np.arange(num_rows), labels] += 1.5
    table = np.exp(logits).round(1) + 0.1
    table /= table.sum(axis=1, keepdims=True)
    return labels, table.argmax(axis=1), table


@pytest.mark.parametrize(("num_rows", "num_classes"), [(400, 4), (37, 2), (300, 3)])
def test_scores_are_those_of_scikit_learn(num_rows: int, num_classes: int) -> None:
    from sklearn import metrics

    labels, predicted, table = drawn(num_rows, num_classes)
    names = NAMES[:num_classes]
    found = score_predictions(labels, predicted, table, names)
    one_hot = np.eye(num_classes, dtype=int)[labels]
    by_class = {
        "auroc": metrics.roc_auc_score(one_hot, table, average=None),
        "average_precision": metrics.average_precision_score(one_hot, table, average=None),
    }
    for key, values in zip(
        ("precision", "recall", "f1", "support"),
        metrics.precision_recall_fscore_support(labels, predicted),
        strict=True,
    ):
        by_class[key] = values
    for key, values in by_class.items():
        ours = [getattr(found.classes[name], key) for name in names]
        assert ours == pytest.approx(list(values), abs=1e-6), key
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    weighted = metrics.f1_score(labels, predicted, average="weighted")
    assert found.weighted_f1 == pytest.approx(weighted, abs=1e-6)
    balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert found.balanced_top1 == pytest.approx(balanced, abs=1e-6)
    assert found.auroc == pytest.approx(by_class["auroc"].mean(), abs=1e-6)
    assert found.average_precision == pytest.approx(by_class["average_precision"].mean(), abs=1e-6)
    assert found.log_loss == pytest.approx(metrics.log_loss(labels, table), abs=1e-6)


def test_weighted_ranks_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    labels, _, table = drawn(200, 2)
    weights = resample(200, 3, None, seed=1)
    ranking = rank(labels == 1, table[:, 1], weights)
    for number in range(4):
        own = weights[:, number]
        wanted = metrics.roc_auc_score(labels, table[:, 1], sample_weight=own)
        assert ranking.auroc()[number] == pytest.approx(wanted)
        wanted = metrics.average_precision_score(labels, table[:, 1], sample_weight=own)
        assert ranking.average_precision()[number] == pytest.approx(wanted)


def test_two_classes_have_the_curves_of_scikit_learn() -> None:
    from sklearn import metrics

    labels, predicted, table = drawn(60, 2)
    curves = score_predictions(labels, predicted, table, ["no", "yes"]).curves
    assert curves is not None
    assert curves.positive == "yes"
    false, true, thresholds = metrics.roc_curve(labels, table[:, 1], drop_intermediate=False)
    assert np.array(curves.roc)[:, 1:] == pytest.approx(np.c_[false, true][1:], abs=1e-6)
    assert np.array(curves.roc)[:, 0] == pytest.approx(thresholds[1:], abs=1e-6)
    precision, recall, _ = metrics.precision_recall_curve(labels, table[:, 1])
    wanted = np.c_[recall, precision][-2::-1]
    assert np.array(curves.precision_recall)[:, 1:] == pytest.approx(wanted, abs=1e-6)
    assert score_predictions([0, 0], [0, 1], table[:2], ["no", "yes"]).curves is None
    long = score_predictions(*drawn(5000, 2), ["no", "yes"]).curves
    assert long is not None
    assert len(long.roc) <= 60
    assert long.roc[-1][1:] == (1, 1)


def test_what_has_no_meaning_is_none() -> None:
    found = score_predictions([0, 0, 1], [0, 1, 1], None, ["ape", "bee", "cat"])
    cat = found.classes["cat"]
    assert (cat.support, cat.precision, cat.recall, cat.f1, cat.auroc) == (
        0,
        None,
        None,
        None,
        None,
    )
    assert found.macro_f1 == pytest.approx(2 / 3, abs=1e-6)
    assert found.log_loss is None
    assert found.curves is None
    never = score_predictions([0, 1], [0, 0], None, ["ape", "bee"]).classes["bee"]
    assert (never.precision, never.recall, never.f1) == (0.0, 0.0, 0.0)


def test_intervals_cover_and_two_runs_agree() -> None:
    """The true AUROC of this drawing is that of a very large sample of it."""
    truth = score_predictions(*drawn(50_000, 3, seed=9), NAMES[:3])
    covered = 0
    for seed in range(20):
        found = score_predictions(*drawn(200, 3, seed=seed), NAMES[:3])
        low, high = found.intervals["auroc"]
        covered += low <= truth.auroc <= high
    assert covered >= 17  # of 20 at 95 %
    assert score_predictions(*drawn(200, 3), NAMES[:3]) == score_predictions(
        *drawn(200, 3), NAMES[:3]
    )


def test_groups_are_drawn_whole_and_widen_the_intervals() -> None:
    labels = np.tile([0, 1], 100)
    groups = np.repeat([f"g{i}" for i in range(20)], 10)
    predicted = np.where(np.repeat(np.arange(20) % 4 > 0, 10), labels, 1 - labels)
    rows = score_predictions(labels, predicted, None, ["no", "yes"])
    whole = score_predictions(labels, predicted, None, ["no", "yes"], groups=groups)
    assert rows.intervals_from == "200 bootstrap resamples of test rows"
    assert whole.intervals_from == "200 bootstrap resamples of 20 groups"
    width = [np.ptp(found.intervals["macro_f1"]) for found in (rows, whole)]
    assert width[1] > 2 * width[0]
    low, high = whole.intervals["top1"]
    assert low < 0.6
    assert high > 0.85
    assert whole.top1_interval(150, 200) == (low, high)
    assert rows.top1_interval(150, 200)[0] == pytest.approx(0.686, abs=1e-3)
    counts = resample(200, 5, groups, seed=1)
    assert (counts.reshape(20, 10, 6).std(axis=1) == 0).all()
    few = score_predictions(labels, predicted, None, ["no", "yes"], groups=np.arange(200) % 4)
    assert few.intervals == {}
    assert few.intervals_from == "0 bootstrap resamples of 4 groups"


def test_too_many_values_have_no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    import featcache.results.scores as module

    monkeypatch.setattr(module, "MAX_DRAWN", 200 * 110)
    found = score_predictions(*drawn(200, 4), NAMES)
    assert found.intervals.keys() == {"macro_f1", "weighted_f1", "balanced_top1", "log_loss"}
    assert found.classes["ape"].intervals.keys() == {"precision", "recall", "f1"}


def test_scores_from_json_are_the_same_or_refused() -> None:
    found = score_predictions(*drawn(50, 2), ["no", "yes"])
    import dataclasses

    values = json.loads(json.dumps(dataclasses.asdict(found)))
    assert record_from_json(Scores, values) == found
    for path, junk in (
        (("macro_f1",), 1.5),
        (("log_loss",), -1),
        (("intervals", "auroc"), [0, 2]),
        (("classes", "no", "f1"), -0.1),
        (("classes", "no", "support"), -1),
        (("curves", "roc"), [[0, 0, 7]]),
    ):
        changed = json.loads(json.dumps(values))
        target = changed
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = junk
        with pytest.raises(ValueError, match="is out of range"):
            record_from_json(Scores, changed)

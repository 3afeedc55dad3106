"""Few rows of many classes: scikit-learn's objective, in a bounded number of passes."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cache_helpers import rows_cache
from featcache.config import TrainHeadConfig
from featcache.heads import load_head, train_head
from featcache.heads.solvers.few_rows import are_few
from featcache.heads.solvers.logistic import C_GRID, LogisticPath, LogisticProblem
from featcache.heads.training_data import Rows


def rows_of(num_classes=100, dim=40, *, per_class=2, weights=None, seed=0):
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(num_classes), per_class)
    X = random.normal(size=(num_classes, dim))[y] + random.normal(size=(len(y), dim))
    return Rows(
        views=X[None].astype(np.float32),
        y=y,
        weights=np.ones(len(y)) if weights is None else weights,
        class_names=[str(i) for i in range(num_classes)],
    )


def their_objective(rows, strength, *, standardize):
    """The objective per unit of weight where scikit-learn ends."""
    X = rows.plain.astype(float)
    mean = np.average(X, axis=0, weights=rows.weights)
    Z = X - mean
    if standardize:
        Z /= np.sqrt(np.average(Z**2, axis=0, weights=rows.weights))
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
    model.fit(Z, rows.y, sample_weight=rows.weights)
    log_p = model.predict_log_proba(Z)[np.arange(len(rows.y)), rows.y]
    total = strength * float(rows.weights @ -log_p) + 0.5 * float((model.coef_**2).sum())
    return total / (strength * rows.weights.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(
    ("strength", "most_passes"), [(1e-4, 4), (1e-2, 10), (1.0, 20), (100.0, 40), (1e4, 80)]
)
def test_reaches_the_minimum_in_few_passes(strength, most_passes, standardize, weighted):
    weights = np.linspace(0.3, 2, 200) if weighted else None
    rows = rows_of(weights=weights)
    assert are_few(rows.num_rows, rows.feature_dim, rows.num_classes)
    fit = LogisticPath(LogisticProblem(rows), standardize=standardize).fit(strength)
    assert fit.converged
    assert fit.num_passes <= most_passes
    best = their_objective(rows, strength, standardize=standardize)
    assert fit.objective <= best * (1 + 1e-6)


@pytest.mark.parametrize("num_classes", [30, 5])  # by the solver of few rows, and by the usual one
def test_more_features_than_rows_need_no_more_columns_than_rows(num_classes):
    rows = rows_of(num_classes, 300)
    problem = LogisticProblem(rows)
    path = LogisticPath(problem, standardize=False)
    fit = path.fit(1.0, 1e-9)
    assert path._before[-1][1].point.shape == (2 * num_classes + 1, num_classes)
    assert path.last().point.shape == (301, num_classes)
    head = fit.head
    assert fit.objective == pytest.approx(their_objective(rows, 1.0, standardize=False), rel=1e-6)
    # The head gives the logits that were fitted: turning back loses nothing.
    X = rows.plain.astype(float)
    logits = X @ head.weight.T + head.bias
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(rows.num_rows), rows.y].mean()
    loss += np.vdot(head.weight, head.weight) / (2 * rows.num_rows)
    assert loss == pytest.approx(fit.objective, rel=1e-6)


def test_all_strengths_one_after_another_end_where_cold_fits_end():
    problem = LogisticProblem(rows_of())
    warm = LogisticPath(problem, standardize=False)
    passes = 0
    for strength in C_GRID:
        fit = warm.fit(strength)
        cold = LogisticPath(problem, standardize=False).fit(strength)
        assert fit.converged
        assert fit.objective == pytest.approx(cold.objective, rel=1e-6)
        passes += fit.num_passes
    assert passes < 150


def test_equal_rows_of_different_classes_converge():
    random = np.random.default_rng(3)
    X = np.repeat(random.normal(size=(40, 20)), 3, axis=0).astype(np.float32)
    names = [str(i) for i in range(60)]
    rows = Rows(views=X[None], y=np.arange(120) % 60, weights=np.ones(120), class_names=names)
    fit = LogisticPath(LogisticProblem(rows), standardize=False).fit(1.0)
    assert fit.objective <= their_objective(rows, 1.0, standardize=False) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("num_rows", "dim", "num_classes", "few"),
    [
        (2400, 512, 1200, True),
        (100, 512, 10, False),  # few classes
        (5000, 512, 100, False),  # many rows per class
        (50_000, 512, 10_000, False),  # two gigabytes of probabilities
        (4000, 2048, 4100, False),  # as many of heavy rows
    ],
)
def test_which_rows_are_few(num_rows, dim, num_classes, few):
    assert are_few(num_rows, dim, num_classes) is few


def test_streamed_rows_start_where_few_sampled_ones_end(tmp_path):
    rows, test = rows_of(30, 12, per_class=4), rows_of(30, 12, per_class=1)
    splits = {"train": (rows.plain, rows.y), "test": (test.plain, test.y)}
    cache = rows_cache(tmp_path / "few.h5", splits, rows.class_names)
    weights = []
    for stream in ("on", "off"):
        report = train_head(
            TrainHeadConfig(
                cache=cache, C=1.0, standardize="off", solver="logistic", stream=stream,
                output=tmp_path / f"{stream}.safetensors", cache_dir=tmp_path,
            )
        )  # fmt: skip
        assert report["streamed"] is (stream == "on")
        weights.append(load_head(tmp_path / f"{stream}.safetensors").weight)
    assert weights[0] == pytest.approx(weights[1], abs=2e-3)

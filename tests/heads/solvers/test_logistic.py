"""Logistic regression against scikit-learn's, whatever solves it."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cache_helpers import blobs
from featcache.heads.solvers.backends import SklearnPath, TorchPath
from featcache.heads.solvers.curvature import ShiftedInverses
from featcache.heads.solvers.lbfgs import Memory, minimize
from featcache.heads.solvers.logistic import LogisticPath, LogisticProblem
from featcache.heads.solvers.softmax_loss import loss_in_memory
from featcache.heads.training_data import Rows, balanced_weights

PATHS = [LogisticPath, SklearnPath, TorchPath]


def names_of(num_classes):
    return [str(i) for i in range(num_classes)]


def rows_of(X, y, *, num_classes=3, weights=None):
    views = X if X.ndim == 3 else X[None]
    weights = np.ones(len(y)) if weights is None else weights
    return Rows(views=views, y=np.asarray(y), weights=weights, class_names=names_of(num_classes))


def objective(weight, bias, X, y, strength, sample_weight=None):
    """scikit-learn's, as its documentation states it, for three classes or more."""
    X = X.astype(np.float64)
    logits = X @ weight.T + bias
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]
    sample_weight = np.ones(len(y)) if sample_weight is None else sample_weight
    return strength * float(sample_weight @ losses) + 0.5 * float((weight**2).sum())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_reaches_scikit_learns_objective(path, strength):
    X, y = blobs(200, dim=12)
    X = X * np.geomspace(0.1, 10, 12, dtype=np.float32) + 3  # correlated offsets, mixed scales
    fit = path(LogisticProblem(rows_of(X, y)), standardize=False).fit(strength)
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=50_000).fit(X.astype(float), y)
    best = objective(theirs.coef_, theirs.intercept_, X, y, strength)
    assert objective(fit.head.weight, fit.head.bias, X, y, strength) <= best * (1 + 1e-6)
    assert fit.converged


@pytest.mark.parametrize("path", PATHS)
def test_two_classes_are_scikit_learns_binary_problem(path):
    X, y = blobs(120, num_classes=2)
    fit = path(LogisticProblem(rows_of(X, y, num_classes=2)), standardize=False).fit(0.2, 1e-10)
    theirs = LogisticRegression(C=0.2, tol=1e-9, max_iter=10_000).fit(X.astype(float), y)
    assert fit.head.weight[1] - fit.head.weight[0] == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert fit.head.bias[1] - fit.head.bias[0] == pytest.approx(theirs.intercept_[0], abs=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_standardised_fit_is_that_of_scaled_rows(path):
    X, y = blobs(150)
    X = X * 7 + 3
    fit = path(LogisticProblem(rows_of(X, y)), standardize=True).fit(0.1, 1e-10)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    theirs = LogisticRegression(C=0.1, tol=1e-9, max_iter=10_000).fit(Z.astype(float), y)
    ours = X @ fit.head.weight.T + fit.head.bias
    other = Z @ theirs.coef_.T + theirs.intercept_
    centered = ours - ours.mean(axis=1, keepdims=True)
    assert centered == pytest.approx(other - other.mean(axis=1, keepdims=True), abs=2e-3)
    assert fit.head.mean == pytest.approx(X.mean(axis=0), rel=1e-5)
    assert fit.head.scale == pytest.approx(X.std(axis=0), rel=1e-5)


def test_weights_and_views_enter_the_objective():
    X, y = blobs(90)
    weights = np.linspace(0.1, 3, 90)
    fit = LogisticPath(LogisticProblem(rows_of(X, y, weights=weights)), standardize=False).fit(0.5)
    theirs = LogisticRegression(C=0.5, tol=1e-9, max_iter=10_000)
    theirs.fit(X.astype(float), y, sample_weight=weights)
    best = objective(theirs.coef_, theirs.intercept_, X, y, 0.5, weights)
    assert objective(fit.head.weight, fit.head.bias, X, y, 0.5, weights) <= best * (1 + 1e-6)
    # Two equal views are one view.
    twice = LogisticPath(LogisticProblem(rows_of(np.stack([X, X]), y)), standardize=False)
    once = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False)
    assert twice.fit(0.5, 1e-12).head.weight == pytest.approx(
        once.fit(0.5, 1e-12).head.weight, abs=1e-4
    )


def test_warm_path_ends_where_cold_fits_end():
    X, y = blobs(150, dim=20)
    problem = LogisticProblem(rows_of(X, y))
    warm = LogisticPath(problem, standardize=False)
    strengths = np.geomspace(1e-3, 1e2, 11)
    passes = 0
    for strength in strengths:
        fit = warm.fit(strength)
        cold = LogisticPath(problem, standardize=False).fit(strength)
        assert fit.objective == pytest.approx(cold.objective, rel=1e-6)
        passes += fit.num_passes - cold.num_passes
    assert passes < 0  # and sooner


def test_float32_rows_reach_the_same_objective(monkeypatch):
    from featcache.heads.solvers import logistic

    X, y = blobs(300, dim=30)
    exact = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False).fit(1.0, 1e-12)
    monkeypatch.setattr(logistic, "SMALL", 0)
    single = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False).fit(1.0)
    best = objective(exact.head.weight, exact.head.bias, X, y, 1.0)
    assert objective(single.head.weight, single.head.bias, X, y, 1.0) == pytest.approx(
        best, rel=1e-6
    )


def test_gradient_is_the_slope_of_the_loss():
    random = np.random.default_rng(0)
    X, y = blobs(40, dim=5)
    loss = loss_in_memory(X.astype(np.float64), y, np.full(40, 1 / 40), 3)
    weight, bias = random.normal(size=(5, 3)), random.normal(size=3)
    _, gradient = loss.evaluate(weight, bias)
    for i, j in ((0, 0), (4, 2), (5, 1)):
        step = np.zeros((6, 3))
        step[i, j] = 1e-6
        up, _ = loss.evaluate(weight + step[:-1], bias + step[-1])
        down, _ = loss.evaluate(weight - step[:-1], bias - step[-1])
        assert gradient[i, j] == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_not_converged_is_said():
    X, y = blobs(100)
    loss = loss_in_memory(X, y, np.full(100, 0.01), 3)
    short = minimize(loss, 1e-6, ShiftedInverses(X), max_iterations=2)
    assert not short.converged
    assert short.gap > 1e-7 * short.objective


def test_moments_survive_large_offsets_and_constant_features():
    random = np.random.default_rng(0)
    X = random.normal(size=(500, 3))
    X[:, 1] += 1e4
    X[:, 2] = 1e6
    moments = rows_of(X.astype(np.float32), np.zeros(500, np.int64)).moments()
    mean, deviation = moments.mean(), moments.deviation()
    assert mean == pytest.approx(X.mean(axis=0), rel=1e-5, abs=1e-3)
    assert deviation[:2] == pytest.approx(X.std(axis=0)[:2], rel=1e-2)
    assert deviation[2] == 1.0


def test_balanced_weights_make_classes_alike():
    y = np.array([0, 0, 0, 2])
    assert balanced_weights(y, np.ones(4), 3).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    weights = balanced_weights(y, np.array([1.0, 2, 3, 2]), 3)
    assert np.bincount(y, weights) == pytest.approx([4, 0, 4])


def test_the_gradient_is_that_of_the_shares_as_they_are_rounded():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 4)).astype(np.float32)
    y = rng.integers(3, size=1500)
    loss = loss_in_memory(X, y, np.full(1500, 1 / 1500), 3)
    loss.exact = True
    _, gradient = loss.evaluate(np.zeros((4, 3)), np.zeros(3))
    share = float(np.float32(1 / 1500))
    expected = share * (1500 / 3 - np.bincount(y))
    assert gradient[-1] == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_nearly_separable_rows_converge_in_float32():
    with threadpool_limits(1):
        X, y = blobs(1600, dim=512)
        X = (X + 0.05 * np.random.default_rng(1).normal(size=X.shape)).astype(np.float32)
        rows = Rows(views=X[None], y=y, weights=np.ones(len(y)), class_names=names_of(3))
        path = LogisticPath(LogisticProblem(rows), standardize=True)
        for strength in (10.0, 31.6, 100.0):
            assert path.fit(strength).converged


@pytest.mark.parametrize("strength", [1.0, 100.0, 1000.0])
def test_few_separable_rows_of_many_classes_take_few_passes(strength):
    random = np.random.default_rng(0)
    y = np.arange(120) % 60
    X = np.abs(random.normal(size=(60, 100))[y] + random.normal(size=(120, 100)))
    rows = rows_of(X.astype(np.float32), y, num_classes=60)
    fit = LogisticPath(LogisticProblem(rows), standardize=False).fit(strength)
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(
        rows.plain.astype(float), y
    )
    best = objective(theirs.coef_, theirs.intercept_, X, y, strength)
    assert fit.converged
    assert objective(fit.head.weight, fit.head.bias, X, y, strength) <= best * (1 + 1e-6)
    assert fit.num_passes < 80


def test_of_wide_features_the_minimum_is_the_same():
    random = np.random.default_rng(0)
    y = np.arange(800) % 3
    X = (0.1 * random.normal(size=(3, 1000))[y] + random.normal(size=(800, 1000))).astype(
        np.float32
    )
    X -= X.mean(axis=0)
    fit = LogisticPath(LogisticProblem(rows_of(X, y)), standardize=False).fit(0.01)
    theirs = LogisticRegression(C=0.01, tol=1e-7, max_iter=2000).fit(X.astype(float), y)
    best = objective(theirs.coef_, theirs.intercept_, X, y, 0.01)
    assert objective(fit.head.weight, fit.head.bias, X, y, 0.01) <= best * (1 + 1e-6)


def test_what_was_learned_under_a_strong_penalty_does_not_mislead_under_a_weak_one():
    X, y = blobs(300, dim=40)
    X[:, 20:] = 1e-4 * np.random.default_rng(0).normal(size=(300, 20))  # hardly any curvature
    rows = rows_of(X.astype(np.float32), y)
    path = LogisticPath(LogisticProblem(rows), standardize=False)
    for strength in (1e-5, 1e4, 1e-5, 1e4):
        fit = path.fit(strength)
        cold = LogisticPath(LogisticProblem(rows), standardize=False).fit(strength)
        assert fit.converged
        assert fit.objective == pytest.approx(cold.objective, rel=1e-6)


def test_what_misleads_is_forgotten(monkeypatch):
    X, y = blobs(300, dim=20)
    X = (X - X.mean(axis=0)).astype(np.float32)
    loss = loss_in_memory(X, y, np.full(300, 1 / 300), 3)
    plain = minimize(loss, 1e-2, ShiftedInverses(X))

    def ascends(memory):  # as it may by rounding
        return -memory._turned if memory._order else memory._turned

    monkeypatch.setattr(Memory, "direction", ascends)
    misled = minimize(loss, 1e-2, ShiftedInverses(X), tolerance=1e-5)
    assert misled.converged
    assert misled.objective == pytest.approx(plain.objective, rel=1e-4)

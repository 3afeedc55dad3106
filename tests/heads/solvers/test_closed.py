"""Ridge and nearest neighbors."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from cache_helpers import blobs
from featcache.heads.selection import HeldOutScores, best_candidate
from featcache.heads.solvers.base import HeldOutPredictions
from featcache.heads.solvers.knn import KnnHead, nearest
from featcache.heads.solvers.moments import Moments
from featcache.heads.solvers.ridge import (
    RidgeSolver,
    best_factor,
    ridge_from_few_rows,
    ridge_from_moments,
)
from featcache.heads.training_data import Rows

NAMES = ["ape", "bee", "cat"]


def rows_of(X, y, weights=None):
    weights = np.ones(len(y)) if weights is None else weights
    return Rows(views=X[None], y=np.asarray(y), weights=weights, class_names=NAMES)


def from_moments(rows, *, standardize):
    return ridge_from_moments(rows.moments(products=True), NAMES, standardize=standardize)


@pytest.mark.parametrize("shape", [(100, 8), (10, 30)])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_ridge_is_scikit_learns(shape, alpha):
    X, y = blobs(shape[0], dim=shape[1])
    X = X.astype(np.float64) + 5
    weights = np.linspace(0.2, 2, len(y))
    rows = rows_of(X, y, weights)
    theirs = Ridge(alpha=alpha).fit(X, np.eye(3)[y], sample_weight=weights)
    for problem in (
        from_moments(rows, standardize=False),
        ridge_from_few_rows(rows, standardize=False),
    ):
        fit = problem.fit(alpha).head
        assert fit.weight == pytest.approx(theirs.coef_, abs=1e-7)
        assert fit.bias == pytest.approx(theirs.intercept_, abs=1e-6)


def test_both_sides_give_the_same_standardised_fit():
    X, y = blobs(30, dim=30)
    X = X.astype(np.float64) * np.geomspace(0.1, 9, 30)
    rows = rows_of(X, y)
    few = ridge_from_few_rows(rows, standardize=True)
    many = from_moments(rows, standardize=True)
    assert few.fit(2.0).head.weight == pytest.approx(many.fit(2.0).head.weight, abs=1e-8)
    assert few.leverage(X, 2.0) == pytest.approx(many.leverage(X, 2.0), abs=1e-8)


def test_leverage_gives_the_fit_without_each_row():
    X, y = blobs(40)
    X = X.astype(np.float64)
    rows = rows_of(X, y)
    problem = from_moments(rows, standardize=False)
    fit, onehot = problem.fit(1.0).head, np.eye(3)[y]
    left_out = onehot - (onehot - (X @ fit.weight.T + fit.bias)) / (
        1 - problem.leverage(X, 1.0)[:, None]
    )
    without = Ridge(alpha=1.0).fit(X[1:], onehot[1:])
    assert left_out[0] == pytest.approx(without.predict(X[:1])[0], abs=1e-8)


def test_ridge_probabilities_are_calibrated():
    X, y = blobs(300)
    prepared = RidgeSolver().prepare(rows_of(X, y), [])
    head = prepared.fit({"alpha": 1.0, "standardize": False}).head
    fresh, truth = blobs(3000, seed=9)
    probabilities = head.predict_proba(fresh)
    accuracy = head.score(fresh, truth)
    assert probabilities.max(axis=1).mean() == pytest.approx(accuracy, abs=0.08)


def test_best_factor_finds_the_scale_of_logits():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 3))
    noise = random.gumbel(size=logits.shape)
    y = (3.0 * logits + noise).argmax(axis=1)  # labels drawn from softmax(3 * logits)
    assert best_factor(logits, y, np.ones(len(y))) == pytest.approx(3.0, rel=0.05)


def test_moments_of_parts_add_up():
    X, y = blobs(60)
    X = X.astype(np.float64)
    whole, part, rest = (Moments.empty(np.ones(8), 3, products=True) for _ in range(3))
    whole.add(X, y, np.ones(60))
    part.add(X[:20], y[:20], np.ones(20))
    rest.add(X[20:], y[20:], np.ones(40))
    sums = part.plus(rest)
    assert sums.second == pytest.approx(whole.second)
    assert sums.cross == pytest.approx(whole.cross)
    assert sums.mean() == pytest.approx(X.mean(axis=0))
    assert sums.deviation() == pytest.approx(X.std(axis=0))


def test_moments_without_products_have_the_same_mean_and_deviation():
    X, y = blobs(60)
    rows = rows_of(X + 3, y, np.linspace(0.2, 2, 60))
    plain, whole = rows.moments(), rows.moments(products=True)
    assert plain.second is None
    assert plain.total == pytest.approx(whole.total)
    assert plain.mean() == pytest.approx(whole.mean(), rel=1e-6)
    assert plain.deviation() == pytest.approx(whole.deviation(), rel=1e-5)
    twice = plain.plus(rows.moments(plain.shift))
    assert twice.mean() == pytest.approx(plain.mean())
    assert twice.total == pytest.approx(2 * plain.total)


def test_all_alphas_predict_as_each_alone():
    X, y = blobs(80)
    fresh = rows_of(*blobs(40, seed=5))
    solver = RidgeSolver()
    rows = rows_of(X, y)
    candidates = solver.series(rows)[1]
    together = solver.prepare(rows, candidates)
    for settings in candidates[::7]:
        alone = solver.prepare(rows, [settings]).fit(settings).head.predict(fresh.plain)
        answer = together.predict(settings, fresh)
        assert np.array_equal(answer.classes, alone)
        scores = Ridge(alpha=settings["alpha"]).fit(
            StandardScaler().fit(X).transform(X), np.eye(3)[y]
        ).predict(StandardScaler().fit(X).transform(fresh.plain))  # fmt: skip
        errors = ((scores - np.eye(3)[fresh.y]) ** 2).sum(axis=1)
        assert answer.losses == pytest.approx(errors, rel=1e-3, abs=1e-5)


def test_accuracies_that_cannot_be_told_apart_are_decided_by_the_loss():
    held = rows_of(np.zeros((16, 1), np.float32), np.arange(16) % 2)

    def best_of(*candidates):
        grid = []
        for place, (num_right, loss) in enumerate(candidates):
            classes = np.where(np.arange(16) < num_right, held.y, 1 - held.y)
            losses = None if loss is None else np.full(16, loss)
            scores = HeldOutScores()
            scores.add(held, HeldOutPredictions(classes, losses))
            grid.append(({"C": place}, scores))
        return best_candidate(grid, "held-out").settings["C"]

    # 12 of 16 has a standard error of sqrt(12/16 * 4/16 / 16) = 0.108, less than two rows.
    assert best_of((12, 0.9), (11, 0.5), (10, 0.1)) == 1
    assert best_of((12, 0.4), (11, 0.5), (12, 0.6)) == 0
    assert best_of((11, None), (12, None), (12, None)) == 1


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_scikit_learns(k):
    X, y = blobs(150, spread=3.0)
    fresh, _ = blobs(200, seed=7, spread=3.0)
    euclid = KnnHead(rows=X, labels=y, class_names=NAMES, k=k, metric="euclidean")
    theirs = KNeighborsClassifier(k, weights="distance").fit(X.astype(float), y)
    assert euclid.predict_proba(fresh) == pytest.approx(
        theirs.predict_proba(fresh.astype(float)), abs=1e-4
    )
    cosine = KnnHead(rows=X, labels=y, class_names=NAMES, k=k, metric="cosine")
    theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    theirs.fit(normalize(X.astype(float)), y)
    assert cosine.predict_proba(fresh) == pytest.approx(
        theirs.predict_proba(normalize(fresh.astype(float))), abs=1e-4
    )


def test_knn_finds_a_row_itself_at_any_distance_from_the_origin():
    X, y = blobs(60)
    for offset in (0.0, 1e4):
        head = KnnHead(rows=X + np.float32(offset), labels=y, class_names=NAMES, metric="euclidean")
        assert head.score(X + np.float32(offset), y) == 1.0


def test_knn_works_in_blocks_and_with_more_neighbours_than_rows(monkeypatch):
    from featcache.heads.solvers import knn

    X, y = blobs(30)
    fresh, _ = blobs(25, seed=3)
    head = KnnHead(rows=X, labels=y, class_names=NAMES, k=100)
    whole = head.predict_proba(fresh)
    monkeypatch.setattr(knn, "BLOCK_VALUES", 30 * 4)
    assert head.predict_proba(fresh) == pytest.approx(whole, abs=1e-6)
    assert len(list(nearest(X, fresh, 3, "cosine"))) == 7
    assert head.predict_proba(fresh[:0]).shape == (0, 3)


def test_knn_votes_carry_weights():
    X = np.array([[1.0, 0], [1, 0], [0, 1]])
    head = KnnHead(
        rows=X, labels=np.array([0, 1, 2]), class_names=NAMES, k=2,
        row_weights=np.array([1.0, 3.0, 1.0]),
    )  # fmt: skip
    assert head.predict_proba([[2.0, 0.0]])[0] == pytest.approx([0.25, 0.75, 0])


def test_knn_of_zero_rows_of_features_does_not_divide_by_zero():
    X, y = blobs(12)
    X[0] = 0
    head = KnnHead(rows=X, labels=y, class_names=NAMES, k=3)
    assert np.isfinite(head.predict_proba(np.zeros((2, 8)))).all()

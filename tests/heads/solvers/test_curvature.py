"""The estimate of the inverse Hessian, against inverses of the matrices it stands for."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage

from featcache.heads.solvers import curvature
from featcache.heads.solvers.curvature import InverseHessian, ShiftedInverses, inverse_factor


def rows(num_rows, dim, seed=0):
    random = np.random.default_rng(seed)
    X = random.normal(size=(num_rows, dim)) * np.geomspace(3, 0.1, dim)
    return (X - X.mean(axis=0)).astype(np.float32)


def test_blocks_give_the_inverse_of_the_cholesky_factor():
    X = rows(500, 250)
    moment = X.T @ X / 500 + 0.01 * np.eye(250, dtype=np.float32)
    factor = inverse_factor(moment)
    assert np.array_equal(factor, np.tril(factor))
    wanted = np.linalg.inv(moment.astype(np.float64))
    assert factor.T @ factor == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("dim", "num"), [(20, 128), (60, 30)])
def test_inverses_are_right_at_their_shifts_and_near_between(dim, num, monkeypatch):
    monkeypatch.setattr(curvature, "NUM_DIRECTIONS", (num, num))
    X = rows(60, dim)
    found = ShiftedInverses(X)
    seen = X[::2] if dim > num else X
    moment = (seen.T @ seen).astype(np.float64) / len(seen)
    unseen = 0.0
    if dim > num:  # what 30 rows do not span has its part of the variance too
        share = ledoit_wolf_shrinkage(seen, assume_centered=True)
        unseen = share * np.trace(moment) / dim
        moment += unseen * np.eye(dim)
    stack = np.random.default_rng(1).normal(size=(dim, 2, 3)).astype(np.float32)

    def wanted(shift):
        return np.linalg.inv(moment + shift * np.eye(dim))

    first = found.sums(np.full(3, 0.1))
    assert len(first.terms) == 1
    applied = first(stack)
    assert applied == pytest.approx(
        np.einsum("de,ekc->dkc", wanted(0.1), stack), rel=1e-3, abs=1e-3
    )
    shifts = (0.1 + unseen) * np.array([1, 3, 10]) - unseen
    applied = found.sums(shifts)(stack)
    for c, shift in enumerate(shifts):
        exact = wanted(shift) @ stack[:, :, c]
        off = np.linalg.norm(applied[:, :, c] - exact) / np.linalg.norm(exact)
        assert off < (0.3 if c == 1 else 1e-3)


def test_the_estimate_inverts_a_hessian_that_is_a_product():
    X = rows(4000, 12)
    G = np.diag([0.3, 0.3, 0.3]) - 0.1
    estimate = InverseHessian(ShiftedInverses(X[:96]), 0.05)
    estimate.measure(G)
    moment = (X[:96].T @ X[:96]).astype(np.float64) / 96
    hessian = np.kron(moment, G) + 0.05 * np.eye(36)
    gradient = np.random.default_rng(2).normal(size=(13, 3))
    gradient -= gradient.mean(axis=1, keepdims=True)  # as gradients are
    (step,) = estimate(gradient[None])
    assert hessian @ step[:-1].ravel() == pytest.approx(gradient[:-1].ravel(), abs=1e-4)
    assert G @ step[-1] == pytest.approx(gradient[-1])


def test_columns_that_never_change_are_inverted_too():
    X = rows(100, 20)
    X[:, :15] = 0
    found = ShiftedInverses(X)
    applied = found.sums(np.array([1e-30]))(np.ones((20, 1, 1), np.float32))
    assert np.isfinite(applied).all()
    assert (applied > 0).any()


def test_weaker_regularization_tells_more_directions_apart():
    X = rows(2000, 300)
    found = ShiftedInverses(X)
    variance = float((X**2).sum()) / 2000
    numbers = []
    for shift in (variance, variance / 100, variance / 1000, variance):
        inverses = found.sums(np.array([shift]))
        numbers.append(300 if inverses.rows is None else len(inverses.rows))
    assert numbers == [128, 256, 300, 300]

"""The same logistic regression by scikit-learn and by torch, for comparison and trust."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.heads.lbfgs import Solution, start_point
from featcache.heads.logistic import Fit, LogisticProblem
from featcache.heads.rows import Doubles

if TYPE_CHECKING:
    import torch

MAX_ITERATIONS = 5000
SKLEARN_TOLERANCE = 1e-6


def fit_path_sklearn(
    problem: LogisticProblem, strengths: Sequence[float], *, standardize: bool
) -> Iterator[Fit]:
    """Fit every strength in turn with scikit-learn, each from where the one before ended.

    Args:
        problem: The rows.
        strengths: C; from small to large is fastest.
        standardize: Whether features are scaled to unit deviation.

    Yields:
        One fit per strength.
    """
    from sklearn.linear_model import LogisticRegression

    X = problem.features(standardize=standardize)
    model = LogisticRegression(tol=SKLEARN_TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            # Convergence is reported with the fit.
            warnings.simplefilter("ignore")
            model.fit(X, problem.y, sample_weight=problem.share * problem.total)
        weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        if len(weight) == 1:  # two classes: one row tells them apart
            weight = np.vstack([-weight, weight]) / 2
            bias = np.concatenate([-bias, bias]) / 2
        passes = int(np.max(model.n_iter_))
        yield problem.raw(
            Solution(
                point=np.vstack([weight.T, bias]),
                objective=_objective(problem, strength, np.vstack([weight.T, bias]), standardize),
                gap=float("nan"),
                num_passes=passes,
                converged=passes < MAX_ITERATIONS,
            ),
            standardize=standardize,
        )


def _objective(problem: LogisticProblem, strength: float, point: Doubles, scaled: bool) -> float:
    value, _ = problem.loss(standardize=scaled).evaluate(point[:-1], point[-1])
    return float(value + problem.penalty(strength) / 2 * np.vdot(point[:-1], point[:-1]))


def fit_path_torch(
    problem: LogisticProblem, strengths: Sequence[float], *, standardize: bool
) -> Iterator[Fit]:
    """Fit every strength in turn with torch's L-BFGS in float64, on a GPU if there is one.

    Args:
        problem: The rows.
        strengths: C; from small to large is fastest.
        standardize: Whether features are scaled to unit deviation.

    Yields:
        One fit per strength.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    X = torch.as_tensor(problem.features(standardize=standardize), device=device).double()
    y = torch.as_tensor(problem.y, device=device)
    share = torch.as_tensor(problem.share, device=device)
    spectrum = problem.spectrum(standardize=standardize)
    loss = problem.loss(standardize=standardize)
    point = start_point(loss)
    for strength in strengths:
        lam = problem.penalty(strength)
        # Each eigendirection in units of its curvature, so that correlated features do not slow
        # the search; a class's curvature is about its share of the rows.
        units = 1 / np.sqrt(spectrum.values / loss.num_classes + lam)
        basis = torch.as_tensor(spectrum.vectors * units, device=device)
        turned = np.vstack([(spectrum.vectors / units).T @ point[:-1], point[-1:]])
        end, solution = _search_torch(X, y, share, lam, basis, turned)
        point = np.vstack([spectrum.vectors @ (units[:, None] * end[:-1]), end[-1:]])
        solution = dataclasses.replace(solution, point=point)
        yield problem.raw(solution, standardize=standardize)


def _search_torch(
    X: torch.Tensor,
    y: torch.Tensor,
    share: torch.Tensor,
    lam: float,
    basis: torch.Tensor,
    turned: Doubles,
) -> tuple[Doubles, Solution]:
    """Minimise from `turned` [D + 1, C], where weights are `basis @ turned[:-1]`."""
    import torch

    point = torch.as_tensor(turned, device=X.device).clone().requires_grad_(True)
    search: Any = torch.optim.LBFGS(
        [point],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        weight = basis @ point[:-1]
        logits = torch.addmm(point[-1], X, weight)
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        value = share @ losses + lam / 2 * (weight * weight).sum()
        torch.autograd.backward([value])
        return value

    search.step(closure)
    value = float(closure().detach())
    assert point.grad is not None
    # In these units the curvature is near one, so this is about the distance to the minimum.
    gap = float((point.grad * point.grad).sum()) / 2
    end = point.detach().cpu().numpy()
    passes = int(search.state[point]["func_evals"])
    return end, Solution(end, value, gap, passes, gap <= 1e-6 * value)

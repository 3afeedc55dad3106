"""The same logistic regression by scikit-learn and by torch, as a check on our own."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.heads.features import Doubles
from featcache.heads.linear import LinearHead
from featcache.heads.solvers.base import FittedHead
from featcache.heads.solvers.lbfgs import TOLERANCE, Solution, start_point
from featcache.heads.solvers.logistic import LogisticProblem

if TYPE_CHECKING:
    import torch

MAX_ITERATIONS = 5000
SKLEARN_TOLERANCE = 1e-6


class SklearnPath:
    """Fits with scikit-learn, each C starting where the previous one ended.

    Args:
        problem: The rows.
        standardize: Whether features are scaled to unit deviation.
    """

    def __init__(self, problem: LogisticProblem, *, standardize: bool) -> None:
        from sklearn.linear_model import LogisticRegression

        self._problem, self._standardize = problem, standardize
        self._model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def fit(self, C: float, tolerance: float = TOLERANCE) -> FittedHead[LinearHead]:
        """Fit with one C; scikit-learn's own tolerance is on the gradient."""
        problem, model = self._problem, self._model
        model.set_params(C=C, tol=max(SKLEARN_TOLERANCE, tolerance))
        with warnings.catch_warnings():
            # The fit itself says whether it converged.
            warnings.simplefilter("ignore")
            model.fit(
                problem.features(standardize=self._standardize),
                problem.y,
                sample_weight=problem.share * problem.total,
            )
        weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
        if len(weight) == 1:  # two classes: one row tells them apart
            weight = np.vstack([-weight, weight]) / 2
            bias = np.concatenate([-bias, bias]) / 2
        passes = int(np.max(model.n_iter_))
        point = np.vstack([weight.T, bias])
        value, _ = problem.loss(standardize=self._standardize).evaluate(point[:-1], point[-1])
        value += problem.penalty(C) / 2 * float(np.vdot(point[:-1], point[:-1]))
        solution = Solution(point, value, float("nan"), passes, passes < MAX_ITERATIONS)
        return problem.fitted(solution, standardize=self._standardize)


class TorchPath:
    """Fits with torch's L-BFGS in float64, on a GPU if there is one.

    Args:
        problem: The rows.
        standardize: Whether features are scaled to unit deviation.
    """

    def __init__(self, problem: LogisticProblem, *, standardize: bool) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        features = problem.features(standardize=standardize)
        self._problem, self._standardize = problem, standardize
        self._X = torch.as_tensor(features, device=device).double()
        self._y = torch.as_tensor(problem.y, device=device)
        self._share = torch.as_tensor(problem.share, device=device)
        second = (features.T @ features).astype(np.float64) / len(features)
        self._values, self._vectors = np.linalg.eigh(second)
        self._point = start_point(problem.loss(standardize=standardize))

    def fit(self, C: float, tolerance: float = TOLERANCE) -> FittedHead[LinearHead]:
        """Fit with one C, starting where the previous one ended."""
        lam = self._problem.penalty(C)
        values, vectors = self._values.clip(min=0), self._vectors
        # Each eigendirection in units of its curvature, so that correlated features do not slow
        # the search; a class's curvature is about its share of the rows.
        units = 1 / np.sqrt(values / self._point.shape[1] + lam)
        turned = np.vstack([(vectors / units).T @ self._point[:-1], self._point[-1:]])
        end, solution = self._search(lam, vectors * units, turned, tolerance)
        self._point = np.vstack([vectors @ (units[:, None] * end[:-1]), end[-1:]])
        solution = dataclasses.replace(solution, point=self._point)
        return self._problem.fitted(solution, standardize=self._standardize)

    def _search(
        self, lam: float, basis: Doubles, turned: Doubles, tolerance: float
    ) -> tuple[Doubles, Solution]:
        """Minimize from `turned` [D + 1, C], where weights are `basis @ turned[:-1]`."""
        import torch

        point = torch.as_tensor(turned, device=self._X.device).clone().requires_grad_(True)
        turn = torch.as_tensor(basis, device=self._X.device)
        search: Any = torch.optim.LBFGS(
            [point],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            history_size=30,
            tolerance_grad=1e-3 * tolerance,
            tolerance_change=1e-4 * tolerance,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            search.zero_grad()
            weight = turn @ point[:-1]
            logits = torch.addmm(point[-1], self._X, weight)
            losses = torch.nn.functional.cross_entropy(logits, self._y, reduction="none")
            value = self._share @ losses + lam / 2 * (weight * weight).sum()
            torch.autograd.backward([value])
            return value

        search.step(closure)
        value = float(closure().detach())
        assert point.grad is not None
        # In these units the curvature is near one, so this is about the distance to the minimum.
        gap = float((point.grad * point.grad).sum()) / 2
        passes = int(search.state[point]["func_evals"])
        converged = gap <= 10 * tolerance * value
        return point.detach().cpu().numpy(), Solution(turned, value, gap, passes, converged)

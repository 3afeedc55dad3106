"""Ridge and nearest neighbours as solvers: nothing is iterated, every candidate is nearly free."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from featcache.errors import UserError
from featcache.heads.knn import KnnHead, Metric, Neighbours, nearest, vote
from featcache.heads.linear import row_blocks
from featcache.heads.logistic_solver import head_of_fit, standardize_choices
from featcache.heads.moments import Moments
from featcache.heads.ridge import (
    RidgeProblem,
    calibration,
    moments_of,
    ridge_from_few_rows,
    ridge_from_moments,
    strength_grid,
)
from featcache.heads.rows import Rows
from featcache.heads.solver import Answer, Fitted, Settings

NEIGHBOURS = (50, 20, 10, 5, 3, 1)


@dataclass(frozen=True, kw_only=True)
class RidgeSolver:
    """Ridge regression onto one-hot labels.

    Attributes:
        class_names: C names.
        strength: The only alpha to try, if given.
        standardize: Whether to scale features; auto tries both.
    """

    class_names: list[str]
    strength: float | None = None
    standardize: Literal["auto", "on", "off"] = "auto"
    name: str = "ridge"
    backend: str = "numpy"
    patience: int | None = None

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Fifty strengths on plain features, then fifty on standardised ones."""
        series = []
        for scaled in standardize_choices(self.standardize):
            if self.strength is not None:
                strengths: Sequence[float] = [self.strength]
            elif scaled:
                total = float(rows.weights.sum())
                strengths = [float(f"{x * total:.4g}") for x in np.logspace(3, -6, 50)]
            else:
                strengths = strength_grid(rows)
            series.append([{"strength": s, "standardize": scaled} for s in strengths])
        return series

    def fallback(self) -> Settings:
        """scikit-learn's default, alpha = 1."""
        strength = 1.0 if self.strength is None else self.strength
        return {"strength": strength, "standardize": self.standardize == "on"}

    def prepare(self, rows: Rows, candidates: Sequence[Settings]) -> PreparedRidge:
        """Decompose when the first candidate is asked for."""
        return PreparedRidge(self.class_names, rows, candidates)


class PreparedRidge:
    """Rows decomposed once; all strengths predict in one product.

    Args:
        class_names: C names.
        rows: The rows to fit, or, where `sums` are given, a sample of them.
        candidates: Everything that will be asked for.
        sums: Over all rows to fit.
    """

    def __init__(
        self,
        class_names: list[str],
        rows: Rows,
        candidates: Sequence[Settings],
        sums: Moments | None = None,
    ) -> None:
        self._class_names, self._rows, self._candidates = class_names, rows, candidates
        self._sums = sums
        self._problems: dict[bool, RidgeProblem] = {}
        self._answered: tuple[Rows, bool, list[Answer]] | None = None

    def fit(self, settings: Settings) -> Fitted:
        """The head for one strength, its probabilities calibrated."""
        alpha = float(settings["strength"])
        problem = self._problem(bool(settings["standardize"]))
        fit = problem.fit(alpha)
        factor = calibration(problem, fit, self._rows, alpha)
        bias = np.where(problem.class_share > 0, fit.bias * factor, fit.bias)
        fit = dataclasses.replace(fit, weight=fit.weight * factor, bias=bias)
        return Fitted(head=head_of_fit(fit, self._class_names, "ridge"))

    def answer(self, settings: Settings, held: Rows) -> Answer:
        """Classes and squared errors; the first call for some rows finds all strengths'."""
        scaled = bool(settings["standardize"])
        alike = [c for c in self._candidates if c["standardize"] is scaled]
        if self._answered is None or self._answered[:2] != (held, scaled):
            self._answered = (held, scaled, self._answer_all(alike, scaled, held))
        return self._answered[2][alike.index(settings)]

    def _answer_all(self, candidates: Sequence[Settings], scaled: bool, held: Rows) -> list[Answer]:
        """One answer per strength, from one product."""
        problem = self._problem(scaled)
        fits = [problem.fit(float(c["strength"])) for c in candidates]
        weight = np.concatenate([fit.weight for fit in fits]).T
        bias = np.concatenate([fit.bias for fit in fits])
        classes = np.empty((len(fits), held.num_rows), np.int64)
        losses = np.empty((len(fits), held.num_rows), np.float32)
        present = problem.class_share > 0
        for cut, block in row_blocks(held.plain, 1024):
            scores = block @ weight.astype(block.dtype) + bias.astype(block.dtype)
            scores = scores.reshape(len(block), len(fits), -1)
            classes[:, cut] = scores.argmax(axis=2).T
            scores[np.arange(len(block)), :, held.y[cut]] -= 1
            scores *= present  # a class without rows to fit has a bias of its own
            losses[:, cut] = np.einsum("nsc,nsc->sn", scores, scores)
        return [Answer(*pair) for pair in zip(classes, losses, strict=True)]

    def _problem(self, scaled: bool) -> RidgeProblem:
        if scaled not in self._problems:
            rows = self._rows
            if self._sums is None and rows.num_rows * len(rows.views) < rows.feature_dim:
                problem = ridge_from_few_rows(rows, standardize=scaled)
            else:
                problem = ridge_from_moments(self._moments, standardize=scaled)
            self._problems[scaled] = problem
        return self._problems[scaled]

    @functools.cached_property
    def _moments(self) -> Moments:
        return moments_of(self._rows) if self._sums is None else self._sums


@dataclass(frozen=True, kw_only=True)
class KnnSolver:
    """k nearest neighbours among the plain views.

    Attributes:
        class_names: C names.
        strength: The only k to try, if given.
    """

    class_names: list[str]
    strength: float | None = None
    name: str = "knn"
    backend: str = "numpy"
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and (self.strength < 1 or self.strength % 1):
            raise UserError(f"--strength {self.strength:g}: knn needs a whole number of neighbours")

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Every number of neighbours by cosine, then by Euclidean distance."""
        ks = NEIGHBOURS if self.strength is None else (int(self.strength),)
        return [
            [{"k": k, "metric": metric} for k in ks if k <= rows.num_rows or len(ks) == 1]
            for metric in ("cosine", "euclidean")
        ]

    def fallback(self) -> Settings:
        """The nearest by cosine."""
        return {"k": 1 if self.strength is None else int(self.strength), "metric": "cosine"}

    def prepare(self, rows: Rows, candidates: Sequence[Settings]) -> PreparedKnn:
        """Neighbours are looked for once per metric, for the largest k."""
        return PreparedKnn(self.class_names, rows, max(int(c["k"]) for c in candidates))


class PreparedKnn:
    """Rows to be neighbours."""

    def __init__(self, class_names: list[str], rows: Rows, largest_k: int) -> None:
        self._class_names, self._rows, self._largest_k = class_names, rows, largest_k
        self._found: tuple[Rows, Metric, list[Neighbours]] | None = None

    def fit(self, settings: Settings) -> Fitted:
        """The rows as a head."""
        rows = self._rows
        alike = bool(np.ptp(rows.weights) == 0)
        head = KnnHead(
            rows=np.ascontiguousarray(rows.plain),
            labels=rows.y,
            class_names=self._class_names,
            k=int(settings["k"]),
            metric=settings["metric"],
            row_weights=None if alike else rows.weights.astype(np.float32),
        )
        return Fitted(head=head)

    def answer(self, settings: Settings, held: Rows) -> Answer:
        """Classes; the first call for some rows finds the neighbours for every k."""
        head = self.fit(settings).head
        assert isinstance(head, KnnHead)
        if self._found is None or self._found[:2] != (held, head.metric):
            near = list(nearest(head.rows, held.plain, self._largest_k, head.metric))
            self._found = (held, head.metric, near)
        votes = [vote(near, head, k=head.k).argmax(axis=1) for near in self._found[2]]
        return Answer(np.concatenate(votes).astype(np.int64))

"""Logistic regression as a solver: its grid of strengths, and who computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from featcache.heads.lbfgs import TOLERANCE
from featcache.heads.linear import LinearHead
from featcache.heads.logistic import Fit, LogisticProblem, StrengthPath
from featcache.heads.rows import Rows
from featcache.heads.solver import Answer, Fitted, NotConverged, Settings, cross_entropy_answer

# scikit-learn's C, half a decade apart. Few rows of few clean features want the weak end, many
# correlated features the strong one.
STRENGTHS = tuple(float(f"{c:.3g}") for c in np.logspace(-5, 2, 15))
# How far from its minimum the objective may be while choosing, relative to itself.
SELECTION_TOLERANCE = 1e-4


class Path(Protocol):
    """Fits the same rows with one strength after another."""

    def fit(self, strength: float, tolerance: float) -> Fit:
        """Fit with one strength, to a tolerance relative to the objective."""


@dataclass(frozen=True, kw_only=True)
class LogisticSolver:
    """Multinomial logistic regression, L2-penalised, to convergence.

    Attributes:
        class_names: C names.
        strength: The only strength to try, if given.
        standardize: Whether to scale features; auto tries both.
        backend: What computes.
    """

    class_names: list[str]
    strength: float | None = None
    standardize: Literal["auto", "on", "off"] = "auto"
    backend: str = "numpy"
    name: str = "logistic"

    @property
    def patience(self) -> int | None:
        """Two decades of strengths without gain."""
        return 4

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Every strength on plain features, then every strength on standardised ones."""
        del rows
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        return [
            [{"strength": strength, "standardize": scaled} for strength in strengths]
            for scaled in standardize_choices(self.standardize)
        ]

    def fallback(self) -> Settings:
        """scikit-learn's default, C = 1."""
        strength = 1.0 if self.strength is None else self.strength
        return {"strength": strength, "standardize": self.standardize == "on"}

    def prepare(self, rows: Rows, candidates: Sequence[Settings]) -> PreparedLogistic:
        """Centre the rows once for all strengths."""
        del candidates
        return PreparedLogistic(self, LogisticProblem(rows))


class PreparedLogistic:
    """Rows ready for logistic regression; fits go from one strength to the next."""

    def __init__(self, solver: LogisticSolver, problem: LogisticProblem) -> None:
        self._solver, self._problem = solver, problem
        self._paths: dict[bool, Path] = {}

    def fit(self, settings: Settings) -> Fitted:
        """Fit to convergence.

        Raises:
            NotConverged: With what to try.
        """
        fit = self._fit(settings, TOLERANCE)
        return Fitted(
            head=head_of_fit(fit, self._solver.class_names, "logistic"),
            num_passes=fit.num_passes,
            objective=fit.objective,
        )

    def answer(self, settings: Settings, held: Rows) -> Answer:
        """Answer with a fit whose objective is within a ten-thousandth of its minimum."""
        fit = self._fit(settings, SELECTION_TOLERANCE)
        return cross_entropy_answer(head_of_fit(fit, self._solver.class_names, "logistic"), held)

    def _fit(self, settings: Settings, tolerance: float) -> Fit:
        scaled, strength = bool(settings["standardize"]), float(settings["strength"])
        if scaled not in self._paths:
            # Only one path at a time: each holds a copy of the rows.
            self._paths = {scaled: self._make_path(scaled)}
        fit = self._paths[scaled].fit(strength, tolerance)
        check_converged(fit, strength)
        return fit

    def _make_path(self, scaled: bool) -> Path:
        if self._solver.backend == "numpy":
            return StrengthPath(self._problem, standardize=scaled)
        from featcache.heads import backends

        sklearn = self._solver.backend == "sklearn"
        kind = backends.SklearnPath if sklearn else backends.TorchPath
        return kind(self._problem, standardize=scaled)


def check_converged(fit: Fit, strength: float) -> None:
    """Refuse a fit that is not one.

    Raises:
        NotConverged: With what to try.
    """
    if not fit.converged:
        raise NotConverged(
            f"logistic with strength {strength:g} did not converge in {fit.num_passes} passes: "
            "give a smaller --strength, or --standardize on"
        )


def standardize_choices(standardize: str) -> tuple[bool, ...]:
    """What `--standardize` leaves to try."""
    return {"auto": (False, True), "on": (True,), "off": (False,)}[standardize]


def head_of_fit(fit: Fit, class_names: list[str], solver: str) -> LinearHead:
    """The fit as a float32 head, which is what is saved and scored."""
    return LinearHead(
        weight=fit.weight.astype(np.float32),
        bias=fit.bias.astype(np.float32),
        mean=None if fit.mean is None else fit.mean.astype(np.float32),
        scale=None if fit.scale is None else fit.scale.astype(np.float32),
        class_names=class_names,
        solver=solver,
    )

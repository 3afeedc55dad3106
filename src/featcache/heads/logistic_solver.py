"""Logistic regression as a solver: its grid of strengths, and who computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from featcache.errors import UserError
from featcache.heads.linear import LinearHead
from featcache.heads.logistic import Fit, LogisticProblem, fit_path
from featcache.heads.rows import Rows
from featcache.heads.solver import Fitted, Settings

# scikit-learn's C, half a decade apart. Few rows of few clean features want the weak end, many
# correlated features the strong one.
STRENGTHS = tuple(float(f"{c:.3g}") for c in np.logspace(-5, 2, 15))
Path = Callable[..., Iterator[Fit]]


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

    def candidates(self, rows: Rows) -> list[Settings]:
        """Every strength, plain and standardised."""
        del rows
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        return [
            {"strength": strength, "standardize": scaled}
            for strength in strengths
            for scaled in standardize_choices(self.standardize)
        ]

    def fallback(self) -> Settings:
        """scikit-learn's default, C = 1."""
        strength = 1.0 if self.strength is None else self.strength
        return {"strength": strength, "standardize": self.standardize == "on"}

    def fit_all(self, rows: Rows, candidates: Sequence[Settings]) -> Iterator[Fitted]:
        """Fit along the path of strengths, plain features first, then standardised ones.

        Raises:
            UserError: A fit did not converge.
        """
        problem = LogisticProblem(rows)
        fits: dict[int, Fit] = {}
        for scaled in (False, True):
            places = [i for i, c in enumerate(candidates) if c["standardize"] is scaled]
            places.sort(key=lambda i: float(candidates[i]["strength"]))
            strengths = [float(candidates[i]["strength"]) for i in places]
            if strengths:
                path = self._path()(problem, strengths, standardize=scaled)
                fits.update(zip(places, path, strict=True))
        return (self._checked(fits[i], candidates[i]) for i in range(len(candidates)))

    def _path(self) -> Path:
        if self.backend == "numpy":
            return fit_path
        from featcache.heads import backends

        return backends.fit_path_sklearn if self.backend == "sklearn" else backends.fit_path_torch

    def _checked(self, fit: Fit, settings: Settings) -> Fitted:
        if not fit.converged:
            raise UserError(
                f"logistic with strength {settings['strength']:g} did not converge in "
                f"{fit.num_passes} passes: give a smaller --strength, or --standardize on"
            )
        return Fitted(
            head=head_of_fit(fit, self.class_names, "logistic"),
            num_passes=fit.num_passes,
            objective=fit.objective,
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

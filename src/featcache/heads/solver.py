"""What every solver is to the choice of settings: candidates, and heads fitted to rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from featcache.heads.files import Head
from featcache.heads.rows import Rows

# What a candidate is fitted with, for example {"strength": 0.01, "standardize": True}.
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A head and how it was reached.

    Attributes:
        head: Fitted to the rows.
        converged: Whether the solver reached its tolerance; closed forms always do.
        num_passes: Passes over the rows.
        objective: What was minimised, at the end, where there is such a thing.
    """

    head: Head
    converged: bool = True
    num_passes: int = 1
    objective: float | None = None


class Solver(Protocol):
    """One way to fit a head."""

    @property
    def name(self) -> str:
        """As in `--solver`."""

    @property
    def backend(self) -> str:
        """What computes."""

    def candidates(self, rows: Rows) -> list[Settings]:
        """Settings to choose among, the strongest regularisation first: ties go to the first."""

    def fallback(self) -> Settings:
        """Settings to use where nothing can be held out."""

    def fit_all(self, rows: Rows, candidates: Sequence[Settings]) -> Iterator[Fitted]:
        """Fit every candidate, in their order, sharing what can be shared."""

"""What every solver is to the choice of settings: candidates, and heads fitted to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from featcache.errors import UserError
from featcache.heads.files import Head
from featcache.heads.linear import Floats, LinearHead
from featcache.heads.rows import Ints, Rows


class NotConverged(UserError):  # noqa: N818 - said to the user as it is
    """A solver did not reach its tolerance."""


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


class Answer(NamedTuple):
    """What a candidate says of held-out rows.

    Attributes:
        classes: Class indices [M].
        losses: What the solver minimises, of each row alone, [M]; None where there is no such
            thing.
    """

    classes: Ints
    losses: Floats | None = None


def cross_entropy_answer(head: LinearHead, held: Rows) -> Answer:
    """Classes and cross-entropies, for solvers that minimise these."""
    logits = head.decision_function(held.plain)
    classes = logits.argmax(axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(classes)), held.y]
    return Answer(classes, np.log(np.exp(logits).sum(axis=1)) - own)


class Prepared(Protocol):
    """Rows made ready for many settings."""

    def fit(self, settings: Settings) -> Fitted:
        """The head for these settings, to the solver's full precision."""

    def answer(self, settings: Settings, held: Rows) -> Answer:
        """What a head with these settings says of held-out rows, their first views.

        May be less precise than `fit`, by less than matters for choosing.

        Raises:
            NotConverged: The solver did not get there; weaker settings would not either.
        """


class Solver(Protocol):
    """One way to fit a head."""

    @property
    def name(self) -> str:
        """As in `--solver`."""

    @property
    def backend(self) -> str:
        """What computes."""

    @property
    def patience(self) -> int | None:
        """Stop a series after so many candidates in a row below its best; None tries all."""

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Candidates in series, each from strong to weak regularisation: ties go to the first."""

    def fallback(self) -> Settings:
        """Settings to use where nothing can be held out."""

    def prepare(self, rows: Rows, candidates: Sequence[Settings]) -> Prepared:
        """Make rows ready for some of these candidates."""

"""What a solver is: candidate settings, and heads fitted to rows. A new one goes beside `ridge`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np

from featcache.errors import UserError
from featcache.heads.features import Floats, Ints
from featcache.heads.linear import LinearHead
from featcache.heads.training_data import Rows, TrainRows

if TYPE_CHECKING:
    from featcache.heads.files import Head
    from featcache.results import EpochRecord

# Below this many multiplications per pass over the rows a second thread costs more than it gains:
# it is woken and waited for at every product, and on a busy machine the wait is long.
SMALL_PASS = 1 << 26


Metric = Literal["cosine", "euclidean"]


class Settings(TypedDict, total=False):
    """What a candidate is fitted with: those of these that its solver has."""

    C: float
    alpha: float
    k: int
    metric: Metric
    lr: float
    weight_decay: float
    standardize: bool
    columns: str


HeadT_co = TypeVar("HeadT_co", bound="Head", covariant=True)


class NotConverged(UserError):  # noqa: N818 - shown to the user as it is
    """A solver did not reach its tolerance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedHead(Generic[HeadT_co]):
    """A head and how it was reached.

    Attributes:
        head: Fitted to the rows.
        converged: Whether the solver reached its tolerance; closed forms always do.
        num_passes: Passes over the rows.
        objective: What was minimized, at the end, if anything was.
        epochs: Of adam and sgd: loss, test accuracy and seconds of each epoch.
    """

    head: HeadT_co
    converged: bool = True
    num_passes: int = 1
    objective: float | None = None
    epochs: list[EpochRecord] = field(default_factory=list)


class HeldOutPredictions(NamedTuple):
    """A candidate's predictions of held-out rows.

    Attributes:
        classes: Class indices [M].
        losses: What the solver minimizes, for each row alone, [M]; None if it has no loss.
        logits: [M, C], where predicting computes those of the head that `fit` returns.
    """

    classes: Ints
    losses: Floats | None = None
    logits: Floats | None = None


def cross_entropy_predictions(head: LinearHead, held: Rows) -> HeldOutPredictions:
    """Classes and cross-entropies, for solvers that minimize these."""
    logits = head.decision_function(held.plain)
    classes = logits.argmax(axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(classes)), held.y]
    losses = np.log(np.exp(logits).sum(axis=1)) - own
    return HeldOutPredictions(classes, losses, logits)


class Prepared(Protocol):
    """Rows made ready for many settings."""

    def fit(self, settings: Settings) -> FittedHead[Head]:
        """The float32 head for these settings, to the solver's full precision."""

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        """Predict held-out rows, their first views, with a head of these settings.

        May be less precise than `fit`, by less than matters for choosing.

        Raises:
            NotConverged: The solver did not converge; weaker regularization would not either.
        """


class Solver(Protocol):
    """One way to fit a head."""

    @property
    def name(self) -> str:
        """As in `--solver`."""

    @property
    def backend(self) -> str:
        """The library that computes."""

    @property
    def patience(self) -> int | None:
        """Stop a series after this many candidates in a row below its best; None tries all."""

    def series(self, rows: Rows) -> list[list[Settings]]:
        """Candidates in series, each from strong to weak regularization: ties go to the first.

        Args:
            rows: Train, or a sample of it.
        """

    def default(self) -> Settings:
        """Settings to use where nothing can be held out."""

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> Prepared:
        """Make rows ready for some of these candidates."""


def standardize_choices(standardize: str) -> tuple[bool, ...]:
    """The candidates that `--standardize` leaves."""
    return {"auto": (False, True), "on": (True,), "off": (False,)}[standardize]


@contextlib.contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Keep small matrix products on one thread.

    Args:
        multiplications: Of one pass over the rows: values * classes.
    """
    if multiplications >= SMALL_PASS:
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield

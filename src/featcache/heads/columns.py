"""Which columns a head learns from, where the features hold several stages of the network.

A head on the last layer alone takes the same features as one on all of them: its weights on the
other columns are zero, so prediction and export need not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from featcache.config import StageColumns, TrainHeadConfig
from featcache.errors import UserError, one_of
from featcache.heads.features import Floats
from featcache.heads.linear import LinearHead
from featcache.heads.solvers.base import FittedHead, HeldOutPredictions, Prepared, Settings, Solver
from featcache.heads.solvers.sgd import SgdSolver
from featcache.heads.training_data import Rows, TrainRows

if TYPE_CHECKING:
    from featcache.heads.files import Head


def on_columns(solver: Solver, config: TrainHeadConfig, stages: StageColumns | None) -> Solver:
    """The solver on the groups of columns that `--columns` leaves to choose from.

    Args:
        solver: Any; knn takes all columns.
        config: The command's settings.
        stages: Which columns are which; None where they are the last layer's.

    Raises:
        UserError: There are no such columns.
    """
    if stages is None and config.columns not in ("auto", "last", "all"):
        raise UserError(one_of(config.columns, ["last", "all"], "columns"))
    if stages is None or solver.name == "knn":
        return solver
    names = [config.columns]
    if config.columns == "auto":
        names = ["last"] if "last" in stages.names else list(stages.layers())
        names += ["all"] if len(stages.names) > 1 else []
    groups = {name: slice(None) if name == "all" else stages.group(name) for name in names}
    return ColumnSolver(solver, groups, stages.num_columns)


def num_params(head: Head, stages: StageColumns | None) -> int:
    """Trainable parameters of a head, which may have learned from one layer alone."""
    columns = str(head.chosen.get("columns", "all"))
    if stages is None or columns == "all":
        return head.num_params
    num_columns = len(range(stages.num_columns)[stages.group(columns)])
    return (num_columns + 1) * len(head.class_names)


class ColumnSolver:
    """A solver whose candidates also say which columns they see: a layer's or "all".

    Args:
        solver: Fits linear heads.
        groups: The columns to choose from, by name.
        feature_dim: Number of all columns.
    """

    def __init__(self, solver: Solver, groups: dict[str, slice], feature_dim: int) -> None:
        self._solver, self._groups, self._feature_dim = solver, groups, feature_dim
        self.name, self.backend, self.patience = solver.name, solver.backend, solver.patience

    def series(self, rows: Rows) -> list[list[Settings]]:
        """The solver's candidates on each group of columns."""
        return [
            [{**settings, "columns": group} for settings in candidates]
            for group, columns in self._groups.items()
            for candidates in self._solver.series(rows.on_columns(columns))
        ]

    def default(self) -> Settings:
        """The solver's, on all columns if they are among the groups."""
        return {**self._solver.default(), "columns": list(self._groups)[-1]}

    def prepare(self, rows: TrainRows, candidates: Sequence[Settings]) -> Prepared:
        """Make rows ready, which are in memory."""
        assert isinstance(rows, Rows)
        return _PreparedColumns(self, rows, candidates)

    def prepare_group(self, group: str, rows: Rows, candidates: Sequence[Settings]) -> Prepared:
        """Make one group of columns ready for its candidates."""
        columns, solver = self._groups[group], self._solver
        if isinstance(solver, SgdSolver):
            # The test features that it scores after each epoch have all columns.
            score = solver.score_epoch
            solver = dataclasses.replace(
                solver, score_epoch=lambda h: score(self.widened(h, group))
            )
        own = [_without_columns(c) for c in candidates if c["columns"] == group]
        return solver.prepare(rows.on_columns(columns), own)

    def seen(self, group: str, rows: Rows) -> Rows:
        """The rows with a group's columns."""
        return rows.on_columns(self._groups[group])

    def widened(self, head: Head, group: str) -> LinearHead:
        """A head on a group of columns as one on all of them."""
        assert isinstance(head, LinearHead)

        def spread(values: Floats, fill: float) -> Floats:
            whole = np.full((*values.shape[:-1], self._feature_dim), fill, values.dtype)
            whole[..., self._groups[group]] = values
            return whole

        return head.replace(
            weight=spread(head.weight, 0.0),
            mean=None if head.mean is None else spread(head.mean, 0.0),
            scale=None if head.scale is None else spread(head.scale, 1.0),
        )


class _PreparedColumns:
    """Rows ready for candidates of several groups; one group at a time is held in memory."""

    def __init__(self, solver: ColumnSolver, rows: Rows, candidates: Sequence[Settings]) -> None:
        self._solver, self._rows, self._candidates = solver, rows, candidates
        self._ready: dict[str, Prepared] = {}

    def fit(self, settings: Settings) -> FittedHead[Head]:
        fitted = self._of(settings).fit(_without_columns(settings))
        head = self._solver.widened(fitted.head, settings["columns"])
        return dataclasses.replace(fitted, head=head)

    def predict(self, settings: Settings, held: Rows) -> HeldOutPredictions:
        seen = self._solver.seen(settings["columns"], held)
        return self._of(settings).predict(_without_columns(settings), seen)

    def _of(self, settings: Settings) -> Prepared:
        group = settings["columns"]
        if group not in self._ready:
            prepared = self._solver.prepare_group(group, self._rows, self._candidates)
            self._ready = {group: prepared}
        return self._ready[group]


def _without_columns(settings: Settings) -> Settings:
    own = settings.copy()
    del own["columns"]
    return own

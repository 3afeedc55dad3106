"""The runs of a comparison as they are kept in report files."""

from __future__ import annotations

import math

import numpy as np

from featcache.errors import UserError
from featcache.results.learning_curve import Cell
from featcache.results.runs import RunReport


def cell_of(report: RunReport) -> Cell:
    """A kept run as what the learning curve needs.

    Raises:
        UserError: The report is not one of a comparison, or is damaged.
    """
    try:
        cell = report.more["cell"]
        assert report.test is not None
        assert report.test.labels
        if cell["mode"] not in ("cached", "finetune"):
            raise ValueError(f"mode {cell['mode']!r:.40}")
        cost, trial = float(cell["cost_seconds"]), float(cell["trial_seconds"])
        if not math.isfinite(cost + trial):
            raise ValueError("seconds are not finite")
        return Cell(
            mode=cell["mode"],
            size=str(cell["size"]),
            num_train=int(report.more["num_train"]),
            seed=int(cell["seed"]),
            labels=np.array(report.test.labels, np.int64),
            predicted=np.array(report.test.predicted, np.int64),
            cost_seconds=cost,
            trial_seconds=trial,
        )
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
        raise UserError(f"not a run of a comparison: {error}") from error

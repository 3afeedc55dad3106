"""How long the next run will take, estimated from the finished ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from featcache.errors import UserError
from featcache.results import RunReport
from featcache.results.learning_curve import CurveMode, CurveRun


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The time of a run, split into parts that scale with different counts.

    Attributes:
        passes: Train images seen, epochs counted.
        per_pass: Seconds of one of them.
        per_train: Seconds for each train image, once: reading, and the linear probe's pass.
        per_test: Seconds for each test image: reading and scoring.
        fixed: Seconds that do not depend on any count.
    """

    passes: int
    per_pass: float
    per_train: float = 0.0
    per_test: float = 0.0
    fixed: float = 0.0

    def seconds(self, num_train: int, num_epochs: int, num_test: int) -> float:
        """Seconds of another run."""
        growing = self.per_pass * num_epochs + self.per_train
        return self.fixed + growing * num_train + self.per_test * num_test


def head_pace(report: RunReport, spent: float) -> Pace:
    """The pace of a cached head; everything but fitting counts as fixed.

    Args:
        report: The run's.
        spent: Its seconds in total.
    """
    fitting, num_train = float(report.more["cell"]["trial_seconds"]), int(report.more["num_train"])
    return Pace(passes=num_train, per_pass=fitting / num_train, fixed=max(spent - fitting, 0.0))


def finetune_pace(report: RunReport, spent: float) -> Pace:
    """The pace of a fine-tune; the arguments are those of `head_pace`.

    The fastest epoch counts: the first is slower, and others may have shared the machine.
    """
    more = report.more
    num_train, num_test = int(more["num_train"]), int(more["num_test"])
    epochs = [float(epoch["seconds"]) for epoch in report.epochs]
    scoring = sum(float(epoch.get("eval_seconds", 0.0)) for epoch in report.epochs)
    reading = float(more["read_seconds"]) / (num_train + num_test)
    forward = scoring / num_test
    per_train = reading + (forward if more.get("probe") else 0.0)
    rest = spent - sum(epochs) - (reading + forward) * num_test - per_train * num_train
    return Pace(
        passes=num_train * len(epochs),
        per_pass=min(epochs) / num_train,
        per_train=per_train,
        per_test=reading + forward,
        fixed=max(rest, 0.0),
    )


PACES: dict[CurveMode, Callable[[RunReport, float], Pace]] = {
    "cached": head_pace,
    "tail": finetune_pace,
    "finetune": finetune_pace,
}


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run of the comparison: its report, and what was read from it."""

    report: RunReport
    curve_run: CurveRun
    pace: Pace
    spent_seconds: float

    @classmethod
    def from_report(cls, report: RunReport) -> Self:
        """Read and check a report.

        Raises:
            UserError: It is not of a run of a comparison, or is damaged.
        """
        run = CurveRun.from_report(report)
        try:
            spent = float(report.more["cell"]["spent_seconds"])
            pace = PACES[run.mode](report, spent)
            return cls(report=report, curve_run=run, pace=pace, spent_seconds=spent)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"not a run of a comparison: {error}") from error


@dataclass
class Budget:
    """Seconds to spend on runs, seconds spent so far, and estimates for the next run."""

    seconds: float
    num_test: int
    spent: float = 0.0
    _paces: dict[CurveMode, list[Pace]] = field(default_factory=dict)

    def add(self, mode: CurveMode, pace: Pace, spent: float = 0.0) -> None:
        """Count the seconds of a run, and base estimates on its pace."""
        self.spent += spent
        self._paces.setdefault(mode, []).append(pace)

    def estimate(self, mode: CurveMode, num_train: int, num_epochs: int) -> float | None:
        """Seconds of another run, from the known run closest in length; None if there is none."""
        # A tail takes less time than all layers, which is all that is known before the first one.
        paces = self._paces.get(mode) or (self._paces.get("finetune") if mode == "tail" else None)
        if paces is None:
            return None
        passes = num_train * num_epochs
        nearest = min(paces, key=lambda pace: abs(math.log(pace.passes / passes)))
        return nearest.seconds(num_train, num_epochs, self.num_test)

    def allows(self, seconds: float | None) -> bool:
        """Whether a run of this length still fits; a run of unknown length does."""
        return seconds is None or self.spent + seconds <= self.seconds

"""How long the next run will take, from those that are done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from featcache.results import CurveMode, RunReport


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a run took, in parts that grow with different numbers.

    Attributes:
        passes: Train images seen, epochs counted.
        per_pass: Seconds of one of them.
        per_train: Seconds for each train image, once: reading, and the linear probe's pass.
        per_test: Seconds for each test image: reading and scoring.
        fixed: Seconds that stay as they are.
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
    """Of a cached head; what is not fitting is taken to stay as it is.

    Args:
        report: Of the run.
        spent: Seconds that it took in all.
    """
    fitting, num_train = float(report.more["fit_seconds"]), int(report.more["num_train"])
    return Pace(passes=num_train, per_pass=fitting / num_train, fixed=max(spent - fitting, 0.0))


def tuning_pace(report: RunReport, spent: float) -> Pace:
    """Of a fine-tune; arguments as of `head_pace`.

    The fastest epoch counts: slower ones were the first, or shared the machine with other work.
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


def pace_of(report: RunReport) -> Pace:
    """Of a finished run of either mode.

    Raises:
        KeyError, TypeError, ValueError, ZeroDivisionError: The report is damaged.
    """
    cell = report.more["cell"]
    pace = head_pace if cell["mode"] == "cached" else tuning_pace
    return pace(report, float(cell["spent_seconds"]))


@dataclass
class Budget:
    """Seconds to spend on runs, and what runs have taken so far."""

    seconds: float
    num_test: int
    spent: float = 0.0
    _paces: dict[CurveMode, list[Pace]] = field(default_factory=dict)

    def add(self, report: RunReport) -> None:
        """Take note of a finished run, made now or at an earlier start."""
        cell = report.more["cell"]
        self.spent += float(cell["spent_seconds"])
        self.learn(cell["mode"], pace_of(report))

    def learn(self, mode: CurveMode, pace: Pace) -> None:
        """Estimate from this pace too."""
        self._paces.setdefault(mode, []).append(pace)

    def estimate(self, mode: CurveMode, num_train: int, num_epochs: int) -> float | None:
        """Seconds of another run, from the known run nearest in length; None: none is known."""
        if mode not in self._paces:
            return None
        passes = num_train * num_epochs
        nearest = min(self._paces[mode], key=lambda pace: abs(math.log(pace.passes / passes)))
        return nearest.seconds(num_train, num_epochs, self.num_test)

    def allows(self, seconds: float | None) -> bool:
        """Whether a run of this length still fits; one of unknown length does."""
        return seconds is None or self.spent + seconds <= self.seconds

"""How long the next run will take, from those that are done."""

from __future__ import annotations

from dataclasses import dataclass, field

from featcache.compare.plan import Spec
from featcache.curve import Mode
from featcache.report import RunReport


@dataclass
class Budget:
    """Seconds to spend on runs, and what runs have taken so far.

    A run of a mode without a finished one is always allowed: nothing can be said of it.
    """

    seconds: float
    spent: float = 0.0
    _largest: dict[Mode, tuple[int, float, float]] = field(default_factory=dict)

    def add(self, spec: Spec, report: RunReport) -> None:
        """Take note of a finished run, made now or at an earlier start."""
        spent = float(report.more["cell"]["spent_seconds"])
        self.spent += spent
        passes = passes_of(report)
        if passes >= self._largest.get(spec.mode, (0, 0.0, 0.0))[0]:
            self._largest[spec.mode] = (passes, training_seconds(report), spent)

    def estimate(self, mode: Mode, passes: int) -> float | None:
        """Seconds of a run that trains on so many images, repetitions counted; None: unknown.

        What is not training (reading and scoring the test split) is taken to stay as it is.
        """
        if mode not in self._largest:
            return None
        known, training, spent = self._largest[mode]
        return spent - training + training * passes / max(known, 1)

    def allows(self, seconds: float | None) -> bool:
        """Whether a run of this length still fits."""
        return seconds is None or self.spent + seconds <= self.seconds


def passes_of(report: RunReport) -> int:
    """Train images seen, epochs counted."""
    epochs = len(report.epochs) if report.more["cell"]["mode"] == "finetune" else 1
    return int(report.more["num_train"]) * max(epochs, 1)


def training_seconds(report: RunReport) -> float:
    """Seconds that grow with the number of train images."""
    if report.more["cell"]["mode"] == "finetune":
        return sum(float(epoch["seconds"]) for epoch in report.epochs)
    return float(report.more["cell"]["trial_seconds"])

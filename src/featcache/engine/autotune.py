"""Choosing by measurement: candidates run in turns, each on all threads at once, as it will."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from featcache.config import Preprocessing
from featcache.engine.base import Run, sample_pixels

# Timings this close are equal; the earlier candidate, the better bet, wins then.
MARGIN = 0.03
MAX_ROUNDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the job: an engine's `run`, how many images a call gets, how many callers."""

    engine: str
    run: Run
    batch_size: int
    threads: int

    @property
    def label(self) -> str:
        """What the timings call it."""
        return f"{self.engine} batch {self.batch_size} × {self.threads}"


Measure = Callable[[Candidate], float]


def race(
    candidates: Sequence[Candidate], measure: Measure, budget_s: float
) -> tuple[Candidate, dict[str, float]]:
    """Measure candidates in turns and pick the fastest.

    Args:
        candidates: The likeliest first.
        measure: Gives images per second; called once more for each to warm up.
        budget_s: Seconds after which no further round begins. Where warming up alone takes longer,
            nothing is measured and the first candidate is taken.

    Returns:
        The choice, and each candidate's best rate: a neighbour on the machine only slows down.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    end = time.perf_counter() + budget_s
    best: dict[str, float] = {}
    for candidate in candidates:
        measure(candidate)
        if time.perf_counter() > end:
            return candidates[0], {}
    for _ in range(MAX_ROUNDS):
        for candidate in candidates:
            rate = measure(candidate)
            best[candidate.label] = max(rate, best.get(candidate.label, 0.0))
        if time.perf_counter() > end:
            break
    choice = candidates[0]
    for candidate in candidates[1:]:
        if best[candidate.label] > best[choice.label] * (1 + MARGIN):
            choice = candidate
    return choice, best


@contextlib.contextmanager
def all_at_once(prep: Preprocessing, threads: int) -> Iterator[Measure]:
    """A measure that runs a candidate's threads together, one call each.

    Args:
        prep: Sets the size of the images.
        threads: The most threads that a candidate will want.
    """
    pixels_of = functools.cache(functools.partial(sample_pixels, prep))
    with ThreadPoolExecutor(threads, thread_name_prefix="race") as pool:

        def measure(candidate: Candidate) -> float:
            pixels = pixels_of(candidate.batch_size)
            ready = threading.Barrier(candidate.threads + 1)

            def call() -> None:
                ready.wait()
                candidate.run(pixels)

            try:
                calls = [pool.submit(call) for _ in range(candidate.threads)]
                ready.wait()
            except BaseException:
                ready.abort()  # or the threads would wait for ever, and the pool for them
                raise
            start = time.perf_counter()
            for done in calls:
                done.result()
            seconds = time.perf_counter() - start
            return candidate.batch_size * candidate.threads / max(seconds, 1e-9)

        yield measure

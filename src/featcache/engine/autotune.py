"""The fastest implementation, batch size and number of threads, measured on this machine.

Candidates are measured in turns, each with all its threads at once. Only a job that is long enough
to repay the measurement gets one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featcache.config import Preprocessing
from featcache.engine.base import Implementation, Workload, sample_pixels
from featcache.runtime import num_cores

# Candidates whose rates differ by less tie; the earlier one, the better guess, wins then.
TIE_MARGIN = 0.03
MAX_ROUNDS = 5
# A job this long repays measuring and loading another engine, two or three seconds together.
LONG_JOB_S = 60.0
SELF_TEST_SHARE = 0.03
SELF_TEST_S = 4.0
# For fewer images, even estimating how long the job takes is not worth a forward pass.
SELF_TEST_IMAGES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """An implementation with a batch size and a number of threads that call it at once."""

    implementation: Implementation
    batch_size: int
    threads: int

    @property
    def label(self) -> str:
        """Its name among the timings."""
        return f"{self.implementation.name} batch {self.batch_size} × {self.threads}"


# Images per second of a candidate.
Measure = Callable[[Candidate], float]


def expected_seconds(work: Workload, implementation: Implementation) -> float:
    """How long the job will take, judged by one pass over a few images; 0 for a small job."""
    if work.num_images < SELF_TEST_IMAGES:
        return 0.0
    start = time.perf_counter()
    implementation.forward(work.sample)
    each = (time.perf_counter() - start) / len(work.sample)
    return each * work.num_images / work.threads


def tune(
    work: Workload, implementations: Sequence[Implementation], seconds: float
) -> tuple[Candidate, dict[str, float]]:
    """Measure for a share of the `seconds` that the job takes.

    Returns:
        The fastest candidate, and images per second of all that were measured, by label.
    """
    with throughput(work.prep, work.threads) as measure:
        budget_s = min(SELF_TEST_S, SELF_TEST_SHARE * seconds)
        return search(work, implementations, measure, budget_s)


def search(
    work: Workload, implementations: Sequence[Implementation], measure: Measure, budget_s: float
) -> tuple[Candidate, dict[str, float]]:
    """Compare implementations, then for the fastest twice the batch, then one thread per core.

    What the user gave, a batch size or workers, stays.
    """
    candidates = [
        Candidate(implementation=each, batch_size=work.batch_size, threads=work.threads)
        for each in implementations
    ]
    best, timings = pick_fastest(candidates, measure, budget_s / 2)
    changes: list[dict[str, int]] = []
    if work.settings.batch_size is None:
        changes.append({"batch_size": 2 * work.batch_size})
    if work.settings.workers is None and (real := physical_cores()) < work.threads:
        changes.append({"threads": real})
    for change in changes:
        other = dataclasses.replace(best, **change)  # type: ignore[arg-type]
        best, more = pick_fastest([best, other], measure, budget_s / 2 / len(changes))
        timings |= more
    return best, timings


def pick_fastest(
    candidates: Sequence[Candidate], measure: Measure, budget_s: float
) -> tuple[Candidate, dict[str, float]]:
    """Measure candidates in turns and pick the fastest.

    Args:
        candidates: The likeliest first.
        measure: Gives images per second; called once more for each to warm up.
        budget_s: Seconds after which no further round begins. Where warming up alone takes longer,
            nothing is measured and the first candidate is taken.

    Returns:
        The fastest, and each candidate's best rate, since other load on the machine only slows.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    end = time.perf_counter() + budget_s
    for candidate in candidates:
        measure(candidate)
        if time.perf_counter() > end:
            return candidates[0], {}
    rates: dict[str, float] = {}
    for _ in range(MAX_ROUNDS):
        for candidate in candidates:
            rates[candidate.label] = max(measure(candidate), rates.get(candidate.label, 0.0))
        if time.perf_counter() > end:
            break
    best = candidates[0]
    for candidate in candidates[1:]:
        if rates[candidate.label] > rates[best.label] * (1 + TIE_MARGIN):
            best = candidate
    return best, rates


@contextlib.contextmanager
def throughput(prep: Preprocessing, threads: int) -> Iterator[Measure]:
    """A function that measures a candidate: all its threads together, one batch each.

    Args:
        prep: Sets the size of the images.
        threads: The most threads that a candidate will want.
    """
    pixels_of = functools.cache(functools.partial(sample_pixels, prep))
    with ThreadPoolExecutor(threads, thread_name_prefix="autotune") as pool:

        def measure(candidate: Candidate) -> float:
            pixels = pixels_of(candidate.batch_size)
            ready = threading.Barrier(candidate.threads + 1)

            def call() -> None:
                ready.wait()
                candidate.implementation.forward(pixels)

            try:
                calls = [pool.submit(call) for _ in range(candidate.threads)]
                ready.wait()
            except BaseException:
                ready.abort()  # or the threads would wait forever, and the pool for them
                raise
            start = time.perf_counter()
            for done in calls:
                done.result()
            seconds = time.perf_counter() - start
            return candidate.batch_size * candidate.threads / max(seconds, 1e-9)

        yield measure


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads of one core counted once."""
    groups = set()
    try:
        for cpu in os.sched_getaffinity(0):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            groups.add(siblings.read_text(encoding="ascii"))
    except (OSError, AttributeError):  # not Linux
        return num_cores()
    return len(groups)

"""What a cache's features cost: a small JSON file beside the cache, which itself records no times.

NAME.h5.json is written when NAME.h5 is finished and names its digest. While NAME.h5.part grows,
NAME.h5.part.json says when the run began and how long the runs before it took; the time of a run
that was killed is taken from the last write to the .part file.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from featcache.config import JsonObject
from featcache.display import say
from featcache.files import read_regular, write_json

MAX_BYTES = 1 << 20
MAX_SECONDS = 1e10


class CostRecord(TypedDict):
    """The file beside a finished cache; `seconds_total` is null where an interrupted run's is."""

    command: str
    cache: str
    cache_digest: str
    seconds_total: float | None
    num_images: int
    config: JsonObject
    environment: dict[str, str | int]


class Cost(NamedTuple):
    """What a cache's features cost, with which settings, on which machine; None if not known."""

    seconds: float | None
    config: JsonObject | None
    environment: JsonObject | None


def cost_path(cache: Path) -> Path:
    """Where the record of a cache, finished or not, is."""
    return cache.with_name(f"{cache.name}.json")


def cost_of(cache: Path, digest: bytes) -> Cost | None:
    """What extract-features recorded for the cache with this digest; None if there is no record."""
    values = _read(cost_path(cache)) or {}
    if values.get("cache_digest") != digest.hex():
        return None
    config, machine = values.get("config"), values.get("environment")
    return Cost(
        seconds=_seconds(values.get("seconds_total")),
        config=config if isinstance(config, dict) else None,
        environment=machine if isinstance(machine, dict) else None,
    )


def spent_on(part: Path) -> float | None:
    """Seconds that earlier runs spent on an unfinished cache; None if not known."""
    values = _read(cost_path(part)) or {}
    before, begun_at = _seconds(values.get("seconds_before")), _seconds(values.get("begun_at"))
    if before is None or begun_at is None:
        return None
    try:
        return before + max(0.0, part.stat().st_mtime - begun_at)
    except FileNotFoundError:  # another run has just finished it
        return None


def begin_cost(part: Path, seconds_before: float | None, seconds_now: float) -> None:
    """Record that a run is working on `part` and began `seconds_now` ago.

    Raises:
        StorageError: The file system refused.
    """
    begun_at = time.time() - seconds_now
    write_json(cost_path(part), {"seconds_before": seconds_before, "begun_at": begun_at})


def finish_cost(cache: Path, part: Path, record: CostRecord) -> None:
    """Write a finished cache's record; any other file of that name is left as it is.

    Raises:
        StorageError: The file system refused.
    """
    path = cost_path(cache)
    if os.path.lexists(path) and "cache_digest" not in (_read(path) or {}):
        say(
            f"{path} is not a record of extract-features: it is left as it is, "
            "and the time is not recorded"
        )
    else:
        write_json(path, record)
    cost_path(part).unlink(missing_ok=True)


def _seconds(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and 0 <= value <= MAX_SECONDS else None


def _read(path: Path) -> JsonObject | None:
    try:
        values = json.loads(read_regular(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None

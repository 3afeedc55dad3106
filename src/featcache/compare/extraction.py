"""The cache that all runs share, and what its extraction took."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.backbone import load_backbone
from featcache.cache import FeatureCache, cost_of, seconds_of
from featcache.config import CompareConfig, ExtractConfig, config_json
from featcache.config.settings import carried_over
from featcache.data import BadImage, bad_image_error, load_dataset
from featcache.engine.inference import computed_rows
from featcache.extract import extract
from featcache.files import read_regular, write_json
from featcache.runtime import StageTimer, say, torch_threads_kept

MAX_BYTES = 1 << 20
SAMPLE_IMAGES = 256
"""Enough for a steady rate, few enough to take little time."""
SPEED_SETTINGS = ("device", "engine", "precision", "batch_size", "workers")
"""Settings that change the time of an extraction, not its features."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where the features are, and what one image took.

    `how` explains where the seconds come from; `spent_seconds` is what this comparison spent.
    """

    cache: str
    cache_digest: str
    seconds_per_image: float
    num_images: int
    spent_seconds: float
    how: str


def extract_config(config: CompareConfig) -> ExtractConfig:
    """The comparison's settings as those of an extraction."""
    return ExtractConfig(**carried_over(config, ExtractConfig, but=("json", "verbose", "output")))


def shared_cache(config: CompareConfig, output: Path) -> Extraction:
    """Extract every image once, or find its cache, and what extraction takes.

    The record beside the cache tells what it cost, if it is of this machine and these settings.
    Otherwise a sample is computed again and timed. The result is saved in the comparison's folder.

    Raises:
        UserError: Wrong input.
        StorageError: The cache could not be written.
    """
    wanted = extract_config(config)
    report = extract(wanted)
    cache = FeatureCache(report["cache"])
    record = output / "extraction.json"
    known = _remembered(record, cache.digest.hex())
    if known is not None:
        return dataclasses.replace(known, cache=report["cache"])
    found = _measured(wanted, report, cache)
    write_json(record, dataclasses.asdict(found))
    return found


def _measured(config: ExtractConfig, report: dict[str, Any], cache: FeatureCache) -> Extraction:
    """What an image took: by the record beside the cache, or by a sample computed again."""
    splits = report["splits"].values()
    num_images, resumed = (sum(s[k] for s in splits) for k in ("num_samples", "num_resumed"))
    done, spent = num_images, float(report["seconds_total"])
    seconds = _recorded_seconds(config, report, cache)
    how = "measured on all images that this comparison extracted"
    if seconds is None:
        done, seconds = _time_sample(config, cache)
        spent += seconds
        how = (
            f"measured on {done} images computed again, as no usable record tells the cache's time"
        )
    elif resumed:
        how = "as recorded on this machine when the cache was made"
    return Extraction(
        cache=report["cache"],
        cache_digest=cache.digest.hex(),
        seconds_per_image=seconds / done,
        num_images=num_images,
        spent_seconds=spent,
        how=how,
    )


def _recorded_seconds(
    config: ExtractConfig, report: dict[str, Any], cache: FeatureCache
) -> float | None:
    """What the record beside the cache says, if this machine would take the same time."""
    record = cost_of(cache.path, cache.digest) or {}
    asked = config_json(config)
    made_with = record.get("config")
    same_settings = isinstance(made_with, dict) and all(
        made_with.get(name) == asked[name] for name in SPEED_SETTINGS
    )
    same_machine = record.get("environment") == report["environment"]
    return seconds_of(record) if same_settings and same_machine else None


def _time_sample(config: ExtractConfig, cache: FeatureCache) -> tuple[int, float]:
    """Compute features of some train images and discard them; their number, and seconds."""
    from featcache.engine import EngineSettings, choose_engine

    say(f"computing up to {SAMPLE_IMAGES} cached images again, to measure what extraction takes")
    split, rows = load_dataset(config).splits["train"], cache.split("train").rows[:SAMPLE_IMAGES]
    split.subset(rows).record(cache.rows("train").content[rows])
    views, prep = cache.meta.views, cache.meta.backbone.preprocessing
    network = load_backbone(config, config.seed, cache.meta.backbone)
    with torch_threads_kept():
        engine = choose_engine(EngineSettings.of(config), network, prep, num_images=len(rows))
        start = time.perf_counter()
        for index, row in computed_rows(engine, split, rows, prep, views, StageTimer()):
            if isinstance(row, BadImage):
                raise bad_image_error(split, index, row)
        return len(rows), time.perf_counter() - start


def _remembered(record: Path, digest: str) -> Extraction | None:
    """What an earlier start saved about the same cache."""
    try:
        found = Extraction(**json.loads(read_regular(record, MAX_BYTES)))
        right = found.cache_digest == digest and found.seconds_per_image > 0
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # measure again
    return found if right and math.isfinite(found.spent_seconds) else None

"""The cache that all runs share, and what it cost."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.backbone import load_backbone
from featcache.cache import FeatureCache
from featcache.config import CompareConfig, ExtractConfig
from featcache.data import BadImage, bad_image_error, load_dataset
from featcache.engine.inference import computed_rows
from featcache.extract import extract
from featcache.files import read_regular, write_json
from featcache.runtime import StageTimer, say, torch_threads_kept

MAX_BYTES = 1 << 20
SAMPLE_IMAGES = 256
"""Enough for a steady rate, few enough not to be noticed."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where the features are, and what one image took.

    `how` says in words where the seconds come from; `spent_seconds` is what this comparison waited.
    """

    cache: str
    cache_digest: str
    seconds_per_image: float
    num_images: int
    spent_seconds: float
    how: str


def extract_config(config: CompareConfig) -> ExtractConfig:
    """The comparison's settings as those of an extraction."""
    names = {field.name for field in dataclasses.fields(ExtractConfig)}
    shared = ("json", "verbose", "output")
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names and field.name not in shared
    }
    return ExtractConfig(**values)


def shared_cache(config: CompareConfig, output: Path) -> Extraction:
    """Extract every image once, or find that done, and know what it cost.

    A cache that was there before tells nothing of its cost, so a sample is then computed again
    and timed. What was found is kept in the comparison's folder.

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
    splits = report["splits"].values()
    num_images, resumed = (sum(s[k] for s in splits) for k in ("num_samples", "num_resumed"))
    done, seconds = num_images - resumed, float(report["seconds_total"])
    spent, how = seconds, "measured on all images that this comparison extracted"
    if done < min(SAMPLE_IMAGES, num_images):
        done, seconds = _time_sample(config, cache)
        spent += seconds
        how = f"measured on {done} images computed again, as the cache was there already"
    return Extraction(
        cache=report["cache"],
        cache_digest=cache.digest.hex(),
        seconds_per_image=seconds / done,
        num_images=num_images,
        spent_seconds=spent,
        how=how,
    )


def _time_sample(config: ExtractConfig, cache: FeatureCache) -> tuple[int, float]:
    """Compute features of some train images without keeping them; their number, and seconds."""
    from featcache.engine import EngineSettings, choose_engine

    say(f"the cache was there already: computing up to {SAMPLE_IMAGES} images again to time them")
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
    """What an earlier start found about the same cache."""
    try:
        found = Extraction(**json.loads(read_regular(record, MAX_BYTES)))
        right = found.cache_digest == digest and found.seconds_per_image > 0
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # it is measured again
    return found if right and math.isfinite(found.spent_seconds) else None

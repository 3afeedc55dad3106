"""The caches that all runs share, and what their extraction took."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featcache.backbone import load_backbone
from featcache.cache import FeatureCache, cost_of
from featcache.compare.alternatives import Network
from featcache.config import CompareConfig, ExtractConfig, config_json
from featcache.config.settings import carried_over
from featcache.data import BadImage, ImageDataset, bad_image_error
from featcache.display import say
from featcache.engine.inference import computed_rows
from featcache.errors import UserError
from featcache.extract import ExtractReport, extract
from featcache.extract.request import Request
from featcache.files import read_regular, write_json
from featcache.results.tables import seconds_text
from featcache.runtime import StageTimer, torch_threads_kept

MAX_BYTES = 1 << 20
MINUTE = 60.0
SAMPLE_IMAGES = 256
"""Enough for a steady rate, few enough to take little time."""
SECOND_SHARE = 0.25
"""Part of the budget that each extraction beside the first may take."""
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


def extract_configs(config: CompareConfig) -> dict[Network, ExtractConfig]:
    """The comparison's settings as those of extractions; held-out rows choose if there are two."""
    but = ("json", "verbose", "output", "layers", "batchnorm")
    shared = carried_over(config, ExtractConfig, but=but)
    # The last layer's columns are among those of all stages.
    layers = "stages" if config.layers == "auto" else config.layers
    networks: tuple[Network, ...] = ("frozen", "adapt")
    if config.batchnorm != "auto":
        networks = (config.batchnorm,)
    return {
        network: ExtractConfig(**shared, layers=layers, batchnorm=network) for network in networks
    }


def shared_caches(
    config: CompareConfig, dataset: ImageDataset, output: Path
) -> dict[Network, Extraction]:
    """Extract every image once with each network, or find the caches, and what extraction takes.

    A second network is left out where its features would take too much of the budget, or where it
    cannot be made, for lack of BatchNorm layers.

    Raises:
        UserError: Wrong input.
        StorageError: A cache could not be written.
    """
    found: dict[Network, Extraction] = {}
    for network, wanted in extract_configs(config).items():
        expected = max((e.seconds_per_image * e.num_images for e in found.values()), default=0.0)
        if too_long := over_budget(config, expected):
            say(f"leaving out adapted BatchNorm statistics: their features would {too_long}")
            continue
        try:
            found[network] = shared_cache(wanted, dataset, output / record_name(network))
        except UserError as error:
            if not found:
                raise
            say(f"leaving out adapted BatchNorm statistics: {error}")
    return found


def over_budget(config: CompareConfig, seconds: float) -> str:
    """How much of the budget an extraction beside the first would take; empty if it may."""
    if seconds <= SECOND_SHARE * config.budget * MINUTE:
        return ""
    return f"take {seconds_text(seconds)} of --budget {config.budget:g} minutes"


def record_name(network: Network | Literal["tail"]) -> str:
    """The file in the comparison's folder that remembers what extraction took."""
    return f"extraction-{network}.json"


def shared_cache(wanted: ExtractConfig, dataset: ImageDataset, record: Path) -> Extraction:
    """One cache, and what its extraction takes.

    The record beside the cache tells what it cost, if it is of this machine and these settings.
    Otherwise a sample is computed again and timed. The result is saved in the comparison's folder.
    """
    report = extract(wanted, dataset)
    cache = FeatureCache(report["cache"])
    known = _remembered(record, cache.digest.hex())
    if known is not None:
        return dataclasses.replace(known, cache=report["cache"])
    found = _measured(wanted, dataset, report, cache)
    write_json(record, dataclasses.asdict(found))
    return found


def _measured(
    config: ExtractConfig, dataset: ImageDataset, report: ExtractReport, cache: FeatureCache
) -> Extraction:
    """What an image took: by the record beside the cache, or by a sample computed again."""
    splits = report["splits"].values()
    num_images, resumed = (sum(s[k] for s in splits) for k in ("num_samples", "num_resumed"))
    done, spent = num_images, float(report["seconds_total"])
    seconds = _recorded_seconds(config, report, cache)
    how = "measured on all images that this comparison extracted"
    if seconds is None:
        done, seconds = _time_sample(config, dataset, cache)
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
    config: ExtractConfig, report: ExtractReport, cache: FeatureCache
) -> float | None:
    """What the record beside the cache says, if this machine would take the same time."""
    cost, asked = cost_of(cache.path, cache.digest), config_json(config)
    if cost is None or cost.config is None or cost.environment != report["environment"]:
        return None
    same = all(cost.config.get(name) == asked[name] for name in SPEED_SETTINGS)
    return cost.seconds if same else None


def _time_sample(
    config: ExtractConfig, dataset: ImageDataset, cache: FeatureCache
) -> tuple[int, float]:
    """Compute features of some train images and discard them; their number, and seconds."""
    from featcache.engine import EngineSettings, choose_engine

    say(f"computing up to {SAMPLE_IMAGES} cached images again, to measure what extraction takes")
    request, rows = Request.of(config, dataset), cache.split("train").rows[:SAMPLE_IMAGES]
    split = dataset.splits["train"]
    split.subset(rows).record(cache.rows("train").content[rows])
    views, prep = cache.meta.views, cache.meta.backbone.preprocessing
    network = load_backbone(request.config, config.seed, cache.meta.backbone)
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

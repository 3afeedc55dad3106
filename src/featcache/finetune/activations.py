"""`finetune --from-stage`: the input of a stage, computed once for every image and cached.

With `--layers stages`, each row also holds the columns of the stages before, after its input.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from featcache.cache import FeatureCache, cost_of
from featcache.config import ExtractConfig, FinetuneConfig, JsonObject
from featcache.config.settings import carried_over
from featcache.data import ImageDataset, ImageSplit
from featcache.display import say
from featcache.extract import extract
from featcache.finetune.samples import Activations, check_any


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCache:
    """A cache of a stage's inputs, and what it cost.

    Attributes:
        cache: The file.
        hit: Whether it was there already.
        wall_s: Seconds that this run spent on it.
        seconds: Seconds that its extraction took, in earlier runs too; None if not known.
    """

    cache: FeatureCache
    hit: bool
    wall_s: float
    seconds: float | None

    @classmethod
    def made_or_found(
        cls, config: FinetuneConfig, *, flip: bool, dataset: ImageDataset | None = None
    ) -> Self:
        """Compute the inputs of `config.from_stage`, or find that they are cached already.

        Args:
            config: The command's settings.
            flip: Whether training mirrors images.
            dataset: What the settings name, where it is loaded already.

        Raises:
            UserError: Wrong input, an unreadable image under `on_error="fail"`, or no room.
            CacheError: A cache of that name was made from other images or weights.
            StorageError: The cache could not be written.
        """
        start = time.perf_counter()
        report = extract(extraction_config(config, flip=flip), dataset)
        if report["hit"]:
            say(f"the input of {config.from_stage} is cached already: {report['cache']}")
        wall_s = time.perf_counter() - start
        return cls.at(Path(report["cache"]), hit=report["hit"], wall_s=wall_s)

    @classmethod
    def at(cls, path: Path, *, hit: bool = True, wall_s: float = 0.0) -> Self:
        """Open a finished one.

        Raises:
            CacheError: It is damaged, or not a cache.
        """
        cache = FeatureCache(path)
        cost = cost_of(cache.path, cache.digest)
        return cls(cache=cache, hit=hit, wall_s=wall_s, seconds=cost.seconds if cost else None)

    @property
    def cost_s(self) -> float:
        """Seconds of extraction to count, whenever they were spent."""
        return self.wall_s if self.seconds is None else self.seconds

    def samples(self, split: ImageSplit) -> Activations:
        """The cached rows of a split's images, those that could not be read left out.

        Raises:
            UserError: There is none.
        """
        cached, info = self.cache.split(split.name), self.cache.meta.backbone
        assert info.stage_input is not None
        place_of = {name: place for place, name in enumerate(cached.ids)}
        rows = np.array([row for row, name in enumerate(split.ids) if name in place_of], np.int64)
        check_any(len(rows), split)
        usable = split.subset(rows) if len(rows) < len(split) else split
        places = np.array([place_of[name] for name in usable.ids], np.int64)
        shape = (info.feature_dim,) if info.stages else info.stage_input.shape
        return Activations(usable, cached, places, shape)

    def decisive(self) -> JsonObject:
        """What of it decides a run's outcome."""
        return {"activations": self.cache.digest.hex()}

    def describe(self) -> JsonObject:
        """For reports."""
        meta = self.cache.meta
        assert meta.backbone.stage_input is not None
        return {
            **dataclasses.asdict(meta.backbone.stage_input),
            "num_columns": meta.backbone.num_columns,
            "dtype": meta.dtype,
            "num_views": meta.views.num,
            "cache": str(self.cache.path),
            "cache_digest": self.cache.digest.hex(),
            "num_bytes": self.cache.path.stat().st_size,
            "hit": self.hit,
            "extract_seconds": self.seconds,
        }


def extraction_config(config: FinetuneConfig, *, flip: bool) -> ExtractConfig:
    """The settings of the extraction that `--from-stage` needs."""
    values = carried_over(config, ExtractConfig, but=("json", "output", "batch_size"))
    return ExtractConfig(**values, views="flip" if flip else "none")

"""What a run asks for, and whether a cache already holds exactly that: hit, stale or resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from featcache.backbone import OwnNetwork, identify, load_backbone
from featcache.cache import (
    MAX_DIM,
    FeatureCache,
    SkippedSample,
    SplitRows,
    begun_with,
    cost_of,
    info,
    label_texts,
    part_path,
    read_meta,
    spent_on,
)
from featcache.config import CacheMeta, ExtractConfig, Views, flatten
from featcache.data import REASONS, ImageDataset, ImageSplit, load_dataset
from featcache.errors import CacheError, UserError
from featcache.extract.batchnorm import with_adapted_batchnorm
from featcache.runtime import numeric_versions, recorded_engine

if TYPE_CHECKING:
    from torch import nn

# These do not change the rows: a dataset may be renamed or moved.
IMMATERIAL = ("dataset.name",)


class Request(NamedTuple):
    """What a run asks for.

    Attributes:
        config: The command's settings.
        dataset: The images.
        meta: The metadata that the cache will carry; engine as asked for.
        path: Where the cache goes.
        own: The network, if it was given as a module in Python.
    """

    config: ExtractConfig
    dataset: ImageDataset
    meta: CacheMeta
    path: Path
    own: OwnNetwork | None = None

    @classmethod
    def of(
        cls,
        config: ExtractConfig,
        dataset: ImageDataset | None = None,
        own: OwnNetwork | None = None,
    ) -> Self:
        """Look up the dataset and the backbone's weights; neither pixels nor network are loaded.

        Args:
            config: The command's settings.
            dataset: The images, where they are loaded already; those that the settings name unless
                given.
            own: The network, unless the settings name it.

        Raises:
            UserError: There is no such dataset, weights or stage, or a row would be too long.
        """
        dataset = dataset or load_dataset(config)
        if own is None:
            config = with_adapted_batchnorm(config, dataset)
            backbone = identify(config, config.seed, config.cache_dir)
        else:
            backbone = own.identify(config)
            config = dataclasses.replace(config, backbone=backbone.backbone)
        if backbone.feature_dim > MAX_DIM:
            raise UserError(
                f"--from-stage {config.from_stage}: its input is {backbone.feature_dim:,} numbers "
                f"an image, a cache holds {MAX_DIM:,}: give a later stage or a smaller --image-px"
            )
        meta = CacheMeta(
            backbone=backbone,
            dataset=dataset.info(config),
            views=Views.parse(config.views, config.seed),
            dtype=config.stored_dtype,
            precision=config.precision,
            engine="auto" if config.engine == "auto" else recorded_engine(config.engine),
            versions=numeric_versions(backbone.backbone),
        )
        path = cache_path(config, meta)
        return cls(config=config, dataset=dataset, meta=meta, path=path, own=own)

    def load_network(self) -> nn.Module:
        """The frozen network that `meta` describes.

        Raises:
            UserError: Its weights have changed, or it lacks something.
        """
        if self.own is not None:
            return self.own.load(self.meta.backbone)
        return load_backbone(self.config, self.config.seed, self.meta.backbone)


def settings_tag(meta: CacheMeta) -> str:
    """Eight hex digits of what the user asked for, without the contents of files.

    When files change, the name therefore stays and the run is refused with the reason, instead of
    silently filling another cache.
    """
    asked = flatten(meta.to_dict())
    for name in ("dataset.name", "dataset.fingerprint", "backbone.weights_sha256", "engine"):
        del asked[name]
    asked = {k: v for k, v in asked.items() if not k.startswith("versions.")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def cache_path(config: ExtractConfig, meta: CacheMeta) -> Path:
    """Where the cache goes: `--output`, or a name made from the settings."""
    if config.output is not None:
        return config.output
    info = meta.backbone
    parts = [
        meta.dataset.name,
        info.file_name,
        f"{info.preprocessing.image_px}px",
        settings_tag(meta),
    ]
    return config.cache_dir / ("-".join(parts) + ".h5")


def differences(cached: CacheMeta, wanted: CacheMeta) -> list[tuple[str, object, object]]:
    """Fields in which a cache differs from a request, as (name, cached, wanted)."""
    same = ("engine",) if _engine_fits(cached.engine, wanted.engine) else ()
    return [row for row in cached.differences(wanted) if row[0] not in (*IMMATERIAL, *same)]


def _engine_fits(cached: str, wanted: str) -> bool:
    """Whether rows made by one engine are what was asked for.

    `auto` accepts any. What a quantized network adds to its engine's name is known only once it is
    made, and any version fits an engine that is not installed.
    """
    return wanted in ("auto", cached) or cached.startswith((f"{wanted}+", f"{wanted}-"))


def find_hit(request: Request) -> Path | None:
    """The finished cache that holds exactly what is wanted, under its own or another name.

    Raises:
        CacheError: The cache of that name differs from the request; the message says how.
    """
    config, path, wanted = request.config, request.path, request.meta
    if path.exists():
        unfit = differences(read_meta(path)[0], wanted)
        if unfit and config.update:
            return None
        if unfit:
            raise CacheError(_stale(path, unfit, request.dataset))
        return path
    if config.output is None:
        for other in sorted(config.cache_dir.glob(f"*-{settings_tag(wanted)}.h5")):
            try:
                if not differences(read_meta(other)[0], wanted):
                    return other
            except CacheError:
                continue  # a damaged cache of another name is not this command's business
    return None


class EarlierRows(NamedTuple):
    """What earlier runs left: an unfinished cache, and the finished one that `--update` replaces.

    `engine` made these rows. `seconds` were spent on them, None if that is not known.
    """

    part: Path | None
    cache: FeatureCache | None
    engine: str | None
    seconds: float | None

    @classmethod
    def find(cls, config: ExtractConfig, path: Path) -> Self:
        """Look for rows that this run keeps."""
        if config.force:
            return cls(part=None, cache=None, engine=None, seconds=0.0)
        begun = begun_with(path)
        cache = FeatureCache(path) if config.update and path.exists() else None
        seconds: float | None = 0.0
        if part_path(path).exists():
            seconds = spent_on(part_path(path))
        elif cache is not None:
            cost = cost_of(path, cache.digest)
            seconds = cost.seconds if cost else None
        made_by = begun or (cache.meta if cache else None)
        return cls(
            part=part_path(path) if begun else None,
            cache=cache,
            engine=made_by.engine if made_by else None,
            seconds=seconds,
        )

    def num_missing(self, dataset: ImageDataset) -> int:
        """About how many images are still to be computed."""
        num = total = sum(map(len, dataset.splits.values()))
        if self.cache is not None:
            known = np.concatenate([self.cache.split(n).content for n in self.cache.num_rows])
            wanted = np.concatenate([split.content for split in dataset.splits.values()])
            num = int(np.isin(wanted.view("S32"), known.view("S32"), invert=True).sum())
        if self.part is not None:
            with contextlib.suppress(CacheError):  # it may just have been finished elsewhere
                splits = info(self.part)["splits"].values()
                done = (s["num_samples"] * s["num_blocks_done"] // s["num_blocks"] for s in splits)
                num = min(num, max(0, total - sum(done)))
        return num


def left_out(path: Path) -> list[SkippedSample]:
    """The images that a cache, finished or not, leaves out: id and code of each."""
    return [row for split in info(path)["splits"].values() for row in split["skipped"]]


def check_skipped(config: ExtractConfig, path: Path, advice: str) -> None:
    """Refuse a cache, finished or not, that leaves out images when none may be left out.

    Args:
        config: The command's settings.
        path: The cache; it need not exist.
        advice: What to type once the images are repaired or removed.

    Raises:
        UserError: The file was made with `--on-error skip`, this run asks for `fail`.
    """
    if config.on_error == "skip" or not path.exists():
        return
    rows = left_out(path)
    if rows:
        reason = REASONS.get(rows[0]["code"], "unreadable")
        raise UserError(
            f"{path} leaves out {len(rows)} images, the first {rows[0]['id']} ({reason}): repair "
            f"or remove them and add {advice}, or add --on-error skip to leave them out"
        )


def _stale(path: Path, unfit: list[tuple[str, object, object]], dataset: ImageDataset) -> str:
    """Say which fields differ, and what to type."""
    rows = [
        f"{name} is {_short(old)} in the cache, {_short(new)} now" for name, old, new in unfit[:4]
    ]
    if len(unfit) > len(rows):
        rows.append(f"and {len(unfit) - len(rows)} more fields")
    names = {name for name, _, _ in unfit}
    if "dataset.fingerprint" in names:
        rows.append(_dataset_changes(FeatureCache(path), dataset))
    made, update = "with different settings", ""
    if names == {"dataset.fingerprint"}:
        made, update = "from different images", "--update to compute only what changed, "
        if read_meta(path)[0].precision == "int8":
            update = "--update (possible with int8 while its calibration images stay the same), "
    return (
        f"{path} was made {made}: {'; '.join(rows)}. Add {update}"
        "--force to replace it, or --output FILE to keep both"
    )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


def _dataset_changes(cache: FeatureCache, dataset: ImageDataset) -> str:
    """Name the images that make a dataset differ from the cached one."""
    old = _samples(cache.class_names, {name: cache.rows(name) for name in cache.splits})
    new = _samples(dataset.class_names, dataset.splits)
    changes = {"added": sorted(new.keys() - old.keys()), "removed": sorted(old.keys() - new.keys())}
    for key in sorted(old.keys() & new.keys()):
        pairs = zip(("changed", "relabeled", "regrouped"), old[key], new[key], strict=True)
        what = next((name for name, before, now in pairs if before != now), None)
        if what is not None:
            changes.setdefault(what, []).append(key)
    texts = [
        f"{len(ids)} {what} ({', '.join(ids[:2])}{', …' if len(ids) > 2 else ''})"
        for what, ids in changes.items()
        if ids
    ]
    if cache.class_names != dataset.class_names:
        texts.append(
            f"class names {cache.class_names[:5]} in the cache, {dataset.class_names[:5]} now"
        )
    return "images: " + (", ".join(texts) or "their order differs")


Sample = tuple[bytes, str, str | None]


def _samples(
    class_names: list[str], splits: Mapping[str, SplitRows | ImageSplit]
) -> dict[str, Sample]:
    """By "split:id": content, class and group of every sample."""
    return {
        f"{name}:{key}": (content.tobytes(), label, group)
        for name, rows in splits.items()
        for key, label, content, group in zip(
            rows.ids,
            label_texts(class_names, rows.labels, rows.targets),
            rows.content,
            rows.groups or repeat(None, len(rows.ids)),
            strict=True,
        )
    }

"""`featcache info`, `verify` and `merge`: what a cache holds, whether it is intact, its shards."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import TYPE_CHECKING, TypedDict

from featcache.backbone import identify, load_backbone
from featcache.cache import (
    MARKS,
    CacheInfo,
    FeatureCache,
    info,
    part_path,
    prepare_repair,
    read_meta,
    verify,
)
from featcache.cache.parallel import merge_shards, remove_shards
from featcache.config import (
    OWN_MODULE,
    BackboneInfo,
    CacheMeta,
    DataConfig,
    InfoConfig,
    JsonObject,
    MergeConfig,
    VerifyConfig,
    weights_text,
)
from featcache.config.options import FeatureConfig
from featcache.data import REASONS, ImageDataset, load_dataset
from featcache.errors import CacheError, UserError, listed
from featcache.extract.blocks import ExtractionRun, fill_split
from featcache.extract.extraction import rows_text
from featcache.files import check_outputs
from featcache.runtime import torch_threads_kept

if TYPE_CHECKING:
    from featcache.cache import VerifyReport

EXIT_DAMAGED = 2
MAX_LISTED = 10


class InfoReport(CacheInfo):
    """What `featcache info --json` prints."""

    command: str


def inspect(config: InfoConfig) -> InfoReport:
    """What a cache, finished or not, records about itself; features are not read.

    Raises:
        CacheError: Not a cache, or its metadata is damaged.
    """
    return {"command": "info", **info(config.cache)}


def inspect_lines(report: InfoReport) -> list[str]:
    """The report for people."""
    meta = report["meta"]
    backbone, dataset = meta["backbone"], meta["dataset"]
    prep = backbone["preprocessing"]
    state = "finished" if report["finished"] else "unfinished: run extract-features again"
    lines = [
        f"{report['path']}: cache format {report['format_version']}, {state}, "
        f"{report['file_bytes'] / 1e6:.1f} MB",
        f"backbone   {backbone['backbone']}, weights {weights_text(backbone)} "
        f"(sha256 {backbone['weights_sha256'][:12]}…), {backbone['feature_dim']}-d {meta['dtype']}",
        f"images     {prep['image_px']} px, {prep['resize']} from {prep['resize_px']} px, "
        f"{prep['interpolation']}, mean {prep['mean']}, std {prep['std']}"
        + (", fast decoding" if prep["fast_decode"] else ""),
        f"computed   by {meta['engine']} in {meta['precision']}, "
        + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        f"views      {meta['views']['num']} ({meta['views']['kind']})",
        f"dataset    {dataset['name']} ({dataset['kind']}), fingerprint "
        f"{dataset['fingerprint'][:12]}…, {len(report['class_names'])} classes: "
        + listed(report["class_names"], MAX_LISTED),
    ]
    if backbone["backbone"].startswith(OWN_MODULE):
        lines.insert(2, "           a module given in Python: its name cannot rebuild it")
    if backbone["stage_input"] is not None:
        lines.append(
            f"rows       {rows_text(CacheMeta.from_dict(meta))}, for finetune --from-stage"
        )
    for name, split in report["splits"].items():
        done = f", {split['num_blocks_done']} of {split['num_blocks']} blocks written"
        lines.append(
            f"{name:<10} {split['num_samples']} images, {split['num_skipped']} skipped"
            + (f", {split['num_groups']} groups" if split["num_groups"] is not None else "")
            + ("" if report["finished"] else done)
        )
        lines += [
            f"           skipped {row['id']}: {REASONS.get(row['code'], 'unknown reason')}"
            for row in split["skipped"][:MAX_LISTED]
        ]
    return lines


class MergeReport(TypedDict):
    """What `featcache merge --json` prints; `hit`: the cache was finished already."""

    command: str
    cache: str
    hit: bool
    num_rows: dict[str, int]
    seconds_total: float


def merge(config: MergeConfig) -> MergeReport:
    """Merge the shards of a cache that several ranks wrote, and remove them.

    Raises:
        CacheError: There are none, or some are missing, unfinished, damaged or different.
        StorageError: A rank is still at work, or the file system refused.
    """
    start = time.perf_counter()
    check_outputs({config.cache: MARKS, part_path(config.cache): MARKS})
    if hit := config.cache.exists():
        remove_shards(config.cache)  # the last merge may have ended just before it did
    else:
        merge_shards(config.cache)
    num_rows = {name: num for name, (num, _) in FeatureCache(config.cache).num_rows.items()}
    return {
        "command": "merge",
        "cache": str(config.cache),
        "hit": hit,
        "num_rows": num_rows,
        "seconds_total": time.perf_counter() - start,
    }


def merge_lines(report: MergeReport) -> list[str]:
    """The report for people."""
    rows = ", ".join(f"{num:,} {name}" for name, num in report["num_rows"].items())
    done = (
        " is finished already" if report["hit"] else f": merged in {report['seconds_total']:.1f} s"
    )
    return [f"{report['cache']}{done}: {rows} images"]


def check(config: VerifyConfig) -> JsonObject:
    """Check every byte of a cache that can be checked; with `repair`, recompute damaged blocks.

    Returns:
        The JSON report; `exit_code` is 2 if the cache is still damaged at the end.

    Raises:
        CacheError: There is no such file, or its damage cannot be repaired.
        UserError: The dataset or weights are not those of the cache.
    """
    found = verify(config.cache)
    notes = []
    with contextlib.suppress(CacheError):  # damaged, which is reported
        if (backbone := read_meta(config.cache)[0].backbone).is_own_module:
            notes = [f"not recomputable: {_own_module(backbone)}"]
    report = {"command": "verify", **found.to_dict(), "num_repaired": 0, "notes": notes}
    if config.repair and found.finished and not found.ok:
        num_repaired = _repair(config, found)
        report |= {**verify(config.cache).to_dict(), "num_repaired": num_repaired}
    return {**report, "exit_code": 0 if report["ok"] else EXIT_DAMAGED}


def check_lines(report: JsonObject) -> list[str]:
    """The report for people."""
    path = report["path"]
    rows = sum(report["num_rows"].values())
    if report["ok"]:
        again = f", {report['num_repaired']} rows recomputed" if report["num_repaired"] else ""
        missed = [f"not checked: {what}" for what in report["not_checked"]] + report["notes"]
        sound = f"{path} is sound: {rows} rows in {report['num_blocks']} blocks checked{again}"
        return [sound, *missed]
    if len(report["problems"]) == 1 and report["problems"][0].startswith("unfinished"):
        return [f"{path} is {report['problems'][0]}"]
    lines = [f"{path} is damaged:", *(f"  {problem}" for problem in report["problems"])]
    if report["notes"]:
        lines += report["notes"]
    elif report["repairable"]:
        command = f"featcache verify {shlex.quote(path)} --repair --dataset DATASET"
        lines.append(f"type {command} to recompute the damaged rows")
    else:
        lines.append("run the extract-features command that made it again with --force")
    return lines


def _repair(config: VerifyConfig, found: VerifyReport) -> int:
    """Compute the damaged blocks from the images; returns the number of rows."""
    from featcache.engine import EngineSettings, choose_engine

    if config.dataset is None:
        raise UserError("--repair computes from the images: add --dataset with the dataset's place")
    if not found.repairable:
        raise CacheError(
            f"{config.cache} cannot be repaired: {found.problems[0]}; "
            "run extract-features --force to make it again"
        )
    meta, class_names = read_meta(config.cache)
    outputs = {config.cache: MARKS, part_path(config.cache): MARKS}
    check_outputs(outputs, [config.weights or "", config.dataset])
    backbone = _backbone_of(config, meta)
    dataset = load_dataset(_data_of(config, meta))
    _check_same(config, meta, class_names, backbone, dataset)
    network = load_backbone(backbone, config.seed, meta.backbone)
    with torch_threads_kept():
        settings = EngineSettings(
            backbone=meta.backbone.backbone,
            engine="torch" if meta.engine.startswith("torch") else "openvino",
            precision=meta.precision,
        )
        prep, train = meta.backbone.preprocessing, dataset.splits.get("train")
        engine = choose_engine(
            settings, network, prep, num_images=0, train=train, resumed=meta.engine
        )
        if engine.recorded != meta.engine:
            raise CacheError(
                f"{config.cache} cannot be repaired here: its rows were made by {meta.engine}, "
                f"this machine has {engine.recorded}; run extract-features --force to make it again"
            )
        run = ExtractionRun(engine=engine, on_error="skip")
        with prepare_repair(config.cache) as writer:
            damaged = sum(len(rows) for name in dataset.splits for rows in writer.pending(name))
            for split in dataset.splits.values():
                fill_split(run, writer, split)
            writer.finish()
    return damaged


def _own_module(backbone: BackboneInfo) -> str:
    """Why a cache cannot be computed again by a command."""
    return (
        f"{backbone.backbone} is a module given in Python, which cannot be rebuilt from its name; "
        "make the cache again in Python with extract_features and force=True"
    )


def _data_of(config: VerifyConfig, meta: CacheMeta) -> DataConfig:
    """Which images a cache was made from: the dataset's place as given, the rest as recorded."""
    assert config.dataset is not None
    return DataConfig(
        dataset=config.dataset,
        data_root=config.data_root,
        image_root=config.image_root,
        allow_outside=config.allow_outside,
        num_train=meta.dataset.num_train,
        num_test=meta.dataset.num_test,
        test_fraction=meta.dataset.test_fraction,
        group_from=meta.dataset.group_from,
        on_error="skip",
        seed=config.seed,
        cache_dir=config.cache.parent,
    )


def _backbone_of(config: VerifyConfig, meta: CacheMeta) -> FeatureConfig:
    """The network and weights that a cache was made with.

    Raises:
        CacheError: It was a module given in Python.
    """
    if meta.backbone.is_own_module:
        raise CacheError(f"{config.cache} cannot be repaired: {_own_module(meta.backbone)}")
    return FeatureConfig(
        backbone=meta.backbone.backbone,
        weights=config.weights or meta.backbone.weights,
        image_px=meta.backbone.preprocessing.image_px,
        from_stage=meta.backbone.stage_input.stage if meta.backbone.stage_input else None,
    )


def _check_same(
    config: VerifyConfig,
    meta: CacheMeta,
    class_names: list[str],
    backbone: FeatureConfig,
    dataset: ImageDataset,
) -> None:
    """Refuse to repair a cache from other images or weights than it was made from."""
    info_now = identify(backbone, config.seed, config.cache.parent)
    wanted = {
        "weights_sha256": (meta.backbone.weights_sha256, info_now.weights_sha256),
        "dataset.fingerprint": (meta.dataset.fingerprint, dataset.fingerprint),
        "class_names": (class_names, dataset.class_names),
    }
    for name, (there, here) in wanted.items():
        if there != here:
            raise CacheError(
                f"{name} is {str(there)[:80]} in the cache, {str(here)[:80]} now: repair needs "
                "what the cache was made from (see --dataset, --weights and --seed)"
            )

"""Stage one: every image through the frozen backbone once, into a cache file.

The flow is dataset → pixels (decoded ahead by threads) → network → rows placed by index. A run
that finds a finished cache does no work; one that finds an unfinished cache resumes it.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, final

import numpy as np

from featcache.backbone import OwnNetwork, state_sha256
from featcache.cache import (
    MARKS,
    CostRecord,
    FeatureCache,
    SplitRows,
    begin_cost,
    check_unlocked,
    finish_cost,
    open_writer,
    part_path,
    read_meta,
)
from featcache.cache.parallel import copy_shards, remove_shards
from featcache.config import CacheMeta, ExtractConfig, JsonObject, config_json, weights_text
from featcache.data import (
    CopiesReport,
    ImageDataset,
    ImageSplit,
    copies_lines,
    find_copies,
    find_shared_groups,
)
from featcache.display import say
from featcache.extract.blocks import (
    ExtractionRun,
    SplitProgress,
    SplitReport,
    choose_engine_for,
    fill_split,
    warn_if_decoding_is_slow,
)
from featcache.extract.request import EarlierRows, Request, check_skipped, find_hit, left_out
from featcache.files import check_outputs
from featcache.runtime import environment, torch_threads_kept

if TYPE_CHECKING:
    from featcache.engine import EngineInfo


@final
class ExtractReport(TypedDict):
    """What `extract-features --json` prints; `provenance` is the cache's `CacheMeta`."""

    command: str
    cache: str
    hit: bool
    backbone: str
    weights: str
    weights_sha256: str
    feature_dim: int
    precision: str
    engine: EngineInfo
    dtype: str
    num_views: int
    num_classes: int
    identical_images: CopiesReport
    shared_groups: list[JsonObject]
    notes: list[str]
    splits: dict[str, SplitReport]
    stage_seconds: dict[str, float]
    seconds_total: float
    provenance: JsonObject
    environment: dict[str, str | int]
    num_ranks: NotRequired[int]


def extract(
    config: ExtractConfig, dataset: ImageDataset | None = None, own: OwnNetwork | None = None
) -> ExtractReport:
    """Cache the features of every split of a dataset, or find that they are cached already.

    Args:
        config: The command's settings.
        dataset: The images, where they are loaded already; those that the settings name unless
            given.
        own: The network, unless the settings name it.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
        CacheError: A cache of that name was made with different settings.
        StorageError: The disk is full or the cache is being written by another process.
    """
    run = ExtractionRun(on_error=config.on_error)
    request = Request.of(config, dataset, own)
    for note in request.dataset.notes if dataset is None else ():
        say(note)
    found = None if config.force else find_hit(request)
    if found is not None and not (config.update and left_out(found)):
        check_skipped(config, found, "--update")
        return extract_report(found, request.dataset, run)
    path = found or request.path  # the images that it leaves out may be readable by now
    check_outputs({path: MARKS, part_path(path): MARKS}, [config.weights, config.dataset])
    if not config.force:
        check_skipped(config, part_path(path), "--force")
    check_unlocked(path)
    earlier = EarlierRows.find(config, path)
    if request.meta.backbone.stage_input is not None:
        num_bytes = _num_bytes(request.meta, request.dataset)
        say(f"caching {rows_text(request.meta)}, {num_bytes / 1e6:,.1f} MB: {path}")
    with torch_threads_kept():
        _compute(request._replace(path=path), earlier, run)
    report = extract_report(path, request.dataset, run)
    finish_cost(path, part_path(path), cost_record(config, report, earlier.seconds))
    return report


def _compute(request: Request, earlier: EarlierRows, run: ExtractionRun) -> None:
    """Load the network, start or resume the file, compute every pending block, finish."""
    config, dataset = request.config, request.dataset
    network = request.load_network()
    before = state_sha256(network)
    num_images = earlier.num_missing(dataset) * request.meta.views.num
    meta = choose_engine_for(run, request, network, num_images, earlier.engine)
    if config.force:
        remove_shards(request.path)
    writer = open_writer(
        request.path,
        meta,
        dataset.class_names,
        [split_rows(split) for split in dataset.splits.values()],
        force=config.force,
        reuse=earlier.cache,
    )
    with writer:
        run.timer.seconds["start_up"] = start_up = time.perf_counter() - run.start
        begin_cost(part_path(request.path), earlier.seconds, start_up)
        if config.verbose:
            say(f"started in {start_up:.1f} s")
        copy_shards(writer)  # that several ranks began
        for split in dataset.splits.values():
            fill_split(run, writer, split)
        warn_if_decoding_is_slow(run)
        assert state_sha256(network) == before, "the frozen network changed"
        with run.timer("finish"):
            writer.finish()
    remove_shards(request.path)


def split_rows(split: ImageSplit) -> SplitRows:
    """What is known of a split before extraction."""
    return SplitRows(
        split.name,
        split.ids,
        split.labels,
        split.content,
        split.weights,
        split.groups,
        split.targets,
    )


def rows_text(meta: CacheMeta) -> str:
    """What a row of a cache of activations holds, for people."""
    cut = meta.backbone.stage_input
    assert cut is not None
    shape = " × ".join(map(str, cut.shape))
    columns = meta.backbone.num_columns
    beside = f" and {columns:,} columns of the stages before" if columns else ""
    views = "" if meta.views.num == 1 else f" of {meta.views.num} views"
    return f"the input of {cut.stage} ({shape}, {meta.dtype}){beside}{views} of every image"


def _num_bytes(meta: CacheMeta, dataset: ImageDataset) -> int:
    """Bytes of the rows."""
    per_row = meta.views.num * meta.backbone.feature_dim * np.dtype(meta.dtype).itemsize
    return per_row * sum(map(len, dataset.splits.values()))


def cost_record(config: ExtractConfig, report: ExtractReport, before: float | None) -> CostRecord:
    """The record beside the cache: what its features took, and the command."""
    path = Path(report["cache"])
    return {
        "command": "extract-features",
        "cache": path.name,
        "cache_digest": FeatureCache(path).digest.hex(),
        "seconds_total": None if before is None else before + report["seconds_total"],
        "num_images": sum(split["num_samples"] for split in report["splits"].values()),
        "config": config_json(config),
        "environment": report["environment"],
    }


def extract_report(path: Path, dataset: ImageDataset, run: ExtractionRun) -> ExtractReport:
    """The command's JSON."""
    meta, class_names = read_meta(path)
    sizes = FeatureCache(path).num_rows
    hit = run.engine is None
    untouched = {
        n: SplitProgress(num_samples=num, num_resumed=num) for n, (num, _) in sizes.items()
    }
    run.splits = {**untouched, **run.splits}
    for name, split in run.splits.items():
        split.num_skipped = sizes[name][1]
    return {
        "command": "extract-features",
        "cache": str(path),
        "hit": hit,
        "backbone": meta.backbone.backbone,
        "weights": meta.backbone.weights,
        "weights_sha256": meta.backbone.weights_sha256,
        "feature_dim": meta.backbone.feature_dim,
        "precision": meta.precision,
        "engine": run.engine.describe() if run.engine else {"name": meta.engine},
        "dtype": meta.dtype,
        "num_views": meta.views.num,
        "num_classes": len(class_names),
        "identical_images": find_copies(dataset.splits).report(),
        "shared_groups": [found._asdict() for found in find_shared_groups(dataset.splits)],
        "notes": list(dataset.notes),
        "splits": {name: split.report() for name, split in run.splits.items()},
        "stage_seconds": dict(run.timer.seconds),
        "seconds_total": time.perf_counter() - run.start,
        "provenance": dataclasses.asdict(meta),
        "environment": environment(),
    }


def summary_lines(report: ExtractReport) -> list[str]:
    """The report for people."""
    counts = ", ".join(
        f"{split['num_samples']} {name}"
        + (f" ({split['num_skipped']} skipped)" if split["num_skipped"] else "")
        for name, split in report["splits"].items()
    )
    counts += {
        "multiclass": f" images of {report['num_classes']} classes",
        "multilabel": f" images with any of {report['num_classes']} labels",
        "regression": " images with a number each",
    }[report["provenance"]["dataset"].get("task", "multiclass")]
    backbone = report["provenance"]["backbone"]
    prep, cut = backbone["preprocessing"], backbone["stage_input"]
    rows = f"input of {cut['stage']}" if cut else f"{report['feature_dim']}-d"
    made_by = (
        f"{report['backbone']} ({weights_text(backbone)}), {rows}, "
        f"{prep['image_px']} px {prep['resize']}"
    )
    if report["hit"]:
        lines = [f"already cached, nothing to do: {counts}, {made_by}"]
    else:
        computed = sum(s["num_samples"] - s["num_resumed"] for s in report["splits"].values())
        seconds = sum(s["seconds"] for s in report["splits"].values())
        rate = f"{computed / seconds:.0f} images/s" if computed else "no image computed"
        kept = sum(s["num_resumed"] for s in report["splits"].values())
        how = "by other ranks" if "num_ranks" in report else "kept"
        share = f", {kept / (kept + computed):.1%} of rows {how}" if kept else ""
        total = f"{report['seconds_total']:.1f} s{share}"
        lines = [f"cached {counts}, {made_by}: {rate}, {total}"]
    sizes = {name: split["num_samples"] for name, split in report["splits"].items()}
    divided = report["provenance"]["dataset"]["test_fraction"] is not None
    lines += copies_lines(report["identical_images"], sizes, divided=divided)
    following = f"train-head {shlex.quote(report['cache'])}"
    if cut:
        following = f"finetune with the same settings and --from-stage {cut['stage']}"
    return [*lines, f"cache: {report['cache']}", f"next: {following}"]

"""Stage one: every image through the frozen backbone once, into a cache file.

The flow is dataset → pixels (decoded ahead by threads) → network → rows placed by index. A run
that finds a finished cache does no work; one that finds an unfinished cache resumes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from featcache.backbone import OwnNetwork, state_sha256
from featcache.cache import (
    MARKS,
    CacheWriter,
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
from featcache.config import CacheMeta, ExtractConfig, JsonObject, config_json, weights_text
from featcache.data import (
    BadImage,
    CopiesReport,
    ImageDataset,
    ImageSplit,
    bad_image_error,
    copies_lines,
    find_copies,
    find_shared_groups,
)
from featcache.extract.request import EarlierRows, Request, check_skipped, find_hit, left_out
from featcache.files import check_outputs
from featcache.runtime import StageTimer, environment, num_cores, progress, say, torch_threads_kept

if TYPE_CHECKING:
    from featcache.engine import Engine, EngineInfo


class SplitReport(TypedDict):
    """One split in the report; `images_per_s` is null where nothing was computed."""

    num_samples: int
    num_resumed: int
    num_skipped: int
    seconds: float
    images_per_s: float | None


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


@dataclasses.dataclass(kw_only=True)
class SplitProgress:
    """One split in this run: counts of images, and wall seconds.

    `num_resumed` rows come from an earlier run or from the cache that is being updated.
    """

    num_samples: int
    num_resumed: int = 0
    num_skipped: int = 0
    seconds: float = 0.0

    def report(self) -> SplitReport:
        """The same as JSON."""
        computed = self.num_samples - self.num_resumed
        rate = computed / self.seconds if computed and self.seconds else None
        return {
            "num_samples": self.num_samples,
            "num_resumed": self.num_resumed,
            "num_skipped": self.num_skipped,
            "seconds": self.seconds,
            "images_per_s": rate,
        }


@dataclasses.dataclass(kw_only=True)
class ExtractionRun:
    """What this run of the command did; no engine where the cache was there already."""

    start: float = dataclasses.field(default_factory=time.perf_counter)
    timer: StageTimer = dataclasses.field(default_factory=StageTimer)
    engine: Engine | None = None
    splits: dict[str, SplitProgress] = dataclasses.field(default_factory=dict)


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
    run = ExtractionRun()
    request = Request.of(config, dataset, own)
    for note in request.dataset.notes if dataset is None else ():
        say(note)
    found = None if config.force else find_hit(request)
    if found is not None and not (config.update and left_out(found)):
        check_skipped(config, found, "--update")
        return _report(found, request.dataset, run)
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
    report = _report(path, request.dataset, run)
    finish_cost(path, part_path(path), _cost(config, report, earlier.seconds))
    return report


def _compute(request: Request, earlier: EarlierRows, run: ExtractionRun) -> None:
    """Load the network, start or resume the file, compute every pending block, finish."""
    from featcache.engine import EngineSettings, choose_engine

    config, dataset, wanted = request.config, request.dataset, request.meta
    network = request.load_network()
    before = state_sha256(network)
    num_images = earlier.num_missing(dataset) * wanted.views.num
    with run.timer("choose_engine"):
        run.engine = choose_engine(
            EngineSettings.of(config),
            network,
            wanted.backbone.preprocessing,
            num_images=num_images,
            train=dataset.splits.get("train"),
            resumed=earlier.engine,
        )
    if config.verbose:
        say(f"engine: {run.engine.sentence()}")
    meta = dataclasses.replace(wanted, engine=run.engine.recorded)
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
        for split in dataset.splits.values():
            fill_split(run, writer, split, meta, config.on_error)
        _warn_if_decoding_is_slow(run.engine, run.timer)
        assert state_sha256(network) == before, "the frozen network changed"
        with run.timer("finish"):
            writer.finish()


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


def fill_split(
    run: ExtractionRun,
    writer: CacheWriter,
    split: ImageSplit,
    meta: CacheMeta,
    on_error: Literal["fail", "skip"],
) -> None:
    """Compute the pending blocks of one split with the run's engine.

    Raises:
        UserError: An image cannot be read and `on_error` is "fail".
    """
    from featcache.engine.inference import computed_rows

    assert run.engine is not None
    start = time.perf_counter()
    blocks = writer.pending(split.name)
    missing = [
        rows[i] for rows in blocks for i in np.flatnonzero(~writer.is_reused(split.name, rows))
    ]
    prep, views = meta.backbone.preprocessing, meta.views
    stream = computed_rows(run.engine, split, missing, prep, views, run.timer)
    with progress(len(missing), split.name) as bar, contextlib.closing(stream):
        for rows in blocks:
            reused, features = writer.reused_rows(split.name, rows)
            status = np.zeros(len(rows), np.uint8)
            for place in np.flatnonzero(~reused):
                index, row = next(stream)
                if isinstance(row, BadImage):
                    status[place] = _skip(split, index, row, on_error)
                else:
                    features[:, place] = row
            with run.timer("write"):
                writer.write_block(split.name, rows, features, status)
            bar.set_postfix_str(_network_share(run.timer), refresh=False)
            bar.update(int(np.count_nonzero(~reused)))
    run.splits[split.name] = SplitProgress(
        num_samples=len(split),
        num_resumed=len(split) - len(missing),
        seconds=time.perf_counter() - start,
    )


def rows_text(meta: CacheMeta) -> str:
    """What a row of a cache of activations holds, for people."""
    cut = meta.backbone.stage_input
    assert cut is not None
    shape = " × ".join(map(str, cut.shape))
    views = "" if meta.views.num == 1 else f" of {meta.views.num} views"
    return f"the input of {cut.stage} ({shape}, {meta.dtype}){views} of every image"


def _num_bytes(meta: CacheMeta, dataset: ImageDataset) -> int:
    """Bytes of the rows."""
    per_row = meta.views.num * meta.backbone.feature_dim * np.dtype(meta.dtype).itemsize
    return per_row * sum(map(len, dataset.splits.values()))


def _skip(split: ImageSplit, index: int, bad: BadImage, on_error: str) -> int:
    """The status code of an unreadable image, or the end of the run."""
    if on_error == "fail":
        raise bad_image_error(split, index, bad)
    say(f"skipped {split.ids[index]}: {bad.reason}")
    return bad.code


def _network_share(timer: StageTimer) -> str:
    """How much of the threads' time the network takes; the rest goes into reading and decoding."""
    network = timer.seconds["network"]
    pixels = sum(timer.seconds[stage] for stage in ("read", "decode", "resize"))
    return f"network {network / max(network + pixels, 1e-9):.0%}"


def _warn_if_decoding_is_slow(engine: Engine, timer: StageTimer) -> None:
    """On a GPU, say how many workers would keep it busy."""
    from featcache.engine.inference import decode_shortfall

    if engine.device != "cpu":
        note = decode_shortfall(timer.seconds, engine.workers, num_cores())
        if note is not None:
            say(note)


def _cost(config: ExtractConfig, report: ExtractReport, before: float | None) -> CostRecord:
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


def _report(path: Path, dataset: ImageDataset, run: ExtractionRun) -> ExtractReport:
    """The command's JSON."""
    meta, class_names = read_meta(path)
    sizes = FeatureCache(path).num_rows
    hit = run.engine is None
    if hit:
        run.splits = {
            name: SplitProgress(num_samples=num, num_resumed=num)
            for name, (num, _) in sizes.items()
        }
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
        "identical_images": find_copies(dataset).report(),
        "shared_groups": [dataclasses.asdict(found) for found in find_shared_groups(dataset)],
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
        share = f", {kept / (kept + computed):.1%} of rows kept" if kept else ""
        total = f"{report['seconds_total']:.1f} s{share}"
        lines = [f"cached {counts}, {made_by}: {rate}, {total}"]
    sizes = {name: split["num_samples"] for name, split in report["splits"].items()}
    divided = report["provenance"]["dataset"]["test_fraction"] is not None
    lines += copies_lines(report["identical_images"], sizes, divided=divided)
    following = f"train-head {shlex.quote(report['cache'])}"
    if cut:
        following = f"finetune with the same settings and --from-stage {cut['stage']}"
    return [*lines, f"cache: {report['cache']}", f"next: {following}"]

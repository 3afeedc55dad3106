"""Stage one: every image through the frozen backbone once, into a cache file.

The flow is dataset → pixels (decoded ahead by threads) → network → rows placed by index. A run
that finds its cache finished does no work; one that finds it begun goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.backbone import identify, load_backbone, state_sha256
from featcache.cache import (
    MARKS,
    CacheWriter,
    FeatureCache,
    SplitRows,
    begin_cost,
    begun_with,
    check_unlocked,
    cost_of,
    finish_cost,
    info,
    open_writer,
    part_path,
    read_meta,
    seconds_of,
    spent_on,
)
from featcache.config import CacheMeta, ExtractConfig
from featcache.data import ImageDataset, ImageSplit, copies_lines, describe, find_copies
from featcache.errors import CacheError
from featcache.extract.batchnorm import with_adapted_batchnorm
from featcache.extract.request import (
    cache_path,
    check_skipped,
    find_hit,
    left_out,
    wanted_meta,
)
from featcache.files import check_outputs
from featcache.results import config_json
from featcache.runtime import StageTimer, environment, num_cores, progress, say, torch_threads_kept

if TYPE_CHECKING:
    from featcache.engine import Engine


@dataclasses.dataclass(kw_only=True)
class SplitProgress:
    """What happened to one split: counts of images, and wall seconds of this run.

    `num_resumed` rows were there from an earlier run or from the cache that is being updated.
    """

    num_samples: int
    num_resumed: int = 0
    num_skipped: int = 0
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        """The JSON of one split; images_per_s is null where nothing was computed."""
        computed = self.num_samples - self.num_resumed
        rate = computed / self.seconds if computed and self.seconds else None
        return {**dataclasses.asdict(self), "images_per_s": rate}


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Cache the features of every split of a dataset, or find that they are cached already.

    Args:
        config: The command's settings.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input, an unreadable picture under `on_error="fail"`, or a cache that
            holds something else.
        StorageError: The disk is full or the cache is being written by another process.
    """
    start = time.perf_counter()
    dataset = describe(config)
    config = with_adapted_batchnorm(config, dataset)
    info = identify(config, config.seed, config.cache_dir)
    wanted = wanted_meta(config, dataset, info)
    path = cache_path(config, wanted)
    for note in dataset.notes:
        say(note)
    found = None if config.force else find_hit(config, path, wanted, dataset)
    if found is not None and not (config.update and left_out(found)):
        check_skipped(config, found, "--update")
        return _report(found, dataset, start, hit=True)
    path = found or path  # what was left out of it may be readable by now
    check_outputs({path: MARKS, part_path(path): MARKS}, [config.weights, config.dataset])
    if not config.force:
        check_skipped(config, part_path(path), "--force")
    check_unlocked(path)
    before = _spent_before(config, path)
    with torch_threads_kept():
        progress, timer, engine = _run(config, path, wanted, dataset, start, before)
    report = _report(path, dataset, start, progress=progress, timer=timer, engine=engine)
    finish_cost(path, part_path(path), _cost(config, report, before))
    return report


def _spent_before(config: ExtractConfig, path: Path) -> float | None:
    """Seconds that earlier runs spent on the rows that this one keeps; None if not known."""
    if not config.force and part_path(path).exists():
        return spent_on(part_path(path))
    if config.update and path.exists():
        return seconds_of(cost_of(path, FeatureCache(path).digest))
    return 0.0


def _cost(config: ExtractConfig, report: dict[str, Any], before: float | None) -> dict[str, Any]:
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


def _run(
    config: ExtractConfig,
    path: Path,
    wanted: CacheMeta,
    dataset: ImageDataset,
    start: float,
    seconds_before: float | None,
) -> tuple[dict[str, SplitProgress], StageTimer, Engine]:
    """Open or resume the file, fill every pending block, finish."""
    from featcache.engine import choose_engine, device_of

    timer = StageTimer()
    backbone = load_backbone(config, config.seed, wanted.backbone)
    before = state_sha256(backbone)
    old = FeatureCache(path) if config.update and path.exists() else None
    begun = None if config.force else begun_with(path)
    begun_engine = begun.engine if begun else old.meta.engine if old else None
    num_images = _num_missing(dataset, path if begun else None, old) * wanted.views.num
    with timer("choose_engine"):
        engine = choose_engine(
            config,
            backbone,
            wanted.backbone.preprocessing,
            device_of(config, begun_engine),
            num_images,
            dataset.splits.get("train"),
            begun_engine,
        )
    if config.verbose:
        say(f"engine: {engine.sentence()}")
    meta = dataclasses.replace(wanted, engine=engine.recorded or engine.name)
    rows = [
        SplitRows(s.name, s.ids, s.labels, s.content, s.weights) for s in dataset.splits.values()
    ]
    names = dataset.class_names
    progress: dict[str, SplitProgress] = {}
    with open_writer(path, meta, names, rows, force=config.force, reuse=old) as writer:
        timer.seconds["start_up"] = time.perf_counter() - start
        begin_cost(part_path(path), seconds_before, timer.seconds["start_up"])
        if config.verbose:
            say(f"started in {timer.seconds['start_up']:.1f} s")
        for split in dataset.splits.values():
            progress[split.name] = fill_split(config, writer, split, meta, engine, timer)
        _say_if_starved(config, engine, timer)
        assert state_sha256(backbone) == before, "the frozen network moved"
        with timer("finish"):
            writer.finish()
    return progress, timer, engine


def _say_if_starved(config: ExtractConfig, engine: Engine, timer: StageTimer) -> None:
    """On a GPU, tell how many workers would keep it busy."""
    from featcache.engine.inference import decode_shortfall

    if engine.device != "cpu":
        workers = num_cores() if config.workers is None else config.workers
        note = decode_shortfall(timer.seconds, workers, num_cores())
        if note is not None:
            say(note)


def _num_missing(dataset: ImageDataset, begun: Path | None, old: FeatureCache | None) -> int:
    """About how many images neither an unfinished run nor the older cache has."""
    num = total = sum(map(len, dataset.splits.values()))
    if old is not None:
        known = np.concatenate([old.split(name).content for name in old.num_rows]).view("S32")
        wanted = np.concatenate([split.content for split in dataset.splits.values()]).view("S32")
        num = int(np.isin(wanted, known, invert=True).sum())
    if begun is not None:
        with contextlib.suppress(CacheError):  # it may just have been finished elsewhere
            splits = info(part_path(begun))["splits"].values()
            shares = (s["num_samples"] * s["num_blocks_done"] // s["num_blocks"] for s in splits)
            num = min(num, max(0, total - sum(shares)))
    return num


def fill_split(
    config: ExtractConfig,
    writer: CacheWriter,
    split: ImageSplit,
    meta: CacheMeta,
    engine: Engine,
    timer: StageTimer,
) -> SplitProgress:
    """Compute the pending blocks of one split."""
    from featcache.engine.inference import computed_rows

    start = time.perf_counter()
    blocks = writer.pending(split.name)
    missing = [
        rows[i] for rows in blocks for i in np.flatnonzero(~writer.is_reused(split.name, rows))
    ]
    done = SplitProgress(num_samples=len(split), num_resumed=len(split) - len(missing))
    stream = computed_rows(config, split, missing, meta, engine, timer)
    bar = progress(len(missing), split.name)
    with bar:
        for rows in blocks:
            reused, features = writer.reused_rows(split.name, rows)
            status = np.zeros(len(rows), np.uint8)
            for place in np.flatnonzero(~reused):
                status[place], features[:, place] = next(stream)
            with timer("write"):
                writer.write_block(split.name, rows, features, status)
            bar.set_postfix_str(_shares(timer), refresh=False)
            bar.update(int(np.count_nonzero(~reused)))
    stream.close()
    done.seconds = time.perf_counter() - start
    return done


def _shares(timer: StageTimer) -> str:
    """Where the threads' time goes: the network, or reading and decoding."""
    network = timer.seconds["network"]
    pixels = sum(timer.seconds[stage] for stage in ("read", "decode", "resize"))
    return f"network {network / max(network + pixels, 1e-9):.0%}"


def _report(
    path: Path,
    dataset: ImageDataset,
    start: float,
    *,
    hit: bool = False,
    progress: dict[str, SplitProgress] | None = None,
    timer: StageTimer | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    meta, class_names = read_meta(path)
    sizes = FeatureCache(path).num_rows
    if progress is None:
        progress = {n: SplitProgress(num_samples=s[0], num_resumed=s[0]) for n, s in sizes.items()}
    for name, split in progress.items():
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
        "engine": engine.describe() if engine else {"name": meta.engine},
        "dtype": meta.dtype,
        "num_views": meta.views.num,
        "num_classes": len(class_names),
        "identical_images": find_copies(dataset).report(),
        "notes": list(dataset.notes),
        "splits": {name: split.report() for name, split in progress.items()},
        "stage_seconds": dict(timer.seconds) if timer else {},
        "seconds_total": time.perf_counter() - start,
        "provenance": dataclasses.asdict(meta),
        "environment": environment(),
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    counts = ", ".join(
        f"{split['num_samples']} {name}"
        + (f" ({split['num_skipped']} skipped)" if split["num_skipped"] else "")
        for name, split in report["splits"].items()
    )
    counts += f" images of {report['num_classes']} classes"
    prep = report["provenance"]["backbone"]["preprocessing"]
    made_by = (
        f"{report['backbone']} ({report['weights']}), {report['feature_dim']}-d, "
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
    return [*lines, f"cache: {report['cache']}", f"next: train-head {shlex.quote(report['cache'])}"]

"""`extract-features` as one of several processes: agree on a plan, compute a part, finish together.

Nothing is sent between ranks. They meet in files: a plan that the first one writes, and either one
cache that all write in place, or a shard each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, final

from featcache.backbone import OwnNetwork
from featcache.cache import (
    MARKS,
    HeldError,
    begin_cost,
    finish_cost,
    part_path,
    sole_writer,
    spent_on,
    waiting_writer,
)
from featcache.cache.parallel import (
    MERGING,
    Job,
    Plan,
    Share,
    Write,
    join_shards,
    join_writers,
    merge_if_last,
    num_in_shards,
    open_shard,
    remove_shards,
    shared_disk,
)
from featcache.config import ExtractConfig
from featcache.display import progress, say
from featcache.errors import FeatcacheError, UserError
from featcache.extract.blocks import (
    ExtractionRun,
    choose_engine_for,
    compute_blocks,
    warn_if_decoding_is_slow,
)
from featcache.extract.extraction import (
    ExtractReport,
    cost_record,
    extract,
    extract_report,
    split_rows,
    summary_lines,
)
from featcache.extract.request import EarlierRows, Request, check_skipped, find_hit
from featcache.files import check_outputs
from featcache.ranks import Rank, current_rank, without_srun
from featcache.runtime import num_cores, torch_threads_kept, use_local_gpu

PROGRESS_S, PROGRESS_COST = 1.0, 100.0
"""The bar is drawn anew after this long, and after this many times what that took."""


@final
class RankReport(TypedDict):
    """What `extract-features --json` prints of a rank that leaves the cache to others.

    `num_images` were computed here; `next` says what has to happen.
    """

    command: str
    cache: str
    rank: int
    num_ranks: int
    num_images: int
    next: str
    seconds_total: float


class _Part:
    """A rank's part; `plan` is complete once the engine is chosen."""

    def __init__(self, request: Request, rank: Rank, write: Write, run: ExtractionRun) -> None:
        self.request, self.rank, self.run = request, rank, run
        self.earlier = EarlierRows.find(request.config, request.path)
        by = f"{rank} (process {os.getpid()} on {socket.gethostname()})"
        num_rows = {name: len(split) for name, split in request.dataset.splits.items()}
        self.plan = Plan(request.meta, num_rows, write, by)
        self.seconds: float | None = None
        """What the features took, earlier runs included; None if not known."""

    @property
    def job(self) -> Job:
        """The same for those who write files."""
        dataset, share = self.request.dataset, Share(self.rank.index, self.rank.size)
        rows = [split_rows(split) for split in dataset.splits.values()]
        return Job(self.request.path, self.plan.meta, dataset.class_names, rows, share)


def extract_part(
    config: ExtractConfig, own: OwnNetwork | None = None
) -> ExtractReport | RankReport:
    """Cache the features of a dataset, as one of several processes if a launcher says so.

    Args:
        config: The command's settings.
        own: The network, unless the settings name it.

    Returns:
        The command's JSON report; a `RankReport` where other ranks have to go on.

    Raises:
        FeatcacheError: As `extract`; the message names the rank, and the block where there is one.
    """
    rank = current_rank(config.shard)
    if rank.alone:
        if config.shard is None and (note := without_srun()):
            say(note)
        return extract(config, own=own)
    try:
        return _extract_as(rank, config, own)
    except FeatcacheError as error:
        where = ", ".join([str(rank), *getattr(error, "__notes__", ())])
        raise type(error)(f"{where}: {error}") from error


def part_lines(report: ExtractReport | RankReport) -> list[str]:
    """The report for people."""
    if "rank" not in report:
        return summary_lines(report)
    done = f"computed {report['num_images']:,} images in {report['seconds_total']:.1f} s"
    if not report["num_images"]:
        done = "has no work: no blocks were left for it"
    return [f"rank {report['rank']} of {report['num_ranks']} {done}; {report['next']}"]


def _extract_as(
    rank: Rank, config: ExtractConfig, own: OwnNetwork | None
) -> ExtractReport | RankReport:
    if config.force or config.update:
        raise UserError(
            "--force and --update are for one process: give --shard 0/1, or leave them out and "
            "remove the cache first"
        )
    if config.workers is None and rank.local_size > 1:
        workers = max(1, num_cores() // rank.local_size)
        config = dataclasses.replace(config, workers=workers)
    run = ExtractionRun(on_error=config.on_error)
    request = _index(config, own)
    for note in request.dataset.notes if rank.index == 0 else ():
        say(note)
    if found := find_hit(request):
        check_skipped(config, found, "--update")
        if rank.index == 0:
            remove_shards(found)  # a rank may have died just before it did
            return extract_report(found, request.dataset, run)
        return _rank_report(request._replace(path=found), rank, run, "the cache is finished")
    path = request.path
    check_outputs({path: MARKS, part_path(path): MARKS}, [config.weights, config.dataset])
    check_skipped(config, part_path(path), "--force")
    kind = shared_disk(path.parent) if config.write == "auto" else None
    write: Write = "shards" if kind or config.write == "shards" else "direct"
    if rank.index == 0:
        reason = f", because {kind} is a disk of several machines" if kind else ""
        say(f"{rank} ({rank.source}), --write {write}{reason}")
    part = _Part(request, rank, write, run)
    with torch_threads_kept():
        _agree(part)
        following = (_write_direct if write == "direct" else _write_shard)(part)
    if rank.index == 0:
        warn_if_decoding_is_slow(run)
    if following is not None:
        return _rank_report(request, rank, run, following)
    report = extract_report(path, request.dataset, run)
    report["num_ranks"] = rank.size
    cost = cost_record(config, report, None)
    finish_cost(path, part_path(path), {**cost, "seconds_total": part.seconds})
    return report


def _index(config: ExtractConfig, own: OwnNetwork | None) -> Request:
    """Look up images and weights: one rank downloads and hashes, the others find that done."""
    place = config.cache_dir / "index"
    with contextlib.ExitStack() as first:
        try:
            first.enter_context(sole_writer(place))
        except HeldError:
            with waiting_writer(place):
                pass
        return Request.of(config, None, own)


def _agree(part: _Part) -> None:
    """Choose the engine that every rank uses, and check that this rank has the same settings.

    Raises:
        CacheError: Another rank, named, has other settings, named.
    """
    request, path = part.request, part.request.path
    if request.config.device != "cpu":
        use_local_gpu(part.rank.local_index)
    network = request.load_network()
    num = part.earlier.num_missing(request.dataset) * request.meta.views.num // part.rank.size

    def choose(resumed: str | None) -> None:
        meta = choose_engine_for(part.run, request, network, num, resumed)
        part.plan = dataclasses.replace(part.plan, meta=meta)

    begun = Plan.read(path)
    choose(begun.meta.engine if begun else part.earlier.engine)
    plan = part.plan.agree(path)
    if plan.meta.engine != part.plan.meta.engine:
        choose(plan.meta.engine)  # both chose at once
    plan.check_same(path, part.plan)


def _write_direct(part: _Part) -> str | None:
    """Compute blocks of the one file; returns what others have to do, None if it is finished."""
    path, run, splits = part.request.path, part.run, part.request.dataset.splits
    writer = join_writers(part.job, helps=part.rank.source != "--shard")
    if writer is None:
        return "the cache is finished"
    with writer:
        if writer.is_first:
            begin_cost(part_path(path), part.earlier.seconds, time.perf_counter() - run.start)
        with _bar(part, writer.num_written) as bar:
            for others in writer.turns():
                for name, split in splits.items():
                    compute_blocks(run, writer, split, writer.take(name, others=others), bar)
        part.seconds = spent_on(part_path(path))
        with run.timer("finish"):
            finished = writer.leave()
        left = 0 if finished else len(writer.missing())
    if finished:
        remove_shards(path)
        return None
    if left:
        return f"{left:,} blocks are left to other ranks, or to the same command once more"
    return "another rank finishes the cache"


def _write_shard(part: _Part) -> str | None:
    """Compute this rank's shard, as `_write_direct` does its blocks; the last rank merges."""
    job, run = part.job, part.run
    lock = join_shards(job)
    if lock is None:
        return MERGING
    writer = open_shard(job)
    if writer is not None:
        with writer, _bar(part, lambda: num_in_shards(job.path)) as bar:
            for name in writer.layout.splits:
                split = part.request.dataset.splits[name]
                compute_blocks(run, writer, split, writer.pending(name), bar)
            with run.timer("finish"):
                writer.finish()
    with run.timer("finish"):
        return merge_if_last(job, lock)


@contextlib.contextmanager
def _bar(part: _Part, count: Callable[[], int]) -> Iterator[Any]:
    """A progress bar: rank 0's shows the rows that all ranks have written, others' nothing."""
    if part.rank.index:
        with progress(None, disable=True) as bar:
            yield bar
    else:
        with progress(sum(part.plan.num_rows.values()), "all ranks", initial=count()) as bar:
            yield _CommonBar(bar, count)


class _CommonBar:
    """Stands for a progress bar, but shows what all ranks have done."""

    def __init__(self, bar: Any, count: Callable[[], int]) -> None:
        self._bar, self._count, self._next = bar, count, 0.0
        self.set_postfix_str = bar.set_postfix_str

    def update(self, _: int) -> None:
        if (now := time.monotonic()) >= self._next:
            self._bar.update(self._count() - self._bar.n)
            # Looking into many shards takes a while, which the network waits for.
            self._next = now + max(PROGRESS_S, PROGRESS_COST * (time.monotonic() - now))


def _rank_report(request: Request, rank: Rank, run: ExtractionRun, following: str) -> RankReport:
    return {
        "command": "extract-features",
        "cache": str(request.path),
        "rank": rank.index,
        "num_ranks": rank.size,
        "num_images": sum(s.num_samples - s.num_resumed for s in run.splits.values()),
        "next": following,
        "seconds_total": time.perf_counter() - run.start,
    }

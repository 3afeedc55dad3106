"""`extract-features` as one of several processes: agree on a plan, compute a part, finish together.

Nothing is sent between ranks. They meet in files: a plan that the first one writes, and either one
cache that all write in place, or a shard each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, final

from featcache.backbone import OwnNetwork
from featcache.cache import (
    BLOCK_ROWS,
    MARKS,
    CacheWriter,
    SplitRows,
    begin_cost,
    finish_cost,
    part_path,
    spent_on,
)
from featcache.cache.parallel import (
    Plan,
    Share,
    Write,
    join,
    join_writers,
    merge_if_last,
    num_in_shards,
    open_shard,
    remove_shards,
    shared_disk,
)
from featcache.config import CacheMeta, ExtractConfig
from featcache.errors import FeatcacheError, UserError
from featcache.extract.blocks import ExtractionRun, SplitProgress, choose_engine_for, compute_blocks
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
from featcache.runtime import (
    environment,
    num_cores,
    progress,
    say,
    torch_threads_kept,
    use_local_gpu,
)

PROGRESS_S = 1.0


@final
class RankReport(TypedDict):
    """What `extract-features --json` prints of a rank that leaves the cache to others.

    `num_images` and `num_blocks` are those computed here. With `finished`, another rank was faster.
    """

    command: str
    cache: str
    finished: bool
    rank: int
    num_ranks: int
    launcher: str
    write: Write
    num_images: int
    num_blocks: int
    next: str
    stage_seconds: dict[str, float]
    seconds_total: float
    environment: dict[str, str | int]


@dataclasses.dataclass
class _Part:
    """A rank's part of the job."""

    request: Request
    rank: Rank
    run: ExtractionRun
    write: Write = "direct"
    earlier: EarlierRows | None = None
    num_images: int = 0
    num_blocks: int = 0
    seconds: float | None = None
    """What the cache's features took in all; None if not known."""

    @property
    def share(self) -> Share:
        return Share(self.rank.index, self.rank.size)

    @property
    def num_rows(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.request.dataset.splits.items()}

    def contents(
        self, meta: CacheMeta
    ) -> tuple[Path, CacheMeta, Sequence[str], Sequence[SplitRows]]:
        """What a writer is opened with."""
        dataset = self.request.dataset
        rows = [split_rows(split) for split in dataset.splits.values()]
        return self.request.path, meta, dataset.class_names, rows


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
    seconds = report["seconds_total"]
    done = f"computed {report['num_images']:,} images in {seconds:.1f} s"
    if not report["num_blocks"]:
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
    request = Request.of(config, None, own)
    path = request.path
    for note in request.dataset.notes if rank.index == 0 else ():
        say(note)
    if found := find_hit(request):
        check_skipped(config, found, "--update")
        if rank.index == 0:
            return extract_report(found, request.dataset, run)
        request = request._replace(path=found)
        return _rank_report(_Part(request, rank, run), "the cache is finished")
    check_outputs({path: MARKS, part_path(path): MARKS}, [config.weights, config.dataset])
    check_skipped(config, part_path(path), "--force")
    kind = shared_disk(path.parent) if config.write == "auto" else None
    write: Write = "shards" if kind or config.write == "shards" else "direct"
    if rank.index == 0:
        reason = f", because {kind} is a disk of several machines" if kind else ""
        say(f"{rank} ({rank.source}), --write {write}{reason}")
    part = _Part(request, rank, run, write, EarlierRows.find(config, path))
    with torch_threads_kept():
        if config.device != "cpu":
            use_local_gpu(rank.local_index)
        meta = _agree(part)
        following = (_write_direct if write == "direct" else _write_shard)(part, meta)
    if following is not None:
        return _rank_report(part, following)
    report = extract_report(path, request.dataset, run)
    report["num_ranks"] = rank.size
    cost = cost_record(config, report, None)
    finish_cost(path, part_path(path), {**cost, "seconds_total": part.seconds})
    return report


def _agree(part: _Part) -> CacheMeta:
    """Choose the engine that every rank uses, and check that this rank has the same settings.

    Raises:
        CacheError: Another rank, named, has other settings, named.
    """
    request, rank, config = part.request, part.rank, part.request.config
    assert part.earlier is not None
    network = request.load_network()
    num_images = part.earlier.num_missing(request.dataset) * request.meta.views.num // rank.size
    plan = Plan.read(request.path)
    resumed = plan.meta.engine if plan else part.earlier.engine
    meta = choose_engine_for(part.run, request, network, num_images, resumed)
    by = f"{rank} (process {os.getpid()} on {socket.gethostname()})"
    mine = Plan(meta, part.num_rows, part.write, by)
    plan = mine.agree(request.path)
    if plan.meta.engine != meta.engine and config.engine == "auto":  # both chose at once
        meta = choose_engine_for(part.run, request, network, num_images, plan.meta.engine)
        mine = dataclasses.replace(mine, meta=meta)
    plan.check_same(request.path, mine)
    return meta


def _write_direct(part: _Part, meta: CacheMeta) -> str | None:
    """Compute blocks of the one file; returns what others have to do, None if it is finished."""
    path, run = part.request.path, part.run
    assert part.earlier is not None
    helps = part.rank.source != "--shard"
    writer = join_writers(*part.contents(meta), part.share, helps=helps)
    if writer is None:
        return "the cache is finished"
    with writer:
        if writer.is_first:
            begin_cost(part_path(path), part.earlier.seconds, time.perf_counter() - run.start)
        with _bar(part, writer.num_written) as bar:
            for others in writer.turns():
                _compute(part, writer, bar, functools.partial(writer.take, others=others), {})
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


def _write_shard(part: _Part, meta: CacheMeta) -> str | None:
    """Compute this rank's shard, as `_write_direct` does its blocks; the last rank merges."""
    path, contents = part.request.path, part.contents(meta)
    job = join(path, str(part.rank))  # keeps out runs that are no ranks
    job.share()
    writer = open_shard(*contents, part.share)
    if writer is not None:
        with writer, _bar(part, lambda: num_in_shards(path)) as bar:
            first = {
                name: b.start * BLOCK_ROWS for name, b in part.share.blocks(part.num_rows).items()
            }
            _compute(part, writer, bar, writer.pending, first)
            with part.run.timer("finish"):
                writer.finish()
    with part.run.timer("finish"):
        return merge_if_last(job, *contents, part.share)


def _compute(
    part: _Part,
    writer: CacheWriter,
    bar: Any,
    take: Callable[[str], Iterable[range]],
    first: Mapping[str, int],
) -> None:
    """Compute the blocks that `take` gives of each split, and count them.

    `first` says which row of a split is the writer's first; 0 for others.
    """

    def counted(blocks: Iterable[range]) -> Iterator[range]:
        for rows in blocks:
            part.num_blocks += 1
            yield rows

    for split in part.request.dataset.splits.values():
        if split.name not in writer.layout.splits:
            continue
        start = time.perf_counter()
        blocks = counted(take(split.name))
        num = compute_blocks(part.run, writer, split, blocks, bar, first.get(split.name, 0))
        part.num_images += num
        done = part.run.splits.setdefault(
            split.name, SplitProgress(num_samples=len(split), num_resumed=len(split))
        )
        done.num_resumed -= num
        done.seconds += time.perf_counter() - start


@contextlib.contextmanager
def _bar(part: _Part, count: Callable[[], int]) -> Iterator[Any]:
    """A progress bar: rank 0's shows the rows that all ranks have written, others' nothing."""
    if part.rank.index:
        with progress(None, disable=True) as bar:
            yield bar
    else:
        with progress(sum(part.num_rows.values()), "all ranks", initial=count()) as bar:
            yield _CommonBar(bar, count)


class _CommonBar:
    """Stands for a progress bar, but shows what all ranks have done."""

    def __init__(self, bar: Any, count: Callable[[], int]) -> None:
        self._bar, self._count, self._next = bar, count, 0.0
        self.set_postfix_str = bar.set_postfix_str

    def update(self, _: int) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + PROGRESS_S
            self._bar.update(self._count() - self._bar.n)


def _rank_report(part: _Part, following: str) -> RankReport:
    return {
        "command": "extract-features",
        "cache": str(part.request.path),
        "finished": part.request.path.exists(),
        "rank": part.rank.index,
        "num_ranks": part.rank.size,
        "launcher": part.rank.source,
        "write": part.write,
        "num_images": part.num_images,
        "num_blocks": part.num_blocks,
        "next": following,
        "stage_seconds": dict(part.run.timer.seconds),
        "seconds_total": time.perf_counter() - part.run.start,
        "environment": environment(),
    }

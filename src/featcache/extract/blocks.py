"""Computing blocks of a cache: the engine of a run, and what it did."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from featcache.cache import BLOCK_ROWS, CacheWriter
from featcache.config import CacheMeta
from featcache.data import BadImage, ImageSplit, bad_image_error
from featcache.display import progress, say
from featcache.errors import FeatcacheError
from featcache.extract.request import Request
from featcache.runtime import StageTimer, num_cores

if TYPE_CHECKING:
    from torch import nn

    from featcache.engine import Engine

OnError = Literal["fail", "skip"]


class SplitReport(TypedDict):
    """One split in the report; `images_per_s` is null where nothing was computed."""

    num_samples: int
    num_resumed: int
    num_skipped: int
    seconds: float
    images_per_s: float | None


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
    """What this run of the command did; no engine where the cache was there already.

    `on_error` says whether an unreadable image ends the run or is skipped.
    """

    on_error: OnError = "fail"
    start: float = dataclasses.field(default_factory=time.perf_counter)
    timer: StageTimer = dataclasses.field(default_factory=StageTimer)
    engine: Engine | None = None
    splits: dict[str, SplitProgress] = dataclasses.field(default_factory=dict)


def choose_engine_for(
    run: ExtractionRun, request: Request, network: nn.Module, num_images: int, resumed: str | None
) -> CacheMeta:
    """Choose the run's engine; returns the metadata that names it.

    Args:
        run: Gets the engine.
        request: What is asked for.
        network: The frozen network.
        num_images: Forward passes ahead.
        resumed: The engine that made the rows there already.
    """
    from featcache.engine import EngineSettings, choose_engine

    with run.timer("choose_engine"):
        run.engine = choose_engine(
            EngineSettings.of(request.config),
            network,
            request.meta.backbone.preprocessing,
            num_images=num_images,
            train=request.dataset.splits.get("train"),
            resumed=resumed,
        )
    if request.config.verbose:
        say(f"engine: {run.engine.sentence()}")
    return dataclasses.replace(request.meta, engine=run.engine.recorded)


def fill_split(
    run: ExtractionRun,
    writer: CacheWriter,
    split: ImageSplit,
) -> None:
    """Compute the pending blocks of one split with the run's engine.

    Raises:
        UserError: An image cannot be read and the run may not skip it.
    """
    blocks = writer.pending(split.name)
    num = sum(int(np.count_nonzero(~writer.is_reused(split.name, rows))) for rows in blocks)
    with progress(num, split.name) as bar:
        compute_blocks(run, writer, split, blocks, bar)


def compute_blocks(
    run: ExtractionRun,
    writer: CacheWriter,
    split: ImageSplit,
    blocks: Iterable[range],
    bar: Any,
) -> None:
    """Compute blocks of one split with the run's engine, except for rows that can be reused.

    Args:
        run: Has the engine; counts images and seconds.
        writer: Where they go.
        split: The images.
        blocks: Row ranges of the blocks; drawn a little ahead of the network.
        bar: A progress bar; it counts images.

    Raises:
        UserError: An image cannot be read and the run may not skip it.
    """
    from featcache.engine.inference import computed_rows

    assert run.engine is not None
    start, first = time.perf_counter(), writer.first_rows.get(split.name, 0)
    prep, views = writer.spec.meta.backbone.preprocessing, writer.spec.meta.views
    ahead, due = itertools.tee(blocks)
    missing = (
        first + r[i] for r in ahead for i in np.flatnonzero(~writer.is_reused(split.name, r))
    )
    stream = computed_rows(run.engine, split, missing, prep, views, run.timer)
    so_far = SplitProgress(num_samples=len(split), num_resumed=len(split))
    done = run.splits.setdefault(split.name, so_far)
    with contextlib.closing(stream):
        for rows in due:
            try:
                done.num_resumed -= _compute_block(run, writer, split, rows, stream, bar)
            except FeatcacheError as error:
                error.add_note(f"block {split.name}/{(first + rows.start) // BLOCK_ROWS}")
                raise
    done.seconds += time.perf_counter() - start


def _compute_block(
    run: ExtractionRun,
    writer: CacheWriter,
    split: ImageSplit,
    rows: range,
    stream: Iterator[tuple[int, Any]],
    bar: Any,
) -> int:
    reused, features = writer.reused_rows(split.name, rows)
    status = np.zeros(len(rows), np.uint8)
    for place in np.flatnonzero(~reused):
        index, row = next(stream)
        if isinstance(row, BadImage):
            status[place] = _skip(split, index, row, run.on_error)
        else:
            features[:, place] = row
    with run.timer("write"):
        writer.write_block(split.name, rows, features, status)
    num = int(np.count_nonzero(~reused))
    bar.set_postfix_str(_network_share(run.timer), refresh=False)
    bar.update(num)
    return num


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


def warn_if_decoding_is_slow(run: ExtractionRun) -> None:
    """On a GPU, say how many workers would keep it busy."""
    from featcache.engine.inference import decode_shortfall

    if run.engine is not None and run.engine.device != "cpu":
        note = decode_shortfall(run.timer.seconds, run.engine.workers, num_cores())
        if note is not None:
            say(note)

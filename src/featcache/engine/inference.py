"""Rows of features in order, computed by threads ahead of their use."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import CacheMeta, ExtractConfig, Preprocessing, Views
from featcache.data import BadImage, Decoded, ImageSplit, bad_image_error, chunks, pixel_task
from featcache.data import run_ahead as ahead_of
from featcache.runtime import StageTimer, num_cores, say

if TYPE_CHECKING:
    from featcache.engine import Engine

Features = NDArray[np.float32]
# Decoding threads on a GPU machine take few images each, so that the first batch comes soon.
DECODE_CHUNK = 8
CHUNKS_AHEAD = 3
# Batches begun on a GPU and not fetched yet, while the next one is being put together.
GROUPS_IN_FLIGHT = 2


@dataclass
class Computed:
    """One chunk: what was decoded, and float32 [V, n, D] of the n images that could be."""

    decoded: Decoded
    features: Features
    network_s: float


def computed_rows(
    config: ExtractConfig,
    split: ImageSplit,
    indices: Sequence[int],
    meta: CacheMeta,
    engine: Engine,
    timer: StageTimer,
) -> Generator[tuple[int, Features], None, None]:
    """Read, decode, and run the network over rows of a split, in the order given.

    Args:
        config: What an unreadable picture does.
        split: The images.
        indices: Rows to compute.
        meta: Preprocessing and views.
        engine: Runs the network; on a CPU inside the threads that decode.
        timer: Gets seconds by stage; all but "wait" are summed over threads.

    Yields:
        The row's status code (0 good) and its features [V, D], zeros where it was skipped.

    Raises:
        UserError: A picture cannot be read and `on_error` is "fail".
    """
    prep, views = meta.backbone.preprocessing, meta.views
    ours = engine.threads if engine.device == "cpu" else num_cores()
    workers = ours if config.workers is None else config.workers
    empty = np.zeros((meta.views.num, meta.backbone.feature_dim), np.float32)
    for done in computed_chunks(split, indices, prep, views, engine, workers, timer):
        good = iter(np.moveaxis(done.features, 1, 0))
        for index, pixels in zip(done.decoded.indices, done.decoded.pixels, strict=True):
            if isinstance(pixels, BadImage):
                yield _skip(config, split, index, pixels), empty
            else:
                yield 0, next(good)


def computed_chunks(
    split: ImageSplit,
    indices: Iterable[int],
    prep: Preprocessing,
    views: Views,
    engine: Engine,
    workers: int,
    timer: StageTimer,
) -> Generator[Computed, None, None]:
    """Read, decode, and run the network over rows of a split, a chunk at a time.

    Args:
        split: The images.
        indices: Rows to compute, in this order.
        prep: How a picture becomes the network's input.
        views: Which versions of each picture.
        engine: Runs the network; on a CPU inside the threads that decode.
        workers: Threads; 0 works in the calling thread.
        timer: Gets seconds by stage; all but "wait" are summed over threads.
    """
    decode = pixel_task(split, prep, views)
    per_chunk = max(1, engine.batch_size // views.num)
    computed: Iterator[Computed]
    if engine.device == "cpu":

        def compute(chunk: Sequence[int], stop: threading.Event) -> Computed:
            return _network(engine, decode(chunk, stop), stop)

        computed = ahead_of(
            compute, chunks(indices, per_chunk), workers, CHUNKS_AHEAD * max(workers, 1), timer
        )
    else:
        look_ahead = 2 * per_chunk // DECODE_CHUNK + 2 * workers
        decoded = ahead_of(decode, chunks(indices, DECODE_CHUNK), workers, look_ahead, timer)
        computed = _on_device(engine, _grouped(decoded, per_chunk))
    for done in computed:
        done.decoded.add_to(timer)
        timer.seconds["network"] += done.network_s
        yield done


def _network(engine: Engine, decoded: Decoded, stop: threading.Event) -> Computed:
    """Run the network over the pictures of a chunk that could be read."""
    start = time.perf_counter()
    batches = [] if stop.is_set() else _batches(engine, decoded)
    features = _joined(decoded, [engine.run(batch) for batch in batches])
    return Computed(decoded, features, time.perf_counter() - start if batches else 0.0)


def _on_device(engine: Engine, groups: Iterable[Decoded]) -> Iterator[Computed]:
    """Run the network on a GPU, with the next group begun before the last one is fetched."""
    assert engine.start is not None
    waiting: deque[tuple[Decoded, list[Callable[[], tuple[Features, float]]]]] = deque()

    def fetch() -> Computed:
        decoded, begun = waiting.popleft()
        done = [finish() for finish in begun]
        return Computed(decoded, _joined(decoded, [f for f, _ in done]), sum(s for _, s in done))

    for group in groups:
        waiting.append((group, [engine.start(batch) for batch in _batches(engine, group)]))
        if len(waiting) > GROUPS_IN_FLIGHT:
            yield fetch()
    while waiting:
        yield fetch()


def _batches(engine: Engine, decoded: Decoded) -> list[Any]:
    """The pictures that could be read, all views, as the network takes them."""
    images: list[Any] = [p for p in decoded.pixels if not isinstance(p, BadImage)]
    if not images:
        return []
    stacked = np.stack(images, axis=1)  # [V, n, H, W, 3]
    flat = stacked.reshape(-1, *stacked.shape[2:])
    return [flat[i : i + engine.batch_size] for i in range(0, len(flat), engine.batch_size)]


def _joined(decoded: Decoded, parts: list[Features]) -> Features:
    """Features [V, n, D] of a chunk, whose rows then wait without their pixels."""
    if not parts:
        return np.empty((0, 0, 0), np.float32)
    views = 0
    for place, pixels in enumerate(decoded.pixels):
        if not isinstance(pixels, BadImage):
            views = len(pixels)
            decoded.pixels[place] = pixels[:0].copy()  # a view would keep the whole picture
    flat = np.concatenate(parts)
    return flat.reshape(views, -1, flat.shape[1])


def decode_shortfall(seconds: Mapping[str, float], workers: int, cores: int) -> str | None:
    """What to say where decoding keeps a GPU waiting; None where it keeps up.

    Args:
        seconds: By stage: read, decode and resize summed over threads, and the device's network.
        workers: Threads that decode.
        cores: Processors there are.
    """
    pixels = sum(seconds.get(stage, 0.0) for stage in ("read", "decode", "resize"))
    network = seconds.get("network", 0.0)
    needed = math.ceil(pixels / network) if network > 0 else 0
    if needed <= workers:
        return None
    idle = 1 - network * workers / pixels
    return (
        f"decoding keeps the GPU waiting {idle:.0%} of the time: {needed} workers would keep up, "
        f"{workers} are at work and this machine has {cores} cores; "
        "give --workers, smaller pictures, or a machine with more cores"
    )


def _grouped(stream: Iterable[Decoded], num: int) -> Iterator[Decoded]:
    """Join chunks until they hold `num` rows."""
    group = Decoded([])
    for part in stream:
        group = Decoded(
            [*group.indices, *part.indices],
            group.pixels + part.pixels,
            group.read_s + part.read_s,
            group.decode_s + part.decode_s,
            group.resize_s + part.resize_s,
        )
        if len(group.indices) >= num:
            yield group
            group = Decoded([])
    if group.indices:
        yield group


def _skip(config: ExtractConfig, split: ImageSplit, index: int, bad: BadImage) -> int:
    """The status code of an unreadable picture, or the end of the run."""
    if config.on_error == "fail":
        raise bad_image_error(split, index, bad)
    say(f"skipped {split.ids[index]}: {bad.reason}")
    return bad.code

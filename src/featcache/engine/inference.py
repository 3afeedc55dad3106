"""Inference over a split: features in order, computed by threads ahead of their use."""

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

from featcache.config import Preprocessing, Views
from featcache.data import BadImage, Decoded, ImageSplit, chunks, pixel_task, run_ahead
from featcache.runtime import StageTimer

if TYPE_CHECKING:
    from featcache.engine import Engine

Features = NDArray[np.float32]
# Decoding threads on a GPU machine take few images each, so that the first batch comes soon.
DECODE_CHUNK = 8
CHUNKS_AHEAD = 3
# Batches started on a GPU and not fetched yet, while the next one is being assembled.
GROUPS_IN_FLIGHT = 2


@dataclass
class Computed:
    """One chunk: what was decoded, and float32 [V, n, D] of the n images that could be."""

    decoded: Decoded
    features: Features
    network_s: float


def computed_rows(
    engine: Engine,
    split: ImageSplit,
    indices: Iterable[int],
    prep: Preprocessing,
    views: Views,
    timer: StageTimer,
) -> Generator[tuple[int, Features | BadImage], None, None]:
    """Read and decode rows of a split and run the network over them, in the order given.

    Args:
        engine: Runs the network; on a CPU inside the threads that decode.
        split: The images.
        indices: Rows to compute.
        prep: How an image becomes the network's input.
        views: Which versions of each image.
        timer: Gets seconds by stage; all but "wait" are summed over threads.

    Yields:
        The row, and its features [V, D] or the reason why the image cannot be read.
    """
    decode, workers = pixel_task(split, prep, views), engine.workers
    per_chunk = max(1, engine.batch_size // views.num)

    def compute(chunk: Sequence[int], stop: threading.Event) -> Computed:
        return _network(engine, decode(chunk, stop), stop)

    if engine.device == "cpu":
        look_ahead = CHUNKS_AHEAD * max(workers, 1)
        computed = run_ahead(compute, chunks(indices, per_chunk), workers, look_ahead, timer)
    else:
        look_ahead = 2 * per_chunk // DECODE_CHUNK + 2 * workers
        decoded = run_ahead(decode, chunks(indices, DECODE_CHUNK), workers, look_ahead, timer)
        computed = _on_device(engine, _grouped(decoded, per_chunk))
    for done in computed:
        done.decoded.add_to(timer)
        timer.seconds["network"] += done.network_s
        good = iter(np.moveaxis(done.features, 1, 0))
        for index, pixels in zip(done.decoded.indices, done.decoded.pixels, strict=True):
            yield index, pixels if isinstance(pixels, BadImage) else next(good)


def _network(engine: Engine, decoded: Decoded, stop: threading.Event) -> Computed:
    """Run the network over the readable images of a chunk."""
    start = time.perf_counter()
    batches = [] if stop.is_set() else _batches(engine, decoded)
    features = _joined(decoded, [engine.run(batch) for batch in batches])
    return Computed(decoded, features, time.perf_counter() - start if batches else 0.0)


def _on_device(engine: Engine, groups: Iterable[Decoded]) -> Iterator[Computed]:
    """Run the network on a GPU, starting the next group before the last one is fetched."""
    assert engine.start is not None
    waiting: deque[tuple[Decoded, list[Callable[[], tuple[Features, float]]]]] = deque()

    def fetch() -> Computed:
        decoded, started = waiting.popleft()
        done = [finish() for finish in started]
        return Computed(decoded, _joined(decoded, [f for f, _ in done]), sum(s for _, s in done))

    for group in groups:
        waiting.append((group, [engine.start(batch) for batch in _batches(engine, group)]))
        if len(waiting) > GROUPS_IN_FLIGHT:
            yield fetch()
    while waiting:
        yield fetch()


def _batches(engine: Engine, decoded: Decoded) -> list[Any]:
    """Batches uint8 [n, H, W, 3] of the readable images, all views."""
    images: list[Any] = [p for p in decoded.pixels if not isinstance(p, BadImage)]
    if not images:
        return []
    stacked = np.stack(images, axis=1)  # [V, n, H, W, 3]
    flat = stacked.reshape(-1, *stacked.shape[2:])
    return [flat[i : i + engine.batch_size] for i in range(0, len(flat), engine.batch_size)]


def _joined(decoded: Decoded, parts: list[Features]) -> Features:
    """Features [V, n, D] of a chunk; drops its pixels, since rows may wait long to be taken."""
    if not parts:
        return np.empty((0, 0, 0), np.float32)
    views = 0
    for place, pixels in enumerate(decoded.pixels):
        if not isinstance(pixels, BadImage):
            views = len(pixels)
            decoded.pixels[place] = pixels[:0].copy()  # a view would keep the whole image
    flat = np.concatenate(parts)
    return flat.reshape(views, -1, flat.shape[1])


def decode_shortfall(seconds: Mapping[str, float], workers: int, cores: int) -> str | None:
    """The message where decoding keeps a GPU waiting; None where it keeps up.

    Args:
        seconds: By stage: read, decode and resize summed over threads, and the device's network.
        workers: Threads that decode.
        cores: Cores of this machine.
    """
    pixels = sum(seconds.get(stage, 0.0) for stage in ("read", "decode", "resize"))
    network = seconds.get("network", 0.0)
    needed = math.ceil(pixels / network) if network > 0 else 0
    if needed <= workers:
        return None
    idle = 1 - network * workers / pixels
    return (
        f"decoding keeps the GPU waiting {idle:.0%} of the time: {needed} workers would keep up, "
        f"{workers} are running and this machine has {cores} cores; "
        "give --workers, smaller images, or use a machine with more cores"
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

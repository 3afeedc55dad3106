"""From splits to pixels: threads decode ahead of use, one image at a time or in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.config import Preprocessing, Views
from featcache.data.dataset import ImageSplit
from featcache.data.images import BadImage
from featcache.data.pixels import least_px, view_pixels
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import StageTimer

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Pixels = UInt8 | BadImage
OnBad = Callable[[int, BadImage], None]

CHUNK = 8
"""Images per task, since a future costs as much as decoding a thumbnail."""
PREFETCH_BYTES = 64 * 2**20
PREFETCH_IMAGES = 256
DECODED_BYTES = 1_500_000_000


@dataclass
class Decoded:
    """The result of one task.

    Attributes:
        indices: Rows of the split.
        pixels: For each row uint8 [V, H, W, 3], or why there are none.
        read_s: Wall seconds spent reading files.
        decode_s: Processor seconds spent decoding.
        resize_s: Processor seconds spent on resizing and views.
    """

    indices: Sequence[int]
    pixels: list[Pixels] = field(default_factory=list)
    read_s: float = 0.0
    decode_s: float = 0.0
    resize_s: float = 0.0

    def add_to(self, timer: StageTimer) -> None:
        """Add the seconds to a timer; summed over threads, they can exceed the wall clock."""
        timer.seconds["read"] += self.read_s
        timer.seconds["decode"] += self.decode_s
        timer.seconds["resize"] += self.resize_s


def pixel_task(
    split: ImageSplit, prep: Preprocessing, views: Views
) -> Callable[[Sequence[int], threading.Event], Decoded]:
    """Make the task that reads, decodes and resizes a few rows of a split, for `run_ahead`.

    The random choices of a view depend on the image's content, not on its row: the same image has
    the same views in every dataset.
    """
    # Hash once and up front, or the tasks of all threads would wait for it.
    keys = split.content[:, :8].copy().view(">u8")[:, 0] if views.kind == "random" else None

    def task(chunk: Sequence[int], stop: threading.Event) -> Decoded:
        done = Decoded(chunk)
        for index in chunk:
            if stop.is_set():
                break
            key = 0 if keys is None else int(keys[index])
            done.pixels.append(_one(split, index, done, prep=prep, views=views, key=key))
        return done

    return task


def iterate_pixels(
    split: ImageSplit,
    indices: Iterable[int],
    prep: Preprocessing,
    views: Views | None = None,
    *,
    workers: int,
    prefetch: int | None = None,
) -> Generator[tuple[int, Pixels], None, None]:
    """Decode and resize rows of a split, in the order given, none left out.

    Args:
        split: The images.
        indices: Rows.
        prep: Resize and crop.
        views: Which versions of each image; by default only the plain one.
        workers: Threads; 0 decodes in the calling thread.
        prefetch: How many images to decode ahead; by default chosen by their size.

    Yields:
        The row and uint8 [V, H, W, 3], or the row and the BadImage that says why there is none.
    """
    views = views or Views()
    task = pixel_task(split, prep, views)
    each = prep.image_px**2 * 3 * views.num
    ahead = prefetch or max(1, min(PREFETCH_IMAGES, PREFETCH_BYTES // each))
    chunk = max(1, min(CHUNK, ahead // max(1, 2 * workers)))
    for done in run_ahead(task, chunks(indices, chunk), workers, max(1, ahead // chunk)):
        yield from zip(done.indices, done.pixels, strict=True)


def _one(
    split: ImageSplit, index: int, done: Decoded, *, prep: Preprocessing, views: Views, key: int
) -> Pixels:
    start = time.perf_counter()
    try:
        raw = split.read(index)
        done.read_s += time.perf_counter() - start
        begun = time.thread_time()
        with split.decoded(raw, least_px(prep, views)) as image:
            decoded = time.thread_time()
            done.decode_s += decoded - begun
            pixels = view_pixels(image, prep, views, key)
            done.resize_s += time.thread_time() - decoded
    except BadImage as bad:
        return bad
    except MemoryError as error:
        # The machine is at fault, not the image, so the image must not be left out.
        raise FeatcacheError(
            f"{split.ids[index]} in split {split.name}: not enough memory to decode it; free "
            "some or give fewer --workers, then run the same command again"
        ) from error
    return pixels


def chunks(items: Iterable[int], size: int) -> Iterator[list[int]]:
    """Cut into lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while chunk := [int(item) for item in islice(rest, size)]:
        yield chunk


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(
    task: Callable[[Item, threading.Event], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    timer: StageTimer | None = None,
) -> Iterator[Result]:
    """Results of `task(item, stop)` in the order of items, computed up to `ahead` items early.

    If the generator is closed or an exception is raised, tasks that have not begun are canceled,
    `stop` is set for those that have, and they are waited for.

    Args:
        task: Called from several threads; should return soon once `stop` is set.
        items: Taken as needed.
        workers: Threads; 0 calls the task when its result is asked for.
        ahead: The most items that may be in progress, or done and not yet taken.
        timer: Gets the seconds that the caller waited, as "wait".
    """
    stop = threading.Event()
    if workers == 0:
        yield from (task(item, stop) for item in items)
        return
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    clock = timer or StageTimer()
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    try:
        waiting.extend(pool.submit(task, item, stop) for item in islice(rest, ahead))
        while waiting:
            with clock("wait"):
                result = waiting.popleft().result()
            waiting.extend(pool.submit(task, item, stop) for item in islice(rest, 1))
            yield result
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, eq=False)
class DecodedSplit:
    """A split's pixels in memory, for several passes.

    Attributes:
        split: Where they came from.
        pixels: uint8 [N, H, W, 3]; zero where the image is bad.
        good: bool [N], whether the row has an image.
    """

    split: ImageSplit
    pixels: UInt8
    good: Bool

    def __len__(self) -> int:
        return len(self.split)


def decode_split(
    split: ImageSplit,
    prep: Preprocessing,
    *,
    workers: int,
    limit_bytes: int = DECODED_BYTES,
    on_bad: OnBad | None = None,
) -> DecodedSplit | None:
    """Decode a whole split once, or return None if its pixels take more than `limit_bytes`.

    Args:
        split: What to decode.
        prep: Resize and crop.
        workers: Threads.
        limit_bytes: The most memory to use.
        on_bad: Called with row and reason of each bad image; without it a bad image raises.

    Raises:
        UserError: An image is bad and `on_bad` is not given; names it.
    """
    shape = (len(split), prep.image_px, prep.image_px, 3)
    if np.prod(shape, dtype=np.int64) > limit_bytes:
        return None
    pixels = np.zeros(shape, dtype=np.uint8)
    good = np.zeros(len(split), dtype=np.bool_)
    rows = range(len(split))
    for index, view in iterate_pixels(split, rows, prep, workers=workers):
        if _is_good(view, split, index, on_bad):
            pixels[index] = view[0]
            good[index] = True
    return DecodedSplit(split, pixels, good)


def iterate_batches(
    source: ImageSplit | DecodedSplit,
    order: Int64,
    batch_size: int,
    prep: Preprocessing,
    *,
    workers: int,
    flip_mask: Bool | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[tuple[UInt8, Int64, Int64]]:
    """Batches in a given order; the last one may be smaller. Decoding overlaps with their use.

    Args:
        source: A split, decoded as needed, or one already decoded with the same `prep`.
        order: Rows, int64 [M].
        batch_size: Rows per batch.
        prep: Resize and crop.
        workers: Threads that decode; 0 decodes in the calling thread.
        flip_mask: bool [M], which places of `order` are mirrored left to right.
        on_bad: Called with row and reason of each bad image, which is then left out of its batch
            (a batch without any image is left out); without it bad images raise.

    Yields:
        Pixels uint8 [n, H, W, 3], labels int64 [n], rows int64 [n].

    Raises:
        UserError: An image is bad and `on_bad` is not given; names it.
    """
    order = np.asarray(order, dtype=np.int64)
    mask = np.zeros(len(order), np.bool_) if flip_mask is None else np.asarray(flip_mask, np.bool_)
    assert len(mask) == len(order)
    if isinstance(source, DecodedSplit):
        yield from _from_memory(source, order, batch_size, mask)
        return
    stream = iterate_pixels(source, order, prep, workers=workers)
    try:
        for start in range(0, len(order), batch_size):
            wanted = order[start : start + batch_size]
            pixels = np.empty((len(wanted), prep.image_px, prep.image_px, 3), dtype=np.uint8)
            kept: list[int] = []
            for place in range(len(wanted)):
                index, view = next(stream)
                if _is_good(view, source, index, on_bad):
                    pixels[len(kept)] = view[0][:, ::-1] if mask[start + place] else view[0]
                    kept.append(index)
            if kept:
                rows = np.array(kept, dtype=np.int64)
                yield pixels[: len(kept)], source.labels[rows], rows
    finally:
        stream.close()


def _from_memory(
    decoded: DecodedSplit, order: Int64, batch_size: int, mask: Bool
) -> Iterator[tuple[UInt8, Int64, Int64]]:
    for start in range(0, len(order), batch_size):
        part = slice(start, start + batch_size)
        good = decoded.good[order[part]]
        rows, flips = order[part][good], mask[part][good]
        if len(rows):
            pixels = decoded.pixels[rows]
            pixels[flips] = pixels[flips][:, :, ::-1]
            yield pixels, decoded.split.labels[rows], rows


def _is_good(view: Pixels, split: ImageSplit, index: int, on_bad: OnBad | None) -> TypeGuard[UInt8]:
    if not isinstance(view, BadImage):
        return True
    if on_bad is None:
        raise bad_image_error(split, index, view) from view
    on_bad(index, view)
    return False


def bad_image_error(split: ImageSplit, index: int, bad: BadImage) -> UserError:
    """What --on-error fail says about a bad image."""
    return UserError(
        f"{split.ids[index]} in split {split.name}: {bad}; repair or remove it, or leave such "
        "images out with --on-error skip"
    )

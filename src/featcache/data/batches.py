"""Shuffled mini-batches for training on pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from featcache.config import Preprocessing
from featcache.data.dataset import ImageSplit
from featcache.data.images import BadImage
from featcache.data.loader import Pixels, iterate_pixels
from featcache.errors import UserError
from featcache.runtime import StageTimer

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
OnBad = Callable[[int, BadImage], None]

DECODED_BYTES = 1_500_000_000


@dataclass(frozen=True, eq=False)
class DecodedSplit:
    """A split's pixels in memory, for several passes.

    Attributes:
        split: Where they came from.
        pixels: uint8 [N, H, W, 3]; zero where the picture is bad.
        good: bool [N], whether the row has a picture.
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
    timer: StageTimer | None = None,
) -> DecodedSplit | None:
    """Decode a whole split once, or return None if its pixels take more than `limit_bytes`.

    Args:
        split: What to decode.
        prep: Resize and crop.
        workers: Threads.
        limit_bytes: The most memory to use.
        on_bad: Called with row and reason of each bad picture; without it they raise.
        timer: Gets the seconds of each stage.

    Raises:
        UserError: A picture is bad and `on_bad` is not given; names it.
    """
    shape = (len(split), prep.image_px, prep.image_px, 3)
    if np.prod(shape, dtype=np.int64) > limit_bytes:
        return None
    pixels = np.zeros(shape, dtype=np.uint8)
    good = np.zeros(len(split), dtype=np.bool_)
    rows = range(len(split))
    for index, view in iterate_pixels(split, rows, prep, workers=workers, timer=timer):
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
    timer: StageTimer | None = None,
) -> Iterator[tuple[UInt8, Int64, Int64]]:
    """Batches in a given order; the last one may be smaller. Decoding overlaps with their use.

    Args:
        source: A split, decoded as needed, or one already decoded with the same `prep`.
        order: Rows, int64 [M].
        batch_size: Rows per batch.
        prep: Resize and crop.
        workers: Threads that decode; 0 decodes in the calling thread.
        flip_mask: bool [M], which places of `order` are mirrored left to right.
        on_bad: Called with row and reason of each bad picture, which is then left out of its batch
            (a batch without any picture is left out); without it bad pictures raise.
        timer: Gets the seconds of each stage.

    Yields:
        Pixels uint8 [n, H, W, 3], labels int64 [n], rows int64 [n].

    Raises:
        UserError: A picture is bad and `on_bad` is not given; names it.
    """
    order = np.asarray(order, dtype=np.int64)
    mask = np.zeros(len(order), np.bool_) if flip_mask is None else np.asarray(flip_mask, np.bool_)
    assert len(mask) == len(order)
    if isinstance(source, DecodedSplit):
        yield from _from_memory(source, order, batch_size, mask)
        return
    stream = iterate_pixels(source, order, prep, workers=workers, timer=timer)
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
    """What --on-error fail says about a bad picture."""
    return UserError(
        f"{split.ids[index]} in split {split.name}: {bad}; repair or remove it, or leave such "
        "pictures out with --on-error skip"
    )

"""What a network is trained and scored on, split by split: images, or the cached input of a stage.

Both give batches in any order, with their labels, and turn them into what the network takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureSplit
from featcache.config import FinetuneConfig, JsonObject, Preprocessing
from featcache.data import (
    BadImage,
    DecodedSplit,
    ImageSplit,
    bad_image_error,
    decode_split,
    iterate_batches,
    iterate_pixels,
    normalize,
)
from featcache.data.sampling import held_out_rows
from featcache.display import say
from featcache.errors import UserError
from featcache.finetune.parallel import ALONE, Team
from featcache.results.metrics import checked_weights

if TYPE_CHECKING:
    import torch

DECODED_BYTES = 1_500_000_000
"""Memory that the decoded pixels of one split may take."""
EVAL_BATCH_SIZE = 64

Int64 = NDArray[np.int64]
# Raw inputs [n, ...], labels [n], rows [n].
Batch = tuple[NDArray[Any], Int64, Int64]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how the network computes.

    `amp` runs it in bfloat16 where that is safe; GPUs only.
    """

    device: str
    amp: bool
    channels_last: bool
    workers: int
    team: Team = ALONE

    def describe(self) -> JsonObject:
        """For reports: device by name, precision, memory layout, threads."""
        import torch

        name = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        return {
            "device": name,
            "amp": self.amp,
            "channels_last": self.channels_last,
            "num_threads": torch.get_num_threads(),
            **({} if self.team.rank.alone else {"num_processes": self.team.rank.size}),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        import torch

        if not self.amp:
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Samples(ABC):
    """One split without its unreadable images."""

    split: ImageSplit

    def __len__(self) -> int:
        return len(self.split)

    @cached_property
    def weights(self) -> NDArray[np.float32] | None:
        """Sample weights [N] with a mean of one, or None where all images count alike.

        Raises:
            UserError: A weight is negative or not finite, or all are zero.
        """
        if self.split.weights is None:
            return None
        given = checked_weights(self.split.weights, self.split.name)
        return np.asarray(given / given.mean(), np.float32) if np.ptp(given) else None

    def all_batches(self, placement: Placement) -> Iterator[Batch]:
        """This process's part of the samples in order, for a pass without training."""
        rank = placement.team.rank
        part = np.array_split(np.arange(len(self)), rank.size)[rank.index]
        return self.batches(part, EVAL_BATCH_SIZE, placement)

    @abstractmethod
    def subset(self, rows: Int64, name: str) -> Self:
        """The samples of the given rows, in that order."""

    @abstractmethod
    def batches(
        self,
        order: Int64,
        batch_size: int,
        placement: Placement,
        flips: NDArray[np.bool_] | None = None,
    ) -> Iterator[Batch]:
        """Batches in a given order; the last one may be smaller.

        Args:
            order: Rows, [M].
            batch_size: Rows per batch.
            placement: Has the number of threads that decode.
            flips: [M], which places of `order` are mirrored left to right.
        """

    @abstractmethod
    def inputs(self, raw: NDArray[Any], placement: Placement) -> torch.Tensor:
        """The first of a batch's arrays as the network's float32 input on the device."""


@dataclass(frozen=True, eq=False)
class Images(Samples):
    """Images of a split, as the whole network takes them.

    `source` has the pixels in memory where they fit; otherwise every pass decodes them again.
    """

    source: ImageSplit | DecodedSplit
    prep: Preprocessing

    def subset(self, rows: Int64, name: str) -> Images:
        """See `Samples.subset`; pixels are shared where they are views."""
        split = self.split.subset(rows, name=name)
        if isinstance(self.source, ImageSplit):
            return Images(split, split, self.prep)
        pixels, good = self.source.pixels[rows], self.source.good[rows]
        return Images(split, DecodedSplit(split, pixels, good), self.prep)

    def batches(
        self,
        order: Int64,
        batch_size: int,
        placement: Placement,
        flips: NDArray[np.bool_] | None = None,
    ) -> Iterator[Batch]:
        """Pixels uint8 [n, H, W, 3]; see `Samples.batches`."""
        return iterate_batches(
            self.source, order, batch_size, self.prep, workers=placement.workers, flip_mask=flips
        )

    def inputs(self, raw: NDArray[Any], placement: Placement) -> torch.Tensor:
        """Pixels to images [n, 3, H, W]; see `Samples.inputs`."""
        import torch

        images = normalize(torch.from_numpy(raw).to(placement.device), self.prep)
        return images if placement.channels_last else images.contiguous()


@dataclass(frozen=True, eq=False)
class Activations(Samples):
    """The cached input of a stage, as the tail of the network takes it; read batch by batch.

    Attributes:
        cached: The cache's split; view 1 is that of the mirror images.
        places: Each sample's row in it, [N].
        shape: Of one sample's activations; with columns after them, of the row as it is.
    """

    cached: FeatureSplit
    places: Int64
    shape: tuple[int, ...]

    def subset(self, rows: Int64, name: str) -> Activations:
        """See `Samples.subset`."""
        split = self.split.subset(rows, name=name)
        return Activations(split, self.cached, self.places[rows], self.shape)

    def batches(
        self,
        order: Int64,
        batch_size: int,
        placement: Placement,
        flips: NDArray[np.bool_] | None = None,
    ) -> Iterator[Batch]:
        """Activations [n, D] in the cache's dtype, checked; see `Samples.batches`."""
        views = np.zeros(len(order), np.int64) if flips is None else flips.astype(np.int64)
        for start in range(0, len(order), batch_size):
            part = slice(start, start + batch_size)
            rows = order[part]
            yield self.cached.take(self.places[rows], views[part]), self.split.labels[rows], rows

    def inputs(self, raw: NDArray[Any], placement: Placement) -> torch.Tensor:
        """Activations to the tail's input [n, *shape]; see `Samples.inputs`."""
        import torch

        flat = torch.from_numpy(raw).to(placement.device)
        return flat.float().view(len(raw), *self.shape)


def read_images(
    split: ImageSplit, prep: Preprocessing, config: FinetuneConfig, placement: Placement
) -> Images:
    """Decode a split once, or, where it takes too much memory, check it as `on_error` asks.

    Returns:
        The usable images.

    Raises:
        UserError: An image is unreadable under `on_error="fail"`, or none is usable.
    """
    bad: list[int] = []

    def on_bad(index: int, image: BadImage) -> None:
        if config.on_error == "fail":
            raise bad_image_error(split, index, image)
        say(f"skipped {split.ids[index]}: {image}")
        bad.append(index)

    workers, limit = placement.workers, DECODED_BYTES // placement.team.rank.local_size
    decoded = decode_split(split, prep, workers=workers, limit_bytes=limit, on_bad=on_bad)
    if decoded is None and config.on_error == "skip":
        # Which rows are usable must be known before the first epoch draws their order.
        for index, image in iterate_pixels(split, range(len(split)), prep, workers=workers):
            if isinstance(image, BadImage):
                on_bad(index, image)
    images = Images(split, decoded or split, prep)
    check_any(len(split) - len(bad), split)
    if bad:
        images = images.subset(np.setdiff1d(np.arange(len(split)), bad), split.name)
    return images


def check_any(num_usable: int, split: ImageSplit) -> None:
    """Refuse a split without a usable image.

    Raises:
        UserError: There is none.
    """
    if num_usable == 0:
        raise UserError(f"not one image of split {split.name} could be read; check the dataset")


def hold_out(
    train: Samples, val: Samples | None, config: FinetuneConfig
) -> tuple[Samples, Samples, str]:
    """Set aside what early stopping watches: the dataset's own val split, or a part of train.

    Returns:
        What is left to train on, what is held out, and in words what was held out.

    Raises:
        UserError: Train is too small to hold anything out.
    """
    if val is not None:
        return train, val, f"the dataset's val split ({len(val)} images) chose the epoch"
    num = round(config.holdout * len(train))
    rows = held_out_rows(train.split, num, seed=config.seed, purpose="holdout")
    if not 0 < len(rows) < len(train):
        raise UserError(
            f"--holdout {config.holdout:g} of {len(train)} train images leaves nothing to choose "
            "on or to train on; give more images, or leave --patience out"
        )
    rest = np.setdiff1d(np.arange(len(train)), rows)
    held, left = train.subset(rows, "holdout"), train.subset(rest, "train")
    return left, held, f"a held-out part of train ({len(rows)} images) chose the epoch"

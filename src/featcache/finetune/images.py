"""The splits as training reads them: decoded once where they fit, bad pictures left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featcache.config import FinetuneConfig, Preprocessing
from featcache.data import (
    BadImage,
    DecodedSplit,
    ImageSplit,
    bad_image_error,
    decode_split,
    iterate_pixels,
)
from featcache.data.sampling import held_out_rows
from featcache.errors import UserError
from featcache.results.metrics import checked_weights
from featcache.runtime import say

DECODED_BYTES = 1_500_000_000
"""Memory that the decoded pixels of one split may take."""


@dataclass(frozen=True, eq=False)
class Images:
    """One split without its bad pictures.

    `source` holds the pixels in memory where they fit; otherwise every pass decodes them anew.
    """

    split: ImageSplit
    source: ImageSplit | DecodedSplit

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

    def subset(self, rows: NDArray[np.int64], name: str) -> Images:
        """The images of the given rows, in that order; pixels are shared where they are views."""
        split = self.split.subset(rows, name=name)
        if isinstance(self.source, ImageSplit):
            return Images(split, split)
        return Images(split, DecodedSplit(split, self.source.pixels[rows], self.source.good[rows]))


def read_images(
    split: ImageSplit, prep: Preprocessing, config: FinetuneConfig, workers: int
) -> tuple[Images, int]:
    """Decode a split once, or, where it takes too much memory, check it as `on_error` asks.

    Returns:
        The usable images, and how many were left out.

    Raises:
        UserError: A picture is bad under `on_error="fail"`, or none is usable.
    """
    bad: list[int] = []

    def on_bad(index: int, image: BadImage) -> None:
        if config.on_error == "fail":
            raise bad_image_error(split, index, image)
        say(f"skipped {split.ids[index]}: {image}")
        bad.append(index)

    decoded = decode_split(split, prep, workers=workers, limit_bytes=DECODED_BYTES, on_bad=on_bad)
    if decoded is None and config.on_error == "skip":
        # Which rows are usable must be known before the first epoch draws their order.
        for index, image in iterate_pixels(split, range(len(split)), prep, workers=workers):
            if isinstance(image, BadImage):
                on_bad(index, image)
    images = Images(split, decoded or split)
    if len(bad) == len(split):
        raise UserError(f"not one image of split {split.name} could be read; check the dataset")
    if bad:
        images = images.subset(np.setdiff1d(np.arange(len(split)), bad), split.name)
    return images, len(bad)


def hold_out(
    train: Images, val: Images | None, config: FinetuneConfig
) -> tuple[Images, Images, str]:
    """Set aside what early stopping watches: the dataset's own val split, or a part of train.

    Returns:
        What is left to train on, what is held out, and in words what that is.

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

"""The images in memory, and the passes over them: train an epoch, score a split."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import FinetuneConfig, Preprocessing
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
from featcache.errors import FeatcacheError, UserError
from featcache.finetune.trainable import (
    EVAL_BATCH_SIZE,
    TrainableModel,
    TrainingRecipe,
    rate_factor,
)
from featcache.random_order import epoch_order, flip_mask
from featcache.results.metrics import checked_weights
from featcache.runtime import StageTimer, progress, say

if TYPE_CHECKING:
    import torch

DECODED_BYTES = 1_500_000_000
"""Memory that the decoded pixels of one split may take."""


@dataclass(frozen=True, eq=False)
class Images:
    """One split without its unreadable images, as the network takes them.

    `source` has the pixels in memory where they fit; otherwise every pass decodes them again.
    """

    split: ImageSplit
    source: ImageSplit | DecodedSplit
    prep: Preprocessing

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
            return Images(split, split, self.prep)
        pixels, good = self.source.pixels[rows], self.source.good[rows]
        return Images(split, DecodedSplit(split, pixels, good), self.prep)

    def batches(self, placement: Placement) -> Generator[Batch, None, None]:
        """Every image in order, in batches for a pass without training."""
        order = np.arange(len(self))
        yield from iterate_batches(
            self.source, order, EVAL_BATCH_SIZE, self.prep, workers=placement.workers
        )


def read_images(
    split: ImageSplit, prep: Preprocessing, config: FinetuneConfig, workers: int
) -> tuple[Images, int]:
    """Decode a split once, or, where it takes too much memory, check it as `on_error` asks.

    Returns:
        The usable images, and how many were left out.

    Raises:
        UserError: An image is unreadable under `on_error="fail"`, or none is usable.
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
    images = Images(split, decoded or split, prep)
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


Batch = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how the network computes.

    `amp` runs it in bfloat16 where that is safe; GPUs only.
    """

    device: str
    amp: bool
    channels_last: bool
    workers: int

    def describe(self) -> dict[str, str | int]:
        """For reports: device by name, precision, memory layout, threads."""
        import torch

        name = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        return {
            "device": name,
            "amp": self.amp,
            "channels_last": self.channels_last,
            "num_threads": torch.get_num_threads(),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        import torch

        if not self.amp:
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def inputs(self, pixels: NDArray[np.uint8], prep: Preprocessing) -> torch.Tensor:
        """Pixels uint8 [N, H, W, 3] to the network's float32 input [N, 3, H, W] on the device."""
        import torch

        images = normalize(torch.from_numpy(pixels).to(self.device), prep)
        return images if self.channels_last else images.contiguous()


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of a pass without training.

    `predicted` [N] int64, `confidence` [N] float32 the probability of the predicted class, `loss`
    the mean cross-entropy.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    loss: float
    top1: float
    seconds: float


def train_epoch(
    trainable: TrainableModel,
    optimizer: torch.optim.Optimizer,
    images: Images,
    placement: Placement,
    epoch: int,
) -> tuple[float, float, float]:
    """Train one pass.

    Args:
        trainable: The classifier and what of it trains.
        optimizer: From `trainable.make_optimizer()`.
        images: The train split.
        placement: Where to compute.
        epoch: Counted from 0; with the seed it decides order, flips and dropout.

    Returns:
        The mean loss over the images, wall seconds, and the seconds of these spent waiting for
        pixels.

    Raises:
        FeatcacheError: The loss is not finite; the parameters are still those before that step.
    """
    import torch

    recipe, timer = trainable.recipe, StageTimer()
    start = time.perf_counter()
    trainable.train_mode()
    torch.manual_seed(_dropout_seed(recipe.seed, epoch))
    steps_per_epoch = num_steps(len(images), trainable)
    step, total_loss, seen = epoch * steps_per_epoch, 0.0, 0
    with (
        closing(_train_batches(trainable, images, placement, epoch)) as batches,
        progress(len(images), f"epoch {epoch + 1}/{recipe.epochs}", leave=False) as bar,
    ):
        while True:
            with timer("wait"):
                batch = next(batches, None)
            if batch is None:
                break
            pixels, labels, rows = batch
            factor = rate_factor(recipe, step, recipe.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            weights = None if images.weights is None else images.weights[rows]
            loss = _step(
                trainable,
                optimizer,
                placement,
                placement.inputs(pixels, images.prep),
                labels,
                weights,
            )
            if not math.isfinite(loss):
                raise FeatcacheError(
                    _not_finite(recipe, epoch, step - epoch * steps_per_epoch, loss)
                )
            step, seen, total_loss = step + 1, seen + len(rows), total_loss + loss * len(rows)
            bar.update(len(rows))
            bar.set_postfix_str(f"loss {total_loss / seen:.3f}", refresh=False)
    return total_loss / max(seen, 1), time.perf_counter() - start, timer.seconds["wait"]


def num_steps(num_images: int, trainable: TrainableModel) -> int:
    """Optimizer steps per epoch."""
    size = trainable.recipe.batch_size
    lone = num_images % size == 1 and num_images > 1 and trainable.uses_batch_statistics()
    return math.ceil(num_images / size) - int(lone and size > 1)


def _step(
    trainable: TrainableModel,
    optimizer: torch.optim.Optimizer,
    placement: Placement,
    inputs: torch.Tensor,
    labels: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
) -> float:
    """One update, unless the loss is not finite; returns the loss."""
    import torch
    from torch.nn.functional import cross_entropy

    truth = torch.from_numpy(labels).to(placement.device)
    with placement.autocast():
        logits = trainable.model(inputs)
    each = cross_entropy(logits.float(), truth, reduction="none")
    if weights is not None:
        each = each * torch.from_numpy(weights).to(placement.device)
    loss = each.mean()
    value = float(loss.detach())
    if math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return value


def _not_finite(recipe: TrainingRecipe, epoch: int, step: int, loss: float) -> str:
    rates = f"--lr is {recipe.lr:g}"
    if recipe.backbone_lr != recipe.lr:
        rates += f", --backbone-lr {recipe.backbone_lr:g}"
    return (
        f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}, and training stopped "
        f"before that update; {rates}: use a lower one"
    )


def _dropout_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _train_batches(
    trainable: TrainableModel, images: Images, placement: Placement, epoch: int
) -> Generator[Batch, None, None]:
    """The epoch's batches; where BatchNorm needs it, a last batch of one joins the one before."""
    recipe = trainable.recipe
    order = epoch_order(len(images), recipe.seed, epoch)
    flips = flip_mask(len(images), recipe.seed, epoch)[order] if recipe.flip else None
    batches = iterate_batches(
        images.source,
        order,
        recipe.batch_size,
        images.prep,
        workers=placement.workers,
        flip_mask=flips,
    )
    merge = trainable.uses_batch_statistics() and recipe.batch_size > 1
    yield from _with_lone_merged(batches) if merge else batches


def _with_lone_merged(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join a last batch of one image to the one before: one image has no variance."""
    held: Batch | None = None
    for batch in batches:
        if held is not None and len(batch[2]) == 1:
            pixels, labels, rows = (
                np.concatenate([a, b]) for a, b in zip(held, batch, strict=True)
            )
            yield pixels, labels, rows
            held = None
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def score(model: torch.nn.Module, images: Images, placement: Placement) -> Scores:
    """Classify every image of a split, in eval mode; the model is left in eval mode."""
    import torch
    from torch.nn.functional import cross_entropy

    start = time.perf_counter()
    model.eval()
    num = len(images)
    predicted, confidence = np.zeros(num, np.int64), np.zeros(num, np.float32)
    total_loss = 0.0
    with torch.inference_mode(), progress(num, f"score {images.split.name}", leave=False) as bar:
        for pixels, labels, rows in images.batches(placement):
            with placement.autocast():
                logits = model(placement.inputs(pixels, images.prep))
            logits = logits.float().cpu()
            total_loss += float(cross_entropy(logits, torch.from_numpy(labels), reduction="sum"))
            best = logits.softmax(1).max(1)
            predicted[rows], confidence[rows] = best.indices.numpy(), best.values.numpy()
            bar.update(len(rows))
    right = int((predicted == images.split.labels).sum())
    seconds = time.perf_counter() - start
    return Scores(predicted, confidence, total_loss / max(num, 1), right / max(num, 1), seconds)

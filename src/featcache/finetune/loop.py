"""The passes over the samples: train an epoch, score a split."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.errors import FeatcacheError
from featcache.finetune.samples import Batch, Placement, Samples
from featcache.finetune.trainable import TrainableModel, TrainingRecipe, rate_factor
from featcache.random_order import epoch_order, flip_mask
from featcache.runtime import StageTimer, progress

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of a pass without training.

    `predicted` [N] int64, `confidence` [N] float32 the probability of the predicted class,
    `probabilities` [N, C] float32 those of all classes, `loss` the mean cross-entropy.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    loss: float
    top1: float
    seconds: float


def train_epoch(
    trainable: TrainableModel,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    placement: Placement,
    epoch: int,
) -> tuple[float, float, float]:
    """Train one pass.

    Args:
        trainable: The classifier and what of it trains.
        optimizer: From `trainable.make_optimizer()`.
        samples: The train split.
        placement: Where to compute.
        epoch: Counted from 0; with the seed it decides order, flips and dropout.

    Returns:
        The mean loss over the samples, wall seconds, and the seconds of these spent waiting for
        batches.

    Raises:
        FeatcacheError: The loss is not finite; the parameters are still those before that step.
    """
    import torch

    recipe, timer = trainable.recipe, StageTimer()
    start = time.perf_counter()
    trainable.train_mode()
    torch.manual_seed(_dropout_seed(recipe.seed, epoch))
    steps_per_epoch = num_steps(len(samples), trainable)
    step, total_loss, seen = epoch * steps_per_epoch, 0.0, 0
    with (
        closing(_train_batches(trainable, samples, placement, epoch)) as batches,
        progress(len(samples), f"epoch {epoch + 1}/{recipe.epochs}", leave=False) as bar,
    ):
        while True:
            with timer("wait"):
                batch = next(batches, None)
            if batch is None:
                break
            raw, labels, rows = batch
            factor = rate_factor(recipe, step, recipe.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            weights = None if samples.weights is None else samples.weights[rows]
            inputs = samples.inputs(raw, placement)
            loss = _step(trainable, optimizer, placement, inputs, labels, weights)
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
        logits = trainable.network(inputs)
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
    trainable: TrainableModel, samples: Samples, placement: Placement, epoch: int
) -> Generator[Batch, None, None]:
    """The epoch's batches; where BatchNorm needs it, a last batch of one joins the one before."""
    recipe = trainable.recipe
    order = epoch_order(len(samples), recipe.seed, epoch)
    flips = flip_mask(len(samples), recipe.seed, epoch)[order] if recipe.flip else None
    batches = samples.batches(order, recipe.batch_size, placement, flips)
    merge = trainable.uses_batch_statistics() and recipe.batch_size > 1
    yield from _with_lone_merged(batches) if merge else batches


def _with_lone_merged(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join a last batch of one sample to the one before: one sample has no variance."""
    held: Batch | None = None
    for batch in batches:
        if held is not None and len(batch[2]) == 1:
            raw, labels, rows = (np.concatenate([a, b]) for a, b in zip(held, batch, strict=True))
            yield raw, labels, rows
            held = None
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def score(trainable: TrainableModel, samples: Samples, placement: Placement) -> Scores:
    """Classify every sample of a split, in eval mode; the model is left in eval mode."""
    import torch
    from torch.nn.functional import cross_entropy

    start = time.perf_counter()
    trainable.model.eval()
    num = len(samples)
    found: list[NDArray[np.float32]] = []
    total_loss = 0.0
    with torch.inference_mode(), progress(num, f"score {samples.split.name}", leave=False) as bar:
        for raw, labels, _ in samples.all_batches(placement):
            with placement.autocast():
                logits = trainable.network(samples.inputs(raw, placement))
            logits = logits.float().cpu()
            total_loss += float(cross_entropy(logits, torch.from_numpy(labels), reduction="sum"))
            found.append(logits.softmax(1).numpy())
            bar.update(len(labels))
    probabilities = np.concatenate(found)
    predicted = probabilities.argmax(axis=1).astype(np.int64)
    return Scores(
        predicted=predicted,
        confidence=probabilities.max(axis=1),
        probabilities=probabilities,
        loss=total_loss / num,
        top1=float((predicted == samples.split.labels).mean()),
        seconds=time.perf_counter() - start,
    )

"""The passes over the samples: train an epoch, score a split."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import progress
from featcache.errors import FeatcacheError
from featcache.finetune.parallel import shares
from featcache.finetune.samples import Batch, Placement, Samples
from featcache.finetune.trainable import TrainableModel, TrainingRecipe, rate_factor
from featcache.random_order import epoch_order, flip_mask
from featcache.results.metrics import top1
from featcache.results.targets import mean_average_precision
from featcache.runtime import StageTimer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of a pass without training.

    `probabilities` [N, C] float32 are those of all classes, `loss` is the mean of what training
    minimizes. `metric` is top-1 accuracy or, `of_labels` of which an image has several, the mean
    average precision.
    """

    probabilities: NDArray[np.float32]
    loss: float
    of_labels: bool
    metric: float
    seconds: float

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The likeliest class of each sample [N]."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)


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
    team = placement.team
    torch.manual_seed(_dropout_seed(recipe.seed, epoch, team.rank.index))
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
            (raw, _, rows), share, num_rows = batch
            factor = rate_factor(recipe, step, recipe.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            inputs = samples.inputs(raw, placement)
            loss = _step(trainable, optimizer, placement, inputs, samples, rows, share)
            if not math.isfinite(loss):
                told = _not_finite(recipe, epoch, step - epoch * steps_per_epoch, loss)
                raise team.told(FeatcacheError(told))
            step, seen, total_loss = step + 1, seen + num_rows, total_loss + loss * num_rows
            bar.update(num_rows)
            bar.set_postfix_str(f"loss {total_loss / seen:.3f}", refresh=False)
    team.follow(trainable.model.buffers())
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
    samples: Samples,
    rows: NDArray[np.int64],
    share: float,
) -> float:
    """One update, unless the loss is not finite; returns the loss of the whole team's batch.

    `rows` are this process's of the batch; their mean loss counts `share`.
    """
    import torch

    with placement.autocast():
        logits = trainable.training_network(inputs)
    each = _losses(logits.float(), samples, rows)
    if samples.weights is not None:
        each = each * torch.from_numpy(samples.weights[rows]).to(placement.device)
    loss = each.mean() * share
    value = float(placement.team.total(loss.detach().clone())) / placement.team.rank.size
    if math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return value


def _losses(logits: torch.Tensor, samples: Samples, rows: NDArray[np.int64]) -> torch.Tensor:
    """Of each row, the cross-entropy of its class, or the mean of its labels' cross-entropies."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    if samples.split.targets is None:
        labels = torch.from_numpy(samples.split.labels[rows]).to(logits.device)
        return cross_entropy(logits, labels, reduction="none")
    targets = torch.from_numpy(samples.split.targets[rows]).to(logits)
    return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def _not_finite(recipe: TrainingRecipe, epoch: int, step: int, loss: float) -> str:
    rates = f"--lr is {recipe.lr:g}"
    if recipe.backbone_lr != recipe.lr:
        rates += f", --backbone-lr {recipe.backbone_lr:g}"
    return (
        f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}, and training stopped "
        f"before that update; {rates}: use a lower one"
    )


def _dropout_seed(seed: int, epoch: int, rank: int) -> int:
    text = f"dropout {seed} {epoch}" + (f" {rank}" if rank else "")
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _train_batches(
    trainable: TrainableModel, samples: Samples, placement: Placement, epoch: int
) -> Generator[tuple[Batch, float, int], None, None]:
    """This process's part of the epoch's batches, what it counts, and rows of the whole batches.

    Where BatchNorm needs it, a last batch of one joins the one before.
    """
    recipe = trainable.recipe
    order = epoch_order(len(samples), recipe.seed, epoch)
    flips = flip_mask(len(samples), recipe.seed, epoch)[order] if recipe.flip else None
    least = 2 if trainable.uses_batch_statistics() and recipe.batch_size > 1 else 1
    part = shares(len(samples), recipe.batch_size, placement.team.rank, least)
    if flips is not None:
        flips = flips[part.places]
    batches = samples.batches(order[part.places], part.batch_size, placement, flips)
    whole = _with_lone_merged(batches) if least > 1 else batches
    yield from zip(whole, part.factors, part.num_rows, strict=True)


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

    start = time.perf_counter()
    targets = samples.split.targets
    trainable.model.eval()
    num = len(samples)
    probabilities: NDArray[Any] = np.zeros((num, trainable.num_classes), np.float32)
    total_loss = np.zeros(1)
    with torch.inference_mode(), progress(num, f"score {samples.split.name}", leave=False) as bar:
        for raw, _, rows in samples.all_batches(placement):
            with placement.autocast():
                logits = trainable.network(samples.inputs(raw, placement))
            logits = logits.float().cpu()
            total_loss += float(_losses(logits, samples, rows).sum())
            probabilities[rows] = logits.softmax(1) if targets is None else logits.sigmoid()
            bar.update(len(rows))
    probabilities = placement.team.gathered(probabilities)
    loss = float(placement.team.gathered(total_loss)[0]) / num
    if targets is None:
        metric = top1(samples.split.labels, probabilities.argmax(axis=1))
    else:
        columns = zip(targets.T, probabilities.T, strict=True)
        metric = mean_average_precision(list(columns)) or 0.0
    seconds = time.perf_counter() - start
    return Scores(probabilities, loss, targets is not None, metric, seconds)

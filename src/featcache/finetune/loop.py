"""The passes over the pictures: train an epoch, score a split."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import Preprocessing
from featcache.data import iterate_batches, normalize
from featcache.errors import FeatcacheError
from featcache.finetune.images import Images
from featcache.finetune.parts import Parts
from featcache.finetune.plan import EVAL_BATCH_SIZE, Plan, rate_factor
from featcache.random_order import epoch_order, flip_mask
from featcache.runtime import StageTimer, progress

if TYPE_CHECKING:
    import torch

Batch = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how the network computes.

    `amp` runs it in bfloat16 where that is safe; GPUs only.
    """

    device: str
    amp: bool
    channels_last: bool
    workers: int

    def describe(self) -> dict[str, Any]:
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
    """What a pass without training found.

    `predicted` [N] int64, `confidence` [N] float32 the probability of the predicted class, `loss`
    the mean cross-entropy.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    loss: float
    top1: float
    seconds: float


def train_epoch(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    images: Images,
    prep: Preprocessing,
    machine: Machine,
    epoch: int,
) -> tuple[float, float, float]:
    """Train one pass.

    Args:
        parts: The classifier and what of it trains.
        optimizer: From `parts.make_optimizer()`.
        images: The train split.
        prep: The network's preprocessing.
        machine: Where to compute.
        epoch: Counted from 0; with the seed it decides order, flips and dropout.

    Returns:
        The mean loss over the images, wall seconds, and the seconds of these spent waiting for
        pixels.

    Raises:
        FeatcacheError: The loss is not finite; the parameters are still those before that step.
    """
    import torch

    plan, timer = parts.plan, StageTimer()
    start = time.perf_counter()
    parts.train_mode()
    torch.manual_seed(_dropout_seed(plan.seed, epoch))
    steps_per_epoch = num_steps(len(images), parts)
    step, total_loss, seen = epoch * steps_per_epoch, 0.0, 0
    with (
        closing(_train_batches(parts, images, prep, machine, epoch)) as batches,
        progress(len(images), f"epoch {epoch + 1}/{plan.epochs}", leave=False) as bar,
    ):
        while True:
            with timer("wait"):
                batch = next(batches, None)
            if batch is None:
                break
            pixels, labels, rows = batch
            factor = rate_factor(plan, step, plan.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            weights = None if images.weights is None else images.weights[rows]
            loss = _step(parts, optimizer, machine, machine.inputs(pixels, prep), labels, weights)
            if not math.isfinite(loss):
                raise FeatcacheError(_not_finite(plan, epoch, step - epoch * steps_per_epoch, loss))
            step, seen, total_loss = step + 1, seen + len(rows), total_loss + loss * len(rows)
            bar.update(len(rows))
            bar.set_postfix_str(f"loss {total_loss / seen:.3f}", refresh=False)
    return total_loss / max(seen, 1), time.perf_counter() - start, timer.seconds["wait"]


def num_steps(num_images: int, parts: Parts) -> int:
    """Optimizer steps per epoch."""
    size = parts.plan.batch_size
    lone = num_images % size == 1 and num_images > 1 and parts.uses_batch_statistics()
    return math.ceil(num_images / size) - int(lone and size > 1)


def _step(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    machine: Machine,
    inputs: torch.Tensor,
    labels: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
) -> float:
    """One update, unless the loss is not finite; returns the loss."""
    import torch
    from torch.nn.functional import cross_entropy

    truth = torch.from_numpy(labels).to(machine.device)
    with machine.autocast():
        logits = parts.model(inputs)
    each = cross_entropy(logits.float(), truth, reduction="none")
    if weights is not None:
        each = each * torch.from_numpy(weights).to(machine.device)
    loss = each.mean()
    value = float(loss.detach())
    if math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return value


def _not_finite(plan: Plan, epoch: int, step: int, loss: float) -> str:
    rates = f"--lr is {plan.lr:g}"
    if plan.backbone_lr != plan.lr:
        rates += f", --backbone-lr {plan.backbone_lr:g}"
    return (
        f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}, and training stopped "
        f"before that update; {rates}: type a lower one"
    )


def _dropout_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _train_batches(
    parts: Parts, images: Images, prep: Preprocessing, machine: Machine, epoch: int
) -> Generator[Batch, None, None]:
    """The epoch's batches; a lone last image joins the batch before where BatchNorm needs it."""
    plan = parts.plan
    order = epoch_order(len(images), plan.seed, epoch)
    flips = flip_mask(len(images), plan.seed, epoch)[order] if plan.flip else None
    batches = iterate_batches(
        images.source, order, plan.batch_size, prep, workers=machine.workers, flip_mask=flips
    )
    merge = parts.uses_batch_statistics() and plan.batch_size > 1
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


def score(model: torch.nn.Module, images: Images, prep: Preprocessing, machine: Machine) -> Scores:
    """Classify every image of a split, in eval mode; the model is left in eval mode."""
    import torch
    from torch.nn.functional import cross_entropy

    start = time.perf_counter()
    model.eval()
    num = len(images)
    predicted, confidence = np.zeros(num, np.int64), np.zeros(num, np.float32)
    total_loss = 0.0
    batches = iterate_batches(
        images.source, np.arange(num), EVAL_BATCH_SIZE, prep, workers=machine.workers
    )
    with torch.inference_mode(), progress(num, f"score {images.split.name}", leave=False) as bar:
        for pixels, labels, rows in batches:
            with machine.autocast():
                logits = model(machine.inputs(pixels, prep))
            logits = logits.float().cpu()
            total_loss += float(cross_entropy(logits, torch.from_numpy(labels), reduction="sum"))
            best = logits.softmax(1).max(1)
            predicted[rows], confidence[rows] = best.indices.numpy(), best.values.numpy()
            bar.update(len(rows))
    right = int((predicted == images.split.labels).sum())
    seconds = time.perf_counter() - start
    return Scores(predicted, confidence, total_loss / max(num, 1), right / max(num, 1), seconds)

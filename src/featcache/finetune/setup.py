"""From settings to a run that is ready to train: data, network, device, names of files."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbone import build_classifier, identify
from featcache.cache import check_unlocked
from featcache.config import BackboneInfo, FinetuneConfig, Preprocessing
from featcache.data import ImageDataset, load_dataset
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.finetune.checkpoint import MARKS as CHECKPOINT_MARKS
from featcache.finetune.checkpoint import checkpoint_path, run_key
from featcache.finetune.loop import Images, Placement, hold_out, read_images
from featcache.finetune.probe import head_to_start_from
from featcache.finetune.trainable import TrainableModel, TrainingRecipe, resolve_recipe
from featcache.heads import LinearHead
from featcache.results import report_marks
from featcache.results.metrics import checked_weights
from featcache.runtime import num_cores, numeric_versions, pick_device, say
from featcache.tensor_files import MARKS as MODEL_MARKS
from featcache.tensor_files import TensorFile, read_tensor_file

if TYPE_CHECKING:
    from torch import nn


@dataclass(eq=False, kw_only=True)
class FinetuneRun:
    """Everything that a run works with.

    `decisive` is everything that decides its outcome, as JSON; `chosen_on` says in words which
    images a setting was chosen on; `read_seconds` is the time of reading and decoding before the
    first epoch; `checkpoint_s` is the least time between checkpoints.
    """

    config: FinetuneConfig
    recipe: TrainingRecipe
    info: BackboneInfo
    dataset: ImageDataset
    placement: Placement
    trainable: TrainableModel
    train: Images
    test: Images
    held: Images | None
    init_head: LinearHead | None
    chosen_on: str
    num_skipped: dict[str, int]
    read_seconds: float
    decisive: dict[str, Any]
    output: Path
    probe: dict[str, float] = field(default_factory=dict)
    checkpoint_s: float = 0.0


def prepare(config: FinetuneConfig, dataset: ImageDataset | None = None) -> FinetuneRun:
    """Load data and network and check that they fit, before any long work.

    Args:
        config: The command's settings.
        dataset: What to train and score on; what the settings name unless given.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
    """
    recipe = resolve_recipe(config)
    head_file = _check_given(config)
    info = identify(config, config.seed, config.cache_dir)
    dataset = dataset or _noted(load_dataset(config))
    if (weights := dataset.splits["train"].weights) is not None:
        checked_weights(weights, "train")
    names = dataset.class_names
    init_head = head_to_start_from(head_file, info, names) if head_file else None
    placement = choose_placement(config)
    network = build_classifier(config, len(names), config.seed, info.weights_sha256)
    trainable = TrainableModel(network, recipe)
    check_input(trainable.model, info, config)
    _place(trainable.model, placement)
    start = time.perf_counter()
    images, skipped = _read_splits(dataset, info.preprocessing, config, placement.workers)
    read_seconds = time.perf_counter() - start
    train, held, chosen_on = images["train"], None, "nothing: no setting was chosen by a score"
    if recipe.patience:
        train, held, chosen_on = hold_out(train, images.get("val"), config)
    _check_batches(trainable, len(train))
    decisive = _decisive(recipe, info, dataset, placement, images, head_file)
    return FinetuneRun(
        config=config,
        recipe=recipe,
        info=info,
        dataset=dataset,
        placement=placement,
        trainable=trainable,
        train=train,
        test=images["test"],
        held=held,
        init_head=init_head,
        chosen_on=chosen_on,
        num_skipped=skipped,
        read_seconds=read_seconds,
        decisive=decisive,
        output=config.output
        or config.cache_dir / _file_name(recipe, info, dataset, run_key(decisive)),
    )


def _check_given(config: FinetuneConfig) -> TensorFile | None:
    """Check the files that the settings name; returns that of the head to start from, if any."""
    if config.output is not None:
        if config.output.suffix != ".safetensors":
            raise UserError(f"--output {config.output}: a model's name ends in .safetensors")
        check_unlocked(config.output)
        check_files(config, config.output)
    return read_tensor_file(config.init_head) if config.init_head else None


def _noted(dataset: ImageDataset) -> ImageDataset:
    for note in dataset.notes:
        say(note)
    return dataset


def check_files(config: FinetuneConfig, output: Path) -> None:
    """Refuse to replace an input, or a file that fine-tuning did not write.

    Raises:
        UserError: Naming the file.
    """
    outputs = {
        output: MODEL_MARKS,
        output.with_suffix(".json"): report_marks("finetune"),
        checkpoint_path(output): CHECKPOINT_MARKS,
    }
    check_outputs(outputs, [config.weights, config.dataset, config.init_head or ""])


def choose_placement(config: FinetuneConfig) -> Placement:
    """Where and how to compute.

    The layout is fixed rather than timed on the spot, so that two runs with one seed, or a run and
    its continuation, round alike. Channels last, because it was never slower: measured with a
    ResNet18 on a CPU, a training step takes as long at 64 px and two thirds at 224 px.
    """
    import torch

    device = pick_device(config.device)
    # The frozen network has to give the features that a cache would hold: float32.
    amp = device == "cuda" and not config.freeze_backbone and torch.cuda.is_bf16_supported()
    workers = num_cores() if config.workers is None else config.workers
    return Placement(device=device, amp=amp, channels_last=device != "mps", workers=workers)


def _place(model: nn.Module, placement: Placement) -> None:
    import torch

    layout = torch.channels_last if placement.channels_last else torch.preserve_format
    model.to(placement.device).to(memory_format=layout)


def check_input(model: nn.Module, info: BackboneInfo, config: FinetuneConfig) -> None:
    """Check that the network takes images of the size asked for.

    Raises:
        UserError: It does not.
    """
    import torch

    side = info.preprocessing.image_px
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{config.backbone} does not take images of {side} px ({reason}); "
            "choose another size with --image-px, for example 224"
        ) from error


def _read_splits(
    dataset: ImageDataset, prep: Preprocessing, config: FinetuneConfig, workers: int
) -> tuple[dict[str, Images], dict[str, int]]:
    wanted = ["train", "test"]
    if config.patience and "val" in dataset.splits:
        wanted.append("val")
    images, skipped = {}, {}
    for name in wanted:
        images[name], skipped[name] = read_images(dataset.splits[name], prep, config, workers)
    return images, skipped


def _check_batches(trainable: TrainableModel, num_train: int) -> None:
    """BatchNorm in train mode cannot average over one image.

    Raises:
        UserError: It would have to.
    """
    if trainable.uses_batch_statistics() and min(num_train, trainable.recipe.batch_size) < 2:
        what = "--batch-size 1" if num_train > 1 else "one train image"
        raise UserError(
            f"{what} gives BatchNorm nothing to average over: use at least 2, or --bn-eval True"
        )


def _decisive(
    recipe: TrainingRecipe,
    info: BackboneInfo,
    dataset: ImageDataset,
    placement: Placement,
    images: dict[str, Images],
    head_file: TensorFile | None,
) -> dict[str, Any]:
    """All that decides a run's outcome, as JSON."""
    kept = hashlib.sha256()
    for name in sorted(images):
        kept.update("\0".join([name, *images[name].split.ids, ""]).encode())
    return {
        "plan": dataclasses.asdict(recipe),
        "backbone": info.to_dict(),
        "dataset": dataset.fingerprint,
        "images": kept.hexdigest(),
        "init_head": head_file.sha256 if head_file else None,
        "device": placement.device,
        "versions": numeric_versions(info.backbone),
    }


def _file_name(recipe: TrainingRecipe, info: BackboneInfo, dataset: ImageDataset, key: str) -> str:
    what = "head" if recipe.freeze_backbone else "+".join(recipe.unfreeze) or "finetuned"
    return f"{dataset.name}-{info.file_name}-{what}-{key[:8]}.safetensors"

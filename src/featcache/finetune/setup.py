"""From settings to a run that is ready to train: data, network, device, names of files."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.backbone import build_classifier, identify
from featcache.cache import check_unlocked
from featcache.config import BackboneInfo, FinetuneConfig, JsonObject, Preprocessing
from featcache.data import ImageDataset, load_dataset
from featcache.display import say
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.finetune.activations import StageCache
from featcache.finetune.checkpoint import MARKS as CHECKPOINT_MARKS
from featcache.finetune.checkpoint import checkpoint_path, run_key
from featcache.finetune.parallel import ALONE, Team
from featcache.finetune.probe import head_to_start_from
from featcache.finetune.samples import Placement, Samples, hold_out, read_images
from featcache.finetune.trainable import TrainableModel, TrainingRecipe, resolve_recipe
from featcache.heads import LinearHead
from featcache.results import report_marks
from featcache.results.metrics import checked_weights
from featcache.runtime import num_cores, numeric_versions, pick_device
from featcache.tensor_files import MARKS as MODEL_MARKS
from featcache.tensor_files import TensorFile, read_tensor_file

if TYPE_CHECKING:
    from torch import nn


@dataclass(eq=False, kw_only=True)
class FinetuneRun:
    """Everything that a run works with.

    `decisive` is everything that decides its outcome, as JSON; `chosen_on` says in words which
    images a setting was chosen on; `read_seconds` is the time of reading and decoding before the
    first epoch; `checkpoint_s` is the least time between checkpoints; `stage_cache` holds the
    input of the stage that training starts from.
    """

    config: FinetuneConfig
    recipe: TrainingRecipe
    info: BackboneInfo
    dataset: ImageDataset
    placement: Placement
    trainable: TrainableModel
    train: Samples
    test: Samples
    held: Samples | None
    stage_cache: StageCache | None
    init_head: LinearHead | None
    chosen_on: str
    num_skipped: dict[str, int]
    read_seconds: float
    decisive: JsonObject
    output: Path
    probe: dict[str, float] = field(default_factory=dict)
    checkpoint_s: float = 0.0


def prepare(
    config: FinetuneConfig,
    dataset: ImageDataset | None = None,
    activations: Path | None = None,
    team: Team = ALONE,
) -> FinetuneRun:
    """Load data and network and check that they fit, before any long work.

    Args:
        config: The command's settings.
        dataset: What to train and score on; what the settings name unless given.
        activations: For `from_stage`, a cache of these images and perhaps others.
        team: The processes that train together.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
    """
    recipe = resolve_recipe(config)
    head_file = _check_given(config, team)
    info = identify(config, config.seed, config.cache_dir)
    dataset = dataset or _noted(load_dataset(config))
    if (weights := dataset.splits["train"].weights) is not None:
        checked_weights(weights, "train")
    names = dataset.class_names
    init_head = head_to_start_from(head_file, info, names) if head_file else None
    placement = choose_placement(config, team)
    trainable = _trainable(config, recipe, info, len(names))
    _place(trainable, placement)
    stage_cache = _stage_cache(config, recipe, dataset, activations)
    start = time.perf_counter()
    samples = _read_splits(dataset, info.preprocessing, config, placement, stage_cache)
    read_seconds = time.perf_counter() - start
    train, held, chosen_on = samples["train"], None, "nothing: no setting was chosen by a score"
    if recipe.patience:
        train, held, chosen_on = hold_out(train, samples.get("val"), config)
    _check_batches(trainable, len(train))
    decisive = _decisive(recipe, info, dataset, placement, samples, head_file)
    decisive |= stage_cache.decisive() if stage_cache else {}
    return FinetuneRun(
        config=config,
        recipe=recipe,
        info=info,
        dataset=dataset,
        placement=placement,
        trainable=trainable,
        train=train,
        test=samples["test"],
        held=held,
        stage_cache=stage_cache,
        init_head=init_head,
        chosen_on=chosen_on,
        num_skipped={n: len(dataset.splits[n]) - len(split) for n, split in samples.items()},
        read_seconds=read_seconds,
        decisive=decisive,
        output=config.output or config.cache_dir / _file_name(recipe, info, dataset, decisive),
    )


def _trainable(
    config: FinetuneConfig, recipe: TrainingRecipe, info: BackboneInfo, num_classes: int
) -> TrainableModel:
    """The network with a fresh head, on the CPU, divided by the recipe.

    Raises:
        UserError: The weights, the recipe or the size of images do not fit it.
    """
    network = build_classifier(config, num_classes, config.seed, info.weights_sha256)
    check_input(network, info, config)
    return TrainableModel(network, recipe, info)


def _check_given(config: FinetuneConfig, team: Team) -> TensorFile | None:
    """Check the files that the settings name; returns that of the head to start from, if any."""
    if config.output is not None:
        if config.output.suffix != ".safetensors":
            raise UserError(f"--output {config.output}: a model's name ends in .safetensors")
        if team.leads:  # to look, it locks
            check_unlocked(config.output)
        check_files(config, config.output)
    return read_tensor_file(config.init_head) if config.init_head else None


def _noted(dataset: ImageDataset) -> ImageDataset:
    if dataset.task == "regression":
        raise UserError(
            f"every image of {dataset.name} has a number: finetune is for classes and labels; run "
            "extract-features, then train-head on its cache"
        )
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


def choose_placement(config: FinetuneConfig, team: Team = ALONE) -> Placement:
    """Where and how to compute.

    The layout is fixed rather than timed on the spot, so that two runs with one seed, or a run and
    its continuation, round alike.
    """
    import torch

    device = pick_device(config.device)
    # The frozen network has to give the features that a cache would hold: float32.
    amp = device == "cuda" and not config.freeze_backbone and torch.cuda.is_bf16_supported()
    workers = config.workers
    if workers is None:
        workers = max(1, num_cores() // team.rank.local_size)
    layout = device in ("cpu", "cuda")
    return Placement(device=device, amp=amp, channels_last=layout, workers=workers, team=team)


def _place(trainable: TrainableModel, placement: Placement) -> None:
    import torch

    layout = torch.channels_last if placement.channels_last else torch.preserve_format
    for module in (trainable.model, trainable.network):  # a tail may have constants of its own
        module.to(placement.device).to(memory_format=layout)


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


def _stage_cache(
    config: FinetuneConfig,
    recipe: TrainingRecipe,
    dataset: ImageDataset,
    activations: Path | None,
) -> StageCache | None:
    """The input of the stage to train from; None where the whole network runs in every step."""
    if recipe.from_stage is None:
        return None
    if activations is not None:
        return StageCache.at(activations)
    return StageCache.made_or_found(config, flip=recipe.flip, dataset=dataset)


def _read_splits(
    dataset: ImageDataset,
    prep: Preprocessing,
    config: FinetuneConfig,
    placement: Placement,
    stage_cache: StageCache | None,
) -> dict[str, Samples]:
    wanted = ["train", "test"]
    if config.patience and "val" in dataset.splits:
        wanted.append("val")
    if stage_cache is not None:
        return {name: stage_cache.samples(dataset.splits[name]) for name in wanted}
    return {name: read_images(dataset.splits[name], prep, config, placement) for name in wanted}


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
    samples: dict[str, Samples],
    head_file: TensorFile | None,
) -> JsonObject:
    """All that decides a run's outcome, as JSON."""
    kept = hashlib.sha256()
    for name in sorted(samples):
        kept.update("\0".join([name, *samples[name].split.ids, ""]).encode())
    return {
        "plan": recipe.to_dict(),
        "backbone": info.to_dict(),
        "dataset": dataset.fingerprint,
        "images": kept.hexdigest(),
        "init_head": head_file.sha256 if head_file else None,
        "device": placement.device,
        "versions": numeric_versions(info.backbone),
        **({} if placement.team.rank.alone else {"num_processes": placement.team.rank.size}),
    }


def _file_name(
    recipe: TrainingRecipe, info: BackboneInfo, dataset: ImageDataset, decisive: JsonObject
) -> str:
    """The model's name, the same for any number of processes."""
    key = run_key({name: value for name, value in decisive.items() if name != "num_processes"})
    what = "head" if recipe.freeze_backbone else "+".join(recipe.unfreeze) or "finetuned"
    what = f"tail-{recipe.from_stage}" if recipe.from_stage else what
    what += "-stages" if recipe.all_stages else ""
    return f"{dataset.name}-{info.file_name}-{what}-{key[:8]}.safetensors"

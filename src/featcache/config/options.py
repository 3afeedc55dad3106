"""Groups of settings that several commands share: output, image paths, dataset, backbone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, Optional

from featcache.config.checks import check_pattern, check_range, check_types
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_PX,
    Pool,
    Preprocessing,
    Resize,
)
from featcache.config.settings import settings
from featcache.errors import UserError

LAST = ("last",)
LAYER = re.compile(r"[\w-]+(\.[\w-]+)*|cls\+mean")
"""What `--layers` may name."""


@settings
class OutputConfig:
    """What a command prints."""

    json: bool = False
    """Print exactly one JSON object on stdout; messages for people stay on stderr."""
    verbose: bool = False
    """Print more on stderr: what was chosen automatically, and the time of each stage."""


@settings
class ImagePathsConfig:
    """Where to find images, besides the name of the dataset."""

    data_root: Path = Path("data")
    """The folder that torchvision downloads its datasets to."""
    image_root: Optional[Path] = None
    """The folder that paths in a manifest are relative to. By default the manifest's own folder."""
    allow_outside: bool = False
    """Let a manifest name images anywhere: absolute paths, ../, links that leave its folder."""


@settings
class DataConfig(ImagePathsConfig):
    """Which images to use, and how to split them."""

    dataset: str
    """digits, the name of a torchvision dataset (cifar10, flowers102, ...), a folder of class
    folders (with train/ and test/ or val/, or one tree with --test-fraction), a CSV manifest with
    columns path,label[,split][,weight][,group] (the weight of a train row is 1 by default), or tar
    shards with cls, json or txt beside each image ('photos-{train,test}-{000..127}.tar', a folder
    of them, or a URL)."""
    num_train: Optional[int] = None
    """Use only this many train images: the first ones of a torchvision dataset; of a folder or
    manifest a seeded sample, stratified by class."""
    num_test: Optional[int] = None
    """Use only this many test images, chosen the same way."""
    test_fraction: Optional[float] = None
    """For a dataset without a test split: the fraction to set aside for testing, stratified by
    class and seeded (0.2 by default for digits and eurosat)."""
    group_from: Optional[str] = None
    """A regular expression whose first (...) finds in an image's id (its path in the dataset) the
    group that it belongs to: a patient, a student, a camera. Groups are never divided between train
    and test, or when settings are chosen. A manifest names them in its column group instead."""
    strict: bool = False
    """Refuse a dataset whose splits have groups or identical images in common, or in which
    identical images have different labels."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do about an unreadable image: fail stops the run and names it, skip leaves it out and
    records why."""
    seed: int = 42
    """Seed for samples, splits, views, random weights and training."""
    cache_dir: Path = Path("cache")
    """The folder for files that --output does not name."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.dataset.strip():
            raise UserError(
                "the dataset's name is empty: give digits, cifar10, a folder or a CSV file"
            )
        check_pattern("group_from", self.group_from)
        check_range("num_train", self.num_train, 1)
        check_range("num_test", self.num_test, 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(
                f"--test-fraction {self.test_fraction} is out of range: "
                "give a number between 0 and 1, for example 0.2"
            )


@settings
class BackboneConfig:
    """Which network to use, its weights, its input, and the device it runs on."""

    backbone: str = "resnet18"
    """The name of any torchvision classification network, or timm/NAME for any of timm's image
    models, such as timm/vit_small_patch14_dinov2.lvd142m (pip install "featcache[timm]")."""
    weights: str = "imagenet"
    """imagenet (the network's default pretrained weights, downloaded once), one of its other sets
    (IMAGENET1K_V2 of torchvision, a tag such as a1_in1k of timm), bundled (ResNet18 for 64 px,
    works offline), random, or a file with a matching state dict: .safetensors, or a checkpoint
    that torch.save wrote (.pth, .pt, .ckpt, .pth.tar, .bin)."""
    image_px: Optional[int] = None
    """Side of the network's square input in pixels. By default what the weights were made for."""
    resize: Optional[Resize] = None
    """squash resizes to a square; crop resizes the shorter side and crops the center. By default
    what the weights were made for."""
    normalize: Optional[Literal["imagenet", "half"]] = None
    """Mean and std of the input: ImageNet's, or 0.5 and 0.5. By default what the weights were made
    for."""
    fast_decode: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where that still is no smaller than the resized
    image: other features (cosine similarity 0.999) in less time, most of all from large images.
    What is trained on them decodes in the same way."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """What the network runs on; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("image_px", self.image_px, 8, MAX_IMAGE_PX)

    @property
    def asked_layers(self) -> tuple[str, ...]:
        """Layers whose outputs are the features."""
        return LAST

    @property
    def stage_pool(self) -> Pool | None:
        """How the outputs of layers are pooled; None for the last layer alone."""
        return None

    @property
    def cached_stage(self) -> str | None:
        """The stage whose input is cached; None for features."""
        return None

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """The weights' own preprocessing with this command's overrides applied."""
        changes: dict[str, Any] = {}
        if self.image_px is not None:
            # Keep the weights' ratio of the resized shorter side to the crop.
            scaled = round(own.resize_px * self.image_px / own.image_px)
            changes |= {"image_px": self.image_px, "resize_px": scaled}
        if self.resize is not None:
            changes["resize"] = self.resize
        if self.normalize is not None:
            imagenet = self.normalize == "imagenet"
            changes["mean"] = IMAGENET_MEAN if imagenet else HALF
            changes["std"] = IMAGENET_STD if imagenet else HALF
        if self.fast_decode:
            changes["fast_decode"] = True
        prep = dataclasses.replace(own, **changes)
        # squash ignores resize_px; one fixed value lets caches of equal features compare equal.
        same = prep.image_px if prep.resize == "squash" else prep.resize_px
        return dataclasses.replace(prep, resize_px=same)


@settings
class FeatureConfig(BackboneConfig):
    """Which outputs of which network are the features."""

    layers: str = "last"
    """Outputs of the network to cache side by side, from one forward pass, separated by commas:
    last (the input of its classification head), stages (every stage, then last), names of modules
    (layer3.1,layer4 or blocks.11), and of transformers cls (the class token), mean (of the patch
    tokens), cls+mean, and last4 (both, of each of the last 4 blocks)."""
    pool: Pool = "avg+std"
    """How the output of a stage or module becomes columns: each channel's mean over space, mean and
    standard deviation, maximum, or generalized mean (gem, power 3). layer3.max says it of one."""
    batchnorm: Literal["frozen", "adapt"] = "frozen"
    """adapt: estimate BatchNorm statistics again on train images, without their labels, before
    features are computed. The network is frozen from then on."""
    from_stage: Optional[str] = None
    """Cache the input of this stage (for example layer4) instead of features, for
    finetune --from-stage, which otherwise does so itself; with --layers stages, beside it the
    columns of the stages before."""

    def __post_init__(self) -> None:
        BackboneConfig.__post_init__(self)
        layers = self.asked_layers
        if len(set(layers)) < len(layers) or not all(map(LAYER.fullmatch, layers)):
            raise UserError(
                f"--layers {self.layers!r:.80}: give last, stages, cls, mean, cls+mean, last4 or "
                "names of modules, each once, separated by commas"
            )

    @property
    def asked_layers(self) -> tuple[str, ...]:
        """See `BackboneConfig.asked_layers`."""
        return tuple(name.strip() for name in self.layers.split(","))

    @property
    def stage_pool(self) -> Pool | None:
        """See `BackboneConfig.stage_pool`."""
        return None if self.asked_layers == LAST else self.pool

    @property
    def cached_stage(self) -> str | None:
        """See `BackboneConfig.cached_stage`."""
        return self.from_stage

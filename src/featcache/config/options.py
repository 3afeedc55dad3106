"""Groups of settings that several commands share: output, image paths, dataset, backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Optional

from featcache.config.checks import check_range, check_types
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_PX,
    Preprocessing,
    Resize,
)
from featcache.config.settings import settings
from featcache.errors import UserError


@settings
class OutputConfig:
    """How a command reports."""

    json: bool = False
    """Print exactly one JSON object on stdout; human text stays on stderr."""
    verbose: bool = False
    """Say more on stderr: choices made, timings of each stage."""


@settings
class ImagePathsConfig:
    """Where images lie, besides what names the dataset."""

    data_root: Path = Path("data")
    """Where torchvision keeps and downloads its datasets."""
    image_root: Optional[Path] = None
    """The folder that a manifest's paths start from; the manifest's own unless given."""
    allow_outside: bool = False
    """Let a manifest name pictures anywhere: absolute paths, ../, links out of its folder."""


@settings
class DataConfig(ImagePathsConfig):
    """Which images, split how."""

    dataset: str
    """digits, a torchvision dataset's name (cifar10, flowers102, ...), a folder of class folders
    (with train/ and test/ or val/, or one tree with --test-fraction), or a CSV manifest with
    columns path,label[,split][,weight] (how much a train row counts; 1 unless given)."""
    num_train: Optional[int] = None
    """Use only so many train images: the first ones of a torchvision dataset, a seeded sample
    stratified by class of a folder or manifest."""
    num_test: Optional[int] = None
    """Use only so many test images, chosen likewise."""
    test_fraction: Optional[float] = None
    """Share of a dataset without a test split to set aside for testing, stratified and seeded
    (digits: 0.2 unless given)."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an unreadable picture does: stop the run and name it, or skip it and record why."""
    seed: int = 42
    """Seed of samples, splits, views, random weights and training."""
    cache_dir: Path = Path("cache")
    """Where files go unless --output says otherwise."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.dataset.strip():
            raise UserError(
                "the dataset's name is empty: give digits, cifar10, a folder or a CSV file"
            )
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
    """Which network, with which weights, fed how, run where."""

    backbone: str = "resnet18"
    """Any torchvision classification network by name."""
    weights: str = "imagenet"
    """imagenet (torchvision's default, downloaded once), bundled (ResNet18, 64 px, offline),
    random, or a file with a matching state dict: .safetensors, or a checkpoint that torch.save
    wrote (.pth, .pt, .ckpt, .pth.tar, .bin)."""
    image_px: Optional[int] = None
    """Side of the network's square input; the weights' own unless given."""
    resize: Optional[Resize] = None
    """squash to a square, or resize the shorter side and crop the centre; the weights' own
    unless given."""
    normalize: Optional[Literal["imagenet", "half"]] = None
    """Mean and std: ImageNet's, or 0.5 and 0.5; the weights' own unless given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the network runs: auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("image_px", self.image_px, 8, MAX_IMAGE_PX)

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """The weights' own preprocessing with this command's overrides applied."""
        changes: dict[str, Any] = {}
        if self.image_px is not None:
            # Keep the ratio of the shorter side to the crop that the weights were made for.
            scaled = round(own.resize_px * self.image_px / own.image_px)
            changes |= {"image_px": self.image_px, "resize_px": scaled}
        if self.resize is not None:
            changes["resize"] = self.resize
        if self.normalize is not None:
            imagenet = self.normalize == "imagenet"
            changes["mean"] = IMAGENET_MEAN if imagenet else HALF
            changes["std"] = IMAGENET_STD if imagenet else HALF
        prep = dataclasses.replace(own, **changes)
        # A squashed picture has no separate resize: one value, so that equal work compares equal.
        same = prep.image_px if prep.resize == "squash" else prep.resize_px
        return dataclasses.replace(prep, resize_px=same)

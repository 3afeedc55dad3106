"""The settings of every command: a field is a flag, its docstring the help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Optional

from featcache.config.checks import check_positive, check_range, check_types
from featcache.config.python import settings
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_PX,
    Preprocessing,
    Resize,
    Views,
)
from featcache.errors import UserError

Solver = Literal["logistic", "ridge", "adam", "sgd", "knn", "auto"]
Backend = Literal["auto", "numpy", "sklearn", "torch"]
# Of other files, --force replaces none.
CACHE_SUFFIXES = (".h5", ".hdf5")


@settings
class OutputConfig:
    """How a command reports."""

    json: bool = False
    """Print exactly one JSON object on stdout; human text stays on stderr."""
    verbose: bool = False
    """Say more on stderr: choices made, timings of each stage."""


@settings
class PlaceConfig:
    """Where images lie, besides what names the dataset."""

    data_root: Path = Path("data")
    """Where torchvision keeps and downloads its datasets."""
    image_root: Optional[Path] = None
    """The folder that a manifest's paths start from; the manifest's own unless given."""
    allow_outside: bool = False
    """Let a manifest name pictures anywhere: absolute paths, ../, links out of its folder."""


@settings
class DataConfig(PlaceConfig):
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


@settings
class ExtractConfig(OutputConfig, BackboneConfig, DataConfig):
    """Run the frozen backbone once over every split and cache its features in one HDF5 file.

    Asked again for the same, it says so and does no work; a killed run goes on where it was.
    """

    views: str = "none"
    """none, flip (also cache the mirrored view), or N (cache N seeded random-resized-crop-and-flip
    views); view 0 is always the plain image."""
    dtype: Literal["float32", "float16"] = "float32"
    """How features are stored."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What runs the network; auto measures what is installed."""
    precision: Literal["float32", "int8", "amp"] = "float32"
    """How the network computes: int8 needs the openvino engine, amp a GPU."""
    batch_size: Optional[int] = None
    """Images per forward pass; measured unless given. Does not change the features."""
    workers: Optional[int] = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    output: Optional[Path] = None
    """The cache file; a name in --cache-dir made from the settings unless given."""
    force: bool = False
    """Extract again even if the cache exists, and replace it."""
    update: bool = False
    """The dataset changed: compute only new or changed images and those that were left out,
    keep the other rows."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        Views.parse(self.views, self.seed)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("workers", self.workers, 0, 1024)
        if self.force and self.update:
            raise UserError("--force starts afresh and --update keeps rows: give one of them")
        if self.output is not None and self.output.suffix.lower() not in CACHE_SUFFIXES:
            raise UserError(f"--output {self.output}: a cache's name ends in .h5")
        if self.precision == "int8" and self.engine == "torch":
            raise UserError("--precision int8 needs --engine openvino (or leave --engine out)")


@settings
class TrainHeadConfig(OutputConfig):
    """Fit a head on cached features; hyper-parameters are chosen without the test split."""

    cache: Path
    """A file written by extract-features."""
    solver: Solver = "logistic"
    """logistic (multinomial, L2, to convergence), ridge (closed form), adam or sgd (the notebook's
    loop), knn, or auto (try several, keep the best by the selection score)."""
    backend: Backend = "auto"
    """What solves logistic: numpy, sklearn or torch; auto takes the fastest to start."""
    epochs: int = 3
    """Passes over train (adam, sgd)."""
    lr: Optional[float] = None
    """Learning rate (adam 1e-3, sgd 1e-2 unless given)."""
    batch_size: int = 32
    """Rows per step (adam, sgd)."""
    weight_decay: float = 0.0
    """L2 penalty of the step (adam, sgd)."""
    sweep: bool = False
    """Train many learning rates and decays together and choose among them (adam, sgd)."""
    C: Optional[float] = None
    """Use this inverse strength of the regularization instead of choosing one, as in scikit-learn's
    LogisticRegression (logistic)."""
    alpha: Optional[float] = None
    """Use this strength of the regularization instead of choosing one, as in scikit-learn's Ridge
    (ridge)."""
    k: Optional[int] = None
    """Use this number of neighbors instead of choosing one (knn)."""
    strength: Optional[float] = None
    """The old name of --C, --alpha and --k; give the one of your solver."""
    select: Literal["holdout", "cv"] = "holdout"
    """Choose on a held-out part of train, or by k-fold cross-validation on train."""
    holdout: float = 0.2
    """Share of train that chooses, stratified and seeded."""
    folds: int = 5
    """Folds of --select cv."""
    standardize: Literal["auto", "on", "off"] = "auto"
    """Scale every feature to unit variance on train; auto chooses on the held-out part."""
    class_weight: Literal["none", "balanced"] = "none"
    """balanced weighs classes by the inverse of their frequency."""
    shots: Optional[int] = None
    """Use only K train rows of each class, and repeat with --num-seeds samples."""
    num_seeds: int = 5
    """How many samples --shots draws."""
    tta: bool = False
    """Average the test prediction over the cached views instead of using view 0 alone."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Train in bounded memory; auto does when the cache is large against free memory."""
    seed: int = 42
    """Seed of the held-out part, of shuffling and of initial weights."""
    cache_dir: Optional[Path] = None
    """Where the head goes unless --output says otherwise; beside the cache unless given."""
    output: Optional[Path] = None
    """The head file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("epochs", self.epochs, 1, 1_000_000)
        check_positive("lr", self.lr)
        check_range("batch_size", self.batch_size, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_positive("C", self.C)
        check_positive("alpha", self.alpha)
        check_range("k", self.k, 1)
        check_positive("strength", self.strength)
        check_range("folds", self.folds, 2, 100)
        check_range("shots", self.shots, 1)
        check_range("num_seeds", self.num_seeds, 1, 1000)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.2")


@settings
class FinetuneConfig(OutputConfig, BackboneConfig, DataConfig):
    """Train the whole network (or, with --freeze-backbone, its head) on the images themselves."""

    recipe: Literal["notebook", "good"] = "notebook"
    """notebook: Adam, one rate, no schedule. good: linear probe first, lower backbone rate, warm-up
    and cosine schedule, weight decay. Flags given explicitly win over the recipe."""
    epochs: Optional[int] = None
    """Passes over train (notebook 3, good 5 unless given)."""
    lr: Optional[float] = None
    """Learning rate (notebook 1e-3)."""
    backbone_lr: Optional[float] = None
    """Learning rate of everything but the head; --lr unless given."""
    batch_size: int = 32
    """Images per step."""
    optimizer: Optional[Literal["adam", "adamw", "sgd"]] = None
    """adam for the notebook's recipe, adamw for the good one, unless given."""
    weight_decay: Optional[float] = None
    """Weight decay; 0 for the notebook's recipe unless given."""
    schedule: Optional[Literal["constant", "cosine"]] = None
    """cosine has one tenth of the steps as warm-up."""
    freeze_backbone: bool = False
    """Train the head alone with the frozen network in the loop: the uncached linear probe."""
    unfreeze: Optional[str] = None
    """Train only the head and modules whose name starts so, e.g. layer4."""
    bn_eval: Optional[bool] = None
    """Keep BatchNorm statistics as they are (always so for frozen parts)."""
    init_head: Optional[Path] = None
    """Start from this head (a file from train-head) instead of a random one."""
    flip: Optional[bool] = None
    """Mirror train images at random (on unless given)."""
    patience: Optional[int] = None
    """Stop early after so many epochs without gain on a held-out part of train."""
    holdout: float = 0.1
    """Share of train held out by --patience."""
    score: Literal["epoch", "end"] = "epoch"
    """Score the test split after every epoch, as the notebook does, or once at the end."""
    workers: Optional[int] = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    resume: bool = True
    """Start afresh; unless given, resume from the last epoch's checkpoint of the same run (resume
    is True)."""
    output: Optional[Path] = None
    """The model file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        check_range("epochs", self.epochs, 1, 100_000)
        check_positive("lr", self.lr)
        check_range("backbone_lr", self.backbone_lr, 0)
        check_range("batch_size", self.batch_size, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("patience", self.patience, 1)
        check_range("workers", self.workers, 0, 1024)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.1")
        if self.freeze_backbone and self.unfreeze:
            raise UserError("--freeze-backbone and --unfreeze contradict each other: give one")
        if self.freeze_backbone and self.backbone_lr is not None:
            raise UserError("--freeze-backbone trains the head alone: leave --backbone-lr out")


@settings
class InfoConfig(OutputConfig):
    """Show what a cache holds and where it came from."""

    cache: Path
    """A file written by extract-features."""

    def __post_init__(self) -> None:
        check_types(self)


@settings
class VerifyConfig(OutputConfig, PlaceConfig):
    """Check a cache's structure, checksums, labels, ids and ranges, and name damaged rows."""

    cache: Path
    """A file written by extract-features."""
    repair: bool = False
    """Compute the damaged blocks again; needs --dataset."""
    dataset: Optional[str] = None
    """The dataset that the cache was made from, for --repair."""
    weights: Optional[str] = None
    """The weights file that the cache was made with, where they were given by file."""
    seed: int = 42
    """The seed that the cache was made with."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.dataset is not None and not self.repair:
            raise UserError("--dataset is for --repair: leave it out, or add --repair")

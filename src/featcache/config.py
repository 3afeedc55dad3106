"""Every setting of every command, as frozen dataclasses checked when they are built.

The command line is generated from these classes: a field is a flag, its docstring the help.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from featcache.errors import UserError

Resize = Literal["squash", "crop"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Solver = Literal["logistic", "ridge", "adam", "sgd", "knn", "auto"]
Backend = Literal["auto", "numpy", "sklearn", "torch"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MAX_IMAGE_PX = 4096
MAX_VIEWS = 256


def _check(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise UserError unless `value` is None or a number in [low, high]."""
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    raise UserError(f"--{name.replace('_', '-')} {value} is out of range: give a number {wanted}")


def _check_positive(name: str, value: float | None) -> None:
    """Raise UserError unless `value` is None or a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} {value} is out of range: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the network's input; weights own theirs.

    `crop` resizes the shorter side to `resize_px` and cuts the central square of `image_px`;
    `squash` resizes to `image_px` x `image_px`, whatever the aspect ratio. Pixels are then
    scaled to [0, 1], and `mean` and `std` are per channel, red first.
    """

    image_px: int
    resize: Resize
    resize_px: int
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check("image_px", self.image_px, 8, MAX_IMAGE_PX)
        _check("resize_px", self.resize_px, self.image_px, 2 * MAX_IMAGE_PX)
        for name, allowed in (
            ("resize", ("squash", "crop")),
            ("interpolation", ("nearest", "bilinear", "bicubic")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r}: one of {', '.join(allowed)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean {self.mean} and std {self.std}: three numbers each, std above 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `dataclasses.asdict` output that went through JSON.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        try:
            lists = {key: tuple(float(x) for x in values[key]) for key in ("mean", "std")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"not a preprocessing record: {values!r:.200}") from error


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """Which frozen network made the features.

    `weights_sha256` is that of the weights file; for `random` weights, of the tensors.
    """

    backbone: str
    weights: str
    weights_sha256: str
    feature_dim: int
    preprocessing: Preprocessing


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which versions of each image are cached; view 0 is always the plain image.

    `flip` adds its mirror image; `random` adds `num - 1` seeded random-resized-crop-and-flip views.
    """

    kind: Literal["none", "flip", "random"] = "none"
    num: int = 1
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int) -> Self:
        """Read the value of `--views`: none, flip, or the number of random views to add.

        Raises:
            UserError: The text is none of these.
        """
        if text == "none":
            return cls()
        if text == "flip":
            return cls(kind="flip", num=2)
        if text.isascii() and text.isdigit() and 1 <= int(text) < MAX_VIEWS:
            return cls(kind="random", num=int(text) + 1, seed=seed)
        raise UserError(f"--views {text!r}: give none, flip, or a number from 1 to {MAX_VIEWS - 1}")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Which images the rows stand for.

    `fingerprint` is a sha256 over class names and, for every split, the ordered ids, labels and
    content hashes; it does not depend on where the files lie nor on their modification times.
    """

    name: str
    kind: str
    fingerprint: str
    num_train: int | None
    num_test: int | None
    test_fraction: float | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class CacheMeta:
    """What a cache says about itself; stored in the file as canonical JSON.

    `versions` holds the libraries whose version can change a feature. No clock and no host is in
    here: two runs that would write the same rows have equal metadata, which is the resume key.
    """

    backbone: BackboneInfo
    dataset: DatasetInfo
    views: Views
    dtype: Literal["float32", "float16"]
    precision: str
    engine: str
    versions: dict[str, str]

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from parsed JSON.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        try:
            parts = dict(values)
            backbone = dict(parts.pop("backbone"))
            prep = Preprocessing.from_dict(dict(backbone.pop("preprocessing")))
            return cls(
                backbone=BackboneInfo(preprocessing=prep, **backbone),
                dataset=DatasetInfo(**parts.pop("dataset")),
                views=Views(**parts.pop("views")),
                **parts,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"not a cache's metadata: {error}") from error

    def differences(self, wanted: CacheMeta) -> list[tuple[str, object, object]]:
        """Fields in which `wanted` differs, as (dotted name, value here, value wanted)."""
        here, there = flatten(dataclasses.asdict(self)), flatten(dataclasses.asdict(wanted))
        names = sorted(here.keys() | there.keys())
        return [(n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n)]


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """How a command reports."""

    json: bool = False
    """Print exactly one JSON object on stdout; human text stays on stderr."""
    verbose: bool = False
    """Say more on stderr: choices made, timings of each stage."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, split how."""

    dataset: str
    """digits, a torchvision dataset's name (cifar10, flowers102, ...), a folder of class folders
    (with train/ and test/ or val/, or one tree with --test-fraction), or a CSV manifest with
    columns path,label[,split]."""
    data_root: Path = Path("data")
    """Where torchvision keeps and downloads its datasets."""
    num_train: int | None = None
    """Use only so many train images: the first ones of a torchvision dataset, a seeded sample
    stratified by class of a folder or manifest."""
    num_test: int | None = None
    """Use only so many test images, chosen likewise."""
    test_fraction: float | None = None
    """Share of a dataset without a test split to set aside for testing, stratified and seeded
    (digits: 0.2 unless given)."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an unreadable picture does: stop the run and name it, or skip it and record why."""
    seed: int = 42
    """Seed of samples, splits, views, random weights and training."""
    cache_dir: Path = Path("cache")
    """Where files go unless --output says otherwise."""

    def __post_init__(self) -> None:
        if not self.dataset.strip():
            raise UserError("the dataset's name is empty: give digits, a folder, a CSV file, ...")
        _check("num_train", self.num_train, 1)
        _check("num_test", self.num_test, 1)
        _check("seed", self.seed, 0, 2**32 - 1)
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(
                f"--test-fraction {self.test_fraction} is out of range: "
                "give a number between 0 and 1, for example 0.2"
            )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network, with which weights, fed how, run where."""

    backbone: str = "resnet18"
    """Any torchvision classification network by name."""
    weights: str = "imagenet"
    """imagenet (torchvision's default, downloaded once), bundled (ResNet18, 64 px, offline),
    random, or a .safetensors or .pth file with a matching state dict."""
    image_px: int | None = None
    """Side of the network's square input; the weights' own unless given."""
    resize: Resize | None = None
    """squash to a square, or resize the shorter side and crop the centre; the weights' own
    unless given."""
    normalize: Literal["imagenet", "half"] | None = None
    """Mean and std: ImageNet's, or 0.5 and 0.5; the weights' own unless given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the network runs: auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check("image_px", self.image_px, 8, MAX_IMAGE_PX)

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


@dataclass(frozen=True, kw_only=True)
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
    batch_size: int | None = None
    """Images per forward pass; measured unless given. Does not change the features."""
    workers: int | None = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    output: Path | None = None
    """The cache file; a name in --cache-dir made from the settings unless given."""
    force: bool = False
    """Extract again even if the cache exists, and replace it."""
    update: bool = False
    """The dataset changed: compute only new or changed images, keep the other rows."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        Views.parse(self.views, self.seed)
        _check("batch_size", self.batch_size, 1, 65536)
        _check("workers", self.workers, 0, 1024)
        if self.force and self.update:
            raise UserError("--force starts afresh and --update keeps rows: give one of them")
        if self.precision == "int8" and self.engine == "torch":
            raise UserError("--precision int8 needs --engine openvino (or leave --engine out)")


@dataclass(frozen=True, kw_only=True)
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
    lr: float | None = None
    """Learning rate (adam 1e-3, sgd 1e-2 unless given)."""
    batch_size: int = 32
    """Rows per step (adam, sgd)."""
    weight_decay: float = 0.0
    """L2 penalty of the step (adam, sgd)."""
    sweep: bool = False
    """Train many learning rates and decays together and choose among them (adam, sgd)."""
    strength: float | None = None
    """Use this regularisation strength instead of choosing one: C of logistic regression, alpha of
    ridge, k of knn."""
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
    shots: int | None = None
    """Use only K train rows of each class, and repeat with --num-seeds samples."""
    num_seeds: int = 5
    """How many samples --shots draws."""
    tta: bool = False
    """Average the test prediction over the cached views instead of using view 0 alone."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Train in bounded memory; auto does when the cache is large against free memory."""
    seed: int = 42
    """Seed of the held-out part, of shuffling and of initial weights."""
    cache_dir: Path = Path("cache")
    """Where the head goes unless --output says otherwise."""
    output: Path | None = None
    """The head file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        _check("epochs", self.epochs, 1, 1_000_000)
        _check_positive("lr", self.lr)
        _check("batch_size", self.batch_size, 1)
        _check("weight_decay", self.weight_decay, 0)
        _check_positive("strength", self.strength)
        _check("folds", self.folds, 2, 100)
        _check("shots", self.shots, 1)
        _check("num_seeds", self.num_seeds, 1, 1000)
        _check("seed", self.seed, 0, 2**32 - 1)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.2")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(OutputConfig, BackboneConfig, DataConfig):
    """Train the whole network (or, with --freeze-backbone, its head) on the images themselves."""

    recipe: Literal["notebook", "good"] = "notebook"
    """notebook: Adam, one rate, no schedule. good: linear probe first, lower backbone rate, warm-up
    and cosine schedule, weight decay. Flags given explicitly win over the recipe."""
    epochs: int | None = None
    """Passes over train (notebook 3, good 5 unless given)."""
    lr: float | None = None
    """Learning rate (notebook 1e-3)."""
    backbone_lr: float | None = None
    """Learning rate of everything but the head; --lr unless given."""
    batch_size: int = 32
    """Images per step."""
    optimizer: Literal["adam", "adamw", "sgd"] | None = None
    """adam for the notebook's recipe, adamw for the good one, unless given."""
    weight_decay: float | None = None
    """Weight decay; 0 for the notebook's recipe unless given."""
    schedule: Literal["constant", "cosine"] | None = None
    """cosine has one tenth of the steps as warm-up."""
    freeze_backbone: bool = False
    """Train the head alone with the frozen network in the loop: the uncached linear probe."""
    unfreeze: str | None = None
    """Train only the head and modules whose name starts so, e.g. layer4."""
    bn_eval: bool | None = None
    """Keep BatchNorm statistics as they are (always so for frozen parts)."""
    init_head: Path | None = None
    """Start from this head (a file from train-head) instead of a random one."""
    flip: bool | None = None
    """Mirror train images at random (on unless given)."""
    patience: int | None = None
    """Stop early after so many epochs without gain on a held-out part of train."""
    holdout: float = 0.1
    """Share of train held out by --patience."""
    workers: int | None = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    resume: bool = True
    """Go on from the last epoch's checkpoint of the same run."""
    output: Path | None = None
    """The model file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        _check("epochs", self.epochs, 1, 100_000)
        _check_positive("lr", self.lr)
        _check("backbone_lr", self.backbone_lr, 0)
        _check("batch_size", self.batch_size, 1)
        _check("weight_decay", self.weight_decay, 0)
        _check("patience", self.patience, 1)
        _check("workers", self.workers, 0, 1024)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.1")
        if self.freeze_backbone and self.unfreeze:
            raise UserError("--freeze-backbone and --unfreeze contradict each other: give one")

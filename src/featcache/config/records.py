"""What caches, heads and models record of how they were made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from featcache.config.checks import Record, check_range, record_from_json
from featcache.errors import UserError, one_of

Resize = Literal["squash", "crop"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Pool = Literal["avg", "avg+std", "max", "gem"]
Task = Literal["multiclass", "multilabel", "regression"]
"""What an image has: one class, any number of labels, or a number."""
Precision = Literal["float32", "int8", "amp"]

JsonObject = dict[str, Any]
"""A JSON object whose fields are not checked yet, or one that is about to be written."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MAX_IMAGE_PX = 4096
MAX_VIEWS = 256
TIMM = "timm/"
"""How the names of timm's networks begin."""
OWN_MODULE = "module/"
"""How the names of networks begin that were given as modules in Python."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input. Every set of weights has its own.

    `crop` resizes the shorter side to `resize_px` and cuts the central square of `image_px`;
    `squash` resizes to `image_px` x `image_px`, whatever the aspect ratio. Pixels are then
    scaled to [0, 1], and `mean` and `std` are per channel, red first. With `fast_decode`, JPEGs are
    decoded at 1/2, 1/4 or 1/8 of their size where that still is no smaller than the resized image.
    """

    image_px: int
    resize: Resize
    resize_px: int
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fast_decode: bool = False

    def __post_init__(self) -> None:
        check_range("image_px", self.image_px, 8, MAX_IMAGE_PX)
        check_range("resize_px", self.resize_px, self.image_px, 2 * MAX_IMAGE_PX)
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean} and std {self.std}: three finite numbers each, std above 0"
            )

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        """Rebuild from `dataclasses.asdict` output that went through JSON.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        return _from_dict(cls, values, "a preprocessing record")

    def to_dict(self) -> JsonObject:
        """As JSON; with plain decoding it is what version 0.1.0 wrote."""
        values = dataclasses.asdict(self)
        if not self.fast_decode:
            del values["fast_decode"]
        return values


@dataclass(frozen=True, kw_only=True)
class StageColumns:
    """Which columns of the features come from which layer of the network.

    Attributes:
        pool: What a layer's output over space becomes, unless a group's name says otherwise.
        names: Groups of columns in order, each a layer and how it was pooled, such as
            "layer1.mean"; "cls" and "mean" are of a transformer's final tokens, and "last" is what
            the network gives by itself.
        widths: Number of columns of each group.
    """

    pool: Pool
    names: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct = len(set(self.names)) == len(self.names) == len(self.widths)
        if not self.names or not distinct or min(self.widths) < 1:
            raise UserError(f"columns {self.names!r:.80} of {self.widths!r:.80}")

    @property
    def num_columns(self) -> int:
        """Columns of all groups."""
        return sum(self.widths)

    def of_layers(self, layers: Container[str]) -> Self | None:
        """The columns of some layers; None if there are none."""
        groups = zip(self.names, self.widths, strict=True)
        kept = {name: width for name, width in groups if layer_of(name) in layers}
        if not kept:
            return None
        return dataclasses.replace(self, names=tuple(kept), widths=tuple(kept.values()))

    def layers(self) -> tuple[str, ...]:
        """The layers, each once, in order."""
        return tuple(dict.fromkeys(map(layer_of, self.names)))

    def group(self, name: str) -> slice:
        """Where the columns of a group, or of all groups of a layer, lie.

        Raises:
            UserError: There are no such columns.
        """
        places = [i for i, group in enumerate(self.names) if name in (group, layer_of(group))]
        if not places:
            raise UserError(one_of(name, {*self.names, *self.layers()}, "columns"))
        start, end = places[0], places[-1] + 1
        return slice(sum(self.widths[:start]), sum(self.widths[:end]))


def layer_of(group: str) -> str:
    """The layer that a group of columns comes from: that of "layer1.mean" is "layer1"."""
    return group.rpartition(".")[0] or group


@dataclass(frozen=True, kw_only=True)
class StageInput:
    """Which activations inside a network are cached instead of features.

    Attributes:
        stage: The stage that they are the input of, such as "layer4".
        shape: Of one image's, such as [C, H, W]; the cache holds them as one row.
    """

    stage: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.stage or not self.shape or min(self.shape) < 1:
            raise UserError(f"activations {self.stage!r:.80} of shape {self.shape!r:.80}")


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """Which frozen network made the features.

    `weights_sha256` is that of the weights file; for `random` weights and for a module given in
    Python, of the tensors. `stages` is None where the features are the last layer's alone. With
    `stage_input`, rows are activations for `finetune --from-stage`, not features, and after them
    the columns of `stages`, which come before that stage. `weight_set` is
    the library's name of published weights, such as IMAGENET1K_V2 or resnet18.a1_in1k; version
    0.1.0 did not record it.
    """

    backbone: str
    weights: str
    weights_sha256: str
    feature_dim: int
    preprocessing: Preprocessing
    stages: StageColumns | None = None
    stage_input: StageInput | None = None
    weight_set: str | None = None

    def __post_init__(self) -> None:
        cut = self.stage_input
        if cut is not None and math.prod(cut.shape) + self.num_columns != self.feature_dim:
            raise UserError(f"activations of shape {cut.shape} are not {self.feature_dim} numbers")

    @property
    def num_columns(self) -> int:
        """How many columns the layers in `stages` give."""
        return self.stages.num_columns if self.stages else 0

    @property
    def file_name(self) -> str:
        """Network and weights as a part of a file's name."""
        return f"{self.backbone.replace('/', '-')}-{Path(self.weights).stem}"

    @property
    def is_own_module(self) -> bool:
        """Whether the network was given as a module in Python: its name does not rebuild it."""
        return self.backbone.startswith(OWN_MODULE)

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        """Rebuild from `dataclasses.asdict` output that went through JSON.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        return _from_dict(cls, values, "a backbone's record")

    def to_dict(self) -> JsonObject:
        """As JSON; without what version 0.1.0 did not know it is what that version wrote."""
        values = {**dataclasses.asdict(self), "preprocessing": self.preprocessing.to_dict()}
        for name in ("stages", "stage_input", "weight_set"):
            if values[name] is None:
                del values[name]
        return values


def weights_text(backbone: Mapping[str, Any]) -> str:
    """What a `BackboneInfo` as JSON calls its weights: the library's name, or the user's."""
    return str(backbone.get("weight_set") or backbone.get("weights", "?"))


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
    `group_from` is the regular expression that found the groups in the ids, if one did.
    """

    name: str
    kind: str
    fingerprint: str
    num_train: int | None
    num_test: int | None
    test_fraction: float | None
    seed: int
    group_from: str | None = None
    task: Task = "multiclass"

    def to_dict(self) -> JsonObject:
        """As JSON; without groups, and with one class per image, it is what 0.1.0 wrote."""
        values = dataclasses.asdict(self)
        if self.group_from is None:
            del values["group_from"]
        if self.task == "multiclass":
            del values["task"]
        return values


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
    precision: Precision
    engine: str
    versions: dict[str, str]

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> JsonObject:
        """As JSON."""
        own = {"backbone": self.backbone.to_dict(), "dataset": self.dataset.to_dict()}
        return {**dataclasses.asdict(self), **own}

    @classmethod
    def from_dict(cls, values: JsonObject) -> Self:
        """Rebuild from parsed JSON.

        Raises:
            UserError: A field is missing, unknown or out of range.
        """
        return _from_dict(cls, values, "a cache's metadata")

    def differences(self, wanted: CacheMeta) -> list[tuple[str, object, object]]:
        """Fields in which `wanted` differs, as (dotted name, value here, value wanted)."""
        here, there = flatten(dataclasses.asdict(self)), flatten(dataclasses.asdict(wanted))
        names = sorted((here.keys() | there.keys()) - {"backbone.weight_set"})  # the hash decides
        return [(n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n)]


def _from_dict(kind: type[Record], values: JsonObject, what: str) -> Record:
    try:
        return record_from_json(kind, values)
    except ValueError as error:
        raise UserError(f"not {what}: {error}") from error


def flatten(nested: JsonObject, prefix: str = "") -> JsonObject:
    """Turn nested dicts into one with dotted names."""
    flat: JsonObject = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat

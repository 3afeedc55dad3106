"""Weights by name or file: found, downloaded if need be, and read once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.backbone import timm_networks
from featcache.backbone.networks import check_name
from featcache.config import TIMM, BackboneConfig, Preprocessing
from featcache.errors import UserError, shown
from featcache.runtime import import_torchvision
from featcache.tensor_files import State, TensorFile, read_bounded, too_large_for_memory

BUNDLED_BACKBONE = "resnet18"
BUNDLED_FILE = Path(__file__).parents[1] / "weights" / "resnet18_tinyimagenet64.safetensors"
NAMED_WEIGHTS = ("imagenet", "bundled", "random")
WAYS_OUT = (
    "use --weights bundled (ResNet18, 64 px, offline) or --weights FILE (.safetensors or .pth)"
)
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")  # .tar as in .pth.tar


class WeightsFile(TensorFile):
    """A weights file that was read once: safetensors, or what torch.save wrote."""

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The string metadata of a safetensors file; other files have none.

        Raises:
            UserError: Not a safetensors file, though its name says so.
        """
        return super().metadata if self.path.suffix == ".safetensors" else {}

    def tensors(self) -> State:
        """Tensors by name; nothing in the file is executed.

        Raises:
            UserError: The file is not a weights file, or takes too much memory.
        """
        try:
            if self.path.suffix == ".safetensors":
                return super().tensors()
            from featcache.backbone.checkpoint import (
                parse_checkpoint,  # late: a hit reads no weights
            )

            return parse_checkpoint(self.data, str(self.path))
        except MemoryError as error:
            raise too_large_for_memory(self.path) from error


def read_weights(path: Path) -> WeightsFile:
    """Read a weights file as a whole.

    Raises:
        UserError: There is no such file, it is not an ordinary file, or it is too large.
        StorageError: It cannot be read.
    """
    return WeightsFile(path, *read_bounded(path))


def is_pretrained(config: BackboneConfig) -> bool:
    """Whether the weights are a set that the network's library publishes."""
    return config.weights not in ("bundled", "random") and not is_file(config.weights)


def is_file(weights: str) -> bool:
    """Whether `--weights` names a file, rather than weights by another name."""
    return Path(weights).suffix in (".safetensors", *CHECKPOINT_SUFFIXES)


def weights_of(config: BackboneConfig) -> WeightsFile | None:
    """Read the weights of a command, downloading them if needed; None for random ones.

    Raises:
        UserError: They cannot be obtained.
    """
    if config.weights == "random":
        return None
    if not is_pretrained(config):
        return read_weights(given_file(config))
    if config.backbone.startswith(TIMM):
        return read_weights(timm_networks.weights_path(config))
    return read_weights(download(config))


def given_file(config: BackboneConfig) -> Path:
    """The file of bundled weights or of weights given by path.

    Raises:
        UserError: There is no such file, or it belongs to another backbone.
    """
    if config.weights == "bundled":
        if config.backbone != BUNDLED_BACKBONE:
            raise UserError(
                f"--weights bundled is a {BUNDLED_BACKBONE}, not a {config.backbone}: "
                f"use --backbone {BUNDLED_BACKBONE}, or --weights imagenet, random or FILE"
            )
        return BUNDLED_FILE
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(f"--weights {config.weights!r}: there is no such file; check the path")
    return path


def pretrained_name(config: BackboneConfig) -> str:
    """The library's name of the pretrained weights: IMAGENET1K_V2, or resnet18.a1_in1k of timm.

    Raises:
        UserError: There is no such network, or no such weights of it.
    """
    if config.backbone.startswith(TIMM):
        return timm_networks.full_name(config, pretrained=True)
    return str(weight_set(config).name)


def weight_set(config: BackboneConfig) -> Any:
    """One of torchvision's sets of weights for a network; its default one for `imagenet`.

    Raises:
        UserError: There is no such network, or no such set.
    """
    check_name(config.backbone)
    sets = import_torchvision("models").get_model_weights(config.backbone)
    if config.weights in sets.__members__:
        return sets[config.weights]
    if config.weights in NAMED_WEIGHTS or is_file(config.weights):
        return sets.DEFAULT
    raise UserError(
        f"--weights {config.weights!r}: give imagenet, bundled, random, a set of weights of "
        f"{config.backbone} ({', '.join(sets.__members__)}), or a file that ends in .safetensors "
        f"or {', '.join(CHECKPOINT_SUFFIXES)}{_near_weights(config.weights, sets.__members__)}"
    )


def _near_weights(given: str, sets: Iterable[str]) -> str:
    import difflib

    names = {name.lower(): name for name in (*NAMED_WEIGHTS, *sets)}
    near = difflib.get_close_matches(given.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def own_preprocessing(config: BackboneConfig, file: WeightsFile | None = None) -> Preprocessing:
    """The preprocessing that the weights were made for.

    A safetensors file may carry it as JSON in its metadata; otherwise it is that of the library's
    pretrained weights of the same network.

    Args:
        config: Which backbone and weights.
        file: What `weights_of` read; read again unless given.

    Raises:
        UserError: The file cannot be read, or its metadata has no valid preprocessing.
    """
    pretrained = is_pretrained(config)
    if not pretrained and config.weights != "random":
        file = file or read_weights(given_file(config))
        stored = file.metadata.get("preprocessing")
        if stored is not None:
            return _stored_preprocessing(file.path, stored)
    if config.backbone.startswith(TIMM):
        return timm_networks.own_preprocessing(config, pretrained=pretrained)
    preset = weight_set(config).transforms()
    return Preprocessing(
        image_px=preset.crop_size[0],
        resize="crop",
        resize_px=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _stored_preprocessing(path: Path, stored: str) -> Preprocessing:
    try:
        values = json.loads(stored)
        values.setdefault("resize_px", values["image_px"])
        return Preprocessing.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata has no usable preprocessing: {error}") from error


def download(config: BackboneConfig) -> Path:
    """Fetch torchvision's weights into torch.hub's folder, hash-checked, unless they are there.

    Raises:
        UserError: There are none, or they could not be downloaded.
    """
    import torch

    found = weight_set(config)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(found.url).name
    if path.is_file():
        return path
    from http.client import HTTPException  # late: its import takes as long as a cache hit's checks

    try:
        # torch.hub announces downloads on stdout, which belongs to the JSON; its bar is on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            found.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, ValueError, EOFError) as error:
        reason = shown(str(getattr(error, "reason", error))) or type(error).__name__
        raise UserError(
            f"the weights {found.name} of {config.backbone} could not be downloaded ({reason}); "
            f"{WAYS_OUT}"
        ) from error
    return path


def read_state(path: Path) -> State:
    """The state dict in a .safetensors or .pth file; nothing in the file is executed.

    Raises:
        UserError: The file is not a weights file.
    """
    return read_weights(path).tensors()

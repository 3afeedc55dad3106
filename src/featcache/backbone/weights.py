"""Weights by name or file: found, read without executing anything, and matched to a network."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbone.networks import classifiers, head_of
from featcache.config import BackboneConfig, Preprocessing
from featcache.errors import UserError, one_of
from featcache.runtime import import_torchvision

if TYPE_CHECKING:
    import torch
    from torch import nn

BUNDLED_BACKBONE = "resnet18"
BUNDLED_FILE = Path(__file__).parents[1] / "weights" / "resnet18_tinyimagenet64.safetensors"
NAMED_WEIGHTS = ("imagenet", "bundled", "random")
WAYS_OUT = (
    "use --weights bundled (ResNet18, 64 px, offline) or --weights FILE (.safetensors or .pth)"
)
# Wrappers that training scripts put around a state dict, outermost first.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "backbone")
KEY_PREFIXES = ("module.", "model.", "net.", "backbone.", "encoder.", "_orig_mod.")
# A small archive may unpack to anything; a checkpoint is stored, not compressed.
MAX_UNPACK_RATIO = 4

State = dict[str, "torch.Tensor"]


def weights_file(config: BackboneConfig) -> Path | None:
    """The file that holds the weights, once they are loaded; None for random weights."""
    if config.weights == "random":
        return None
    if config.weights == "imagenet":
        import torch

        url = imagenet_weights(config.backbone).url
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    return given_file(config)


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
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"--weights {config.weights!r}: give imagenet, bundled, random, "
            "or a file that ends in .safetensors or .pth" + _near_weights(config.weights)
        )
    if not path.is_file():
        raise UserError(f"--weights {config.weights!r}: there is no such file; check the path")
    return path


def _near_weights(given: str) -> str:
    import difflib

    near = difflib.get_close_matches(given, NAMED_WEIGHTS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def imagenet_weights(backbone: str) -> Any:
    """Default ImageNet weights of a classification network."""
    models = import_torchvision("models")
    if backbone not in classifiers():
        raise UserError(one_of(backbone, classifiers(), "backbone"))
    return models.get_model_weights(backbone).DEFAULT


def own_preprocessing(config: BackboneConfig) -> Preprocessing:
    """The preprocessing that the weights were made for.

    A safetensors file may carry it as JSON in its metadata; otherwise it is that of torchvision's
    ImageNet weights of the same network.
    """
    if config.weights not in ("imagenet", "random"):
        path = given_file(config)
        if path.suffix == ".safetensors":
            stored = safetensors_metadata(path).get("preprocessing")
            if stored is not None:
                return _stored_preprocessing(path, stored)
    preset = imagenet_weights(config.backbone).transforms()
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
        raise UserError(f"{path}: its metadata holds no usable preprocessing: {error}") from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file.

    Raises:
        UserError: Not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}; give another file") from error


def download(backbone: str) -> State:
    """Fetch torchvision's weights, hash-checked, or take them from torch.hub's folder."""
    weights = imagenet_weights(backbone)
    try:
        # torch.hub announces downloads on stdout, which belongs to the JSON; its bar is on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            state: State = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, ValueError, EOFError) as error:
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise UserError(
            f"the ImageNet weights of {backbone} could not be downloaded ({reason}); {WAYS_OUT}"
        ) from error
    return state


def read_state(path: Path) -> State:
    """Read a state dict from a .safetensors or .pth file; nothing in the file is executed.

    Raises:
        UserError: The file is not one, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _unwrapped(_read_checkpoint(path), path)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} claims more memory than there is; give another file") from error
    except Exception as error:  # every library error here means: not a usable weights file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as weights ({reason[:120]}); "
            "give a .safetensors file or a .pth state dict"
        ) from error


def _read_checkpoint(path: Path) -> object:
    import torch

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > MAX_UNPACK_RATIO * path.stat().st_size + 2**20:
            raise UserError(f"{path} unpacks to {unpacked} bytes, far above its size; not loaded")
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(loaded: object, path: Path) -> State:
    import torch

    for key in STATE_DICT_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors; give a state dict")
    return state


def _without_prefix(state: State, wanted: set[str]) -> State:
    """Strip the prefixes that wrappers put before every key, until keys match the network's."""
    while not wanted & state.keys():
        prefix = next((p for p in KEY_PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def load_matching(model: nn.Module, state: State, source: str, backbone: str) -> None:
    """Load everything but the head; a network of another shape is the user's mistake."""
    own = model.state_dict()
    state = _without_prefix(state, set(own))
    head = head_of(model)[0] + "."
    body = {k: v for k, v in own.items() if not k.startswith(head)}
    auxiliary = ("aux", "AuxLogits")
    given = {k: v for k, v in state.items() if not k.startswith((head, *auxiliary))}
    counters = {k for k in body if k.endswith("num_batches_tracked")}
    problems = list(_mismatches(body, given, counters))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} does not fit --backbone {backbone}: {'; '.join(problems[:3])}{more}; "
            "name the backbone that the weights were made for"
        )
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")
        own[name].copy_(tensor)


def _mismatches(body: State, given: State, optional: set[str]) -> Iterator[str]:
    for name in sorted(body.keys() - given.keys() - optional):
        yield f"{name} is missing"
    for name in sorted(given.keys() - body.keys()):
        yield f"{name} is not in the network"
    for name in sorted(body.keys() & given.keys()):
        if body[name].shape != given[name].shape:
            yield f"{name} is {list(given[name].shape)}, wanted {list(body[name].shape)}"

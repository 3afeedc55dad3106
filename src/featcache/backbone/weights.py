"""Weights by name or file: found, read once, and matched to a network."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbone.networks import classifiers, head_of
from featcache.config import BackboneConfig, Preprocessing
from featcache.errors import UserError, listed, one_of, shown
from featcache.runtime import import_torchvision, say
from featcache.tensor_files import State, TensorFile, read_bounded, too_large_for_memory

if TYPE_CHECKING:
    from torch import nn

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


def weights_of(config: BackboneConfig) -> WeightsFile | None:
    """Read the weights of a command, downloading them if needed; None for random ones.

    Raises:
        UserError: They cannot be obtained.
    """
    if config.weights == "imagenet":
        download(config.backbone)
    path = weights_file(config)
    return read_weights(path) if path else None


def weights_file(config: BackboneConfig) -> Path | None:
    """The file that holds the weights, once they are downloaded; None for random weights."""
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
    if path.suffix not in (".safetensors", *CHECKPOINT_SUFFIXES):
        raise UserError(
            f"--weights {config.weights!r}: give imagenet, bundled, random, or a file that ends in "
            f".safetensors or {', '.join(CHECKPOINT_SUFFIXES)}" + _near_weights(config.weights)
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


def own_preprocessing(config: BackboneConfig, file: WeightsFile | None = None) -> Preprocessing:
    """The preprocessing that the weights were made for.

    A safetensors file may carry it as JSON in its metadata; otherwise it is that of torchvision's
    ImageNet weights of the same network.

    Args:
        config: Which backbone and weights.
        file: What `weights_of` read; read again unless given.

    Raises:
        UserError: The file cannot be read, or its metadata has no valid preprocessing.
    """
    if config.weights not in ("imagenet", "random"):
        file = file or read_weights(given_file(config))
        stored = file.metadata.get("preprocessing")
        if stored is not None:
            return _stored_preprocessing(file.path, stored)
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
        raise UserError(f"{path}: its metadata has no usable preprocessing: {error}") from error


def download(backbone: str) -> None:
    """Fetch torchvision's weights into torch.hub's folder, hash-checked, unless they are there.

    Raises:
        UserError: There are none, or they could not be downloaded.
    """
    file = weights_file(BackboneConfig(backbone=backbone, weights="imagenet"))
    if file is not None and file.is_file():
        return
    from http.client import HTTPException  # late: its import takes as long as a cache hit's checks

    try:
        # torch.hub announces downloads on stdout, which belongs to the JSON; its bar is on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            imagenet_weights(backbone).get_state_dict(
                progress=True, check_hash=True, weights_only=True
            )
    except (OSError, HTTPException, RuntimeError, ValueError, EOFError) as error:
        reason = shown(str(getattr(error, "reason", error))) or type(error).__name__
        raise UserError(
            f"the ImageNet weights of {backbone} could not be downloaded ({reason}); {WAYS_OUT}"
        ) from error


def read_state(path: Path) -> State:
    """The state dict in a .safetensors or .pth file; nothing in the file is executed.

    Raises:
        UserError: The file is not a weights file.
    """
    return read_weights(path).tensors()


def _without_prefix(state: State, body: State, source: str) -> tuple[State, list[str]]:
    """Pick the network's own tensors out of everything that was saved with them.

    Training scripts put their network under a name (`module.`, `backbone.`, `encoder_q.`), with
    heads, queues and twins beside it. The right prefix is that under which most of the network's
    names are found.

    Returns:
        Tensors whose names began with the prefix, without it; and the names of the others.

    Raises:
        UserError: There are two networks, and neither is known to be the trained one.
    """
    deepest = 1 + max(name.count(".") for name in body)
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        ends = {".".join(parts[-n:]) for n in range(1, deepest + 1)}
        found.update(key.removesuffix(end) for end in ends & body.keys())
    most = max(found.values(), default=0)
    best = sorted((start for start in found if found[start] == most), key=len)
    # MoCo keeps a moving average, encoder_k, beside the network that was trained.
    trained = [start for start in best if start.endswith("encoder_q.")]
    if len(best) > 1 and len(trained) != 1 and most == len(body):
        names = listed([shown(start.rstrip(".") or "no prefix", 60) for start in best], 4)
        raise UserError(
            f"{source} holds more than one such network, under {names}: save the tensors of one"
        )
    prefix = (trained or best or [""])[0]
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return own, [k for k in state if not k.startswith(prefix)]


def load_matching(model: nn.Module, state: State, source: str, backbone: str) -> None:
    """Load everything but the head; a network of another shape is a UserError.

    Tensors beside the network, such as prototypes or a projection, are left out and named.
    """
    own = model.state_dict()
    head = head_of(model)[0] + "."
    body = {k: v for k, v in own.items() if not k.startswith(head)}
    counters = {k for k in body if k.endswith("num_batches_tracked")}
    needed = {k: v for k, v in body.items() if k not in counters}
    inside, beside = _without_prefix(state, needed, source)
    parts = {name.partition(".")[0] for name in own}
    heads = (head, "aux", "AuxLogits")
    given = {
        k: v for k, v in inside.items() if k.partition(".")[0] in parts and not k.startswith(heads)
    }
    problems = list(_mismatches(body, given, counters))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        keys = listed([shown(key, 60) for key in sorted(state)], 4)
        raise UserError(
            f"{source} does not fit --backbone {backbone}: {'; '.join(problems[:3])}{more}; "
            f"its keys are {keys} ({len(state)} in all); name the backbone that the weights were "
            "made for"
        )
    others = [k for k in (*inside, *beside) if k not in given and not k.startswith(heads)]
    if others:
        names = listed([shown(key, 60) for key in sorted(others)], 3)
        say(f"{source}: left out {len(others)} of its tensors, no part of a {backbone}: {names}")
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite")
        own[name].copy_(tensor)


def _mismatches(body: State, given: State, optional: set[str]) -> Iterator[str]:
    for name in sorted(body.keys() - given.keys() - optional):
        yield f"{name} is missing"
    for name in sorted(given.keys() - body.keys()):
        yield f"{shown(name, 80)} is not in the network"
    for name in sorted(body.keys() & given.keys()):
        if body[name].shape != given[name].shape:
            yield f"{name} is {list(given[name].shape)}, wanted {list(body[name].shape)}"

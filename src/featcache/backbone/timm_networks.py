"""Networks of timm: names such as timm/vit_small_patch14_dinov2.lvd142m, and their weights.

timm is an extra of featcache, imported only where one of its networks is asked for. A name may end
in a tag, which says where pretrained weights come from; without one, timm's own default counts.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.config import TIMM, BackboneConfig, Preprocessing
from featcache.errors import UserError, one_of, shown

if TYPE_CHECKING:
    from torch import nn

    from featcache.tensor_files import State

INSTALL = 'pip install "featcache[timm]"'
# Names of weights files in a repository of the Hugging Face hub, the first one preferred.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def import_timm() -> Any:
    """Import timm.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"networks of timm need it installed: type {INSTALL}") from error


def architecture_of(name: str) -> tuple[str, str]:
    """Take timm/NAME.TAG apart; the tag may be missing.

    Raises:
        UserError: timm is not installed, or has no such network or tag.
    """
    timm = import_timm()
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(architecture):
        raise UserError(one_of(name, (TIMM + known for known in timm.list_models()), "backbone"))
    if tag:
        _check_tag(architecture, tag)
    return architecture, tag


def _check_tag(architecture: str, tag: str) -> None:
    known = import_timm().list_models(f"{architecture}.*", pretrained=True)
    if f"{architecture}.{tag}" not in known:
        tags = [name.partition(".")[2] for name in known]
        raise UserError(one_of(tag, tags, f"weights of {TIMM}{architecture}"))


def weight_set(config: BackboneConfig) -> tuple[str, str]:
    """The architecture and the tag of the pretrained weights that a command asks for.

    Raises:
        UserError: There are none, or --backbone and --weights name two.
    """
    architecture, tag = architecture_of(config.backbone)
    asked = "" if config.weights == "imagenet" else config.weights.removeprefix(f"{architecture}.")
    if asked and tag and asked != tag:
        raise UserError(f"--backbone names the weights {tag}, --weights {asked}: give one of them")
    if asked:
        _check_tag(architecture, asked)
    tag = asked or tag or (_about(architecture).tag or "")
    if not import_timm().list_models(f"{architecture}.{tag}", pretrained=True):
        raise UserError(
            f"timm has no pretrained weights of {TIMM}{architecture}: give --weights random or FILE"
        )
    return architecture, tag


def _about(name: str) -> Any:
    """The record that timm has of an architecture with a tag, or with its default one."""
    return importlib.import_module("timm.models").get_pretrained_cfg(name)


def full_name(config: BackboneConfig, *, pretrained: bool) -> str:
    """The architecture, with the tag that counts; pretrained weights bring their own."""
    parts = weight_set(config) if pretrained else architecture_of(config.backbone)
    return ".".join(part for part in parts if part)


def build(name: str, image_px: int | None) -> nn.Module:
    """Build a network with its own head, weights drawn.

    Args:
        name: Of the network, with or without "timm/".
        image_px: Side of its input, unless timm's default; networks of any size ignore it.
    """
    network: nn.Module = import_timm().create_model(
        name.removeprefix(TIMM), **_size_options(name, image_px)
    )
    return network


def _size_options(name: str, image_px: int | None) -> dict[str, int]:
    about = _about(name.removeprefix(TIMM))
    fixed = about is not None and about.fixed_input_size
    if not fixed or image_px in (None, about.input_size[-1]):
        return {}
    assert image_px is not None
    return {"img_size": image_px}


def build_pretrained(name: str, state: State, image_px: int | None) -> nn.Module:
    """Build a network from pretrained weights as timm does, which renames and resizes tensors.

    Args:
        name: With or without "timm/" and tag.
        state: The tensors of the weights file, its head included.
        image_px: As for `build`.

    Raises:
        RuntimeError: The tensors are not those of the network.
    """
    with _quiet("timm"):
        network: nn.Module = import_timm().create_model(
            name.removeprefix(TIMM),
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": dict(state), "custom_load": False},
            **_size_options(name, image_px),
        )
    return network


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library's warnings off stderr: what matters becomes an error of one line."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def weights_path(config: BackboneConfig) -> Path:
    """The file of pretrained weights, from the local cache of Hugging Face or downloaded.

    Raises:
        UserError: It is not there and cannot be downloaded.
    """
    name = full_name(config, pretrained=True)
    about = _about(name)
    names = (about.hf_hub_filename,) if about.hf_hub_filename else HUB_FILES
    try:
        if about.hf_hub_id is None:
            raise UserError("they are not on the Hugging Face hub")
        with _quiet("huggingface_hub"):
            return _from_hub(about.hf_hub_id, names)
    except Exception as error:  # whatever the hub's client raises
        reason = shown(str(error.__cause__ or error).split("\n")[0]) or type(error).__name__
        raise UserError(
            f"the weights {name} of timm are not in the cache of Hugging Face and could not be "
            f"downloaded ({reason}); use --weights FILE (.safetensors or .pth) or random"
        ) from error


def _from_hub(repository: str, names: Sequence[str]) -> Path:
    """The first of some files of a repository: in the local cache, else downloaded."""
    hub = importlib.import_module("huggingface_hub")
    repo_id, _, revision = repository.partition("@")
    options = {"repo_id": repo_id, "revision": revision or None}
    for name in names:
        with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
            return Path(hub.hf_hub_download(filename=name, local_files_only=True, **options))
    try:
        return Path(hub.hf_hub_download(filename=names[0], **options))
    except hub.errors.LocalEntryNotFoundError:  # no network
        raise
    except hub.errors.EntryNotFoundError:
        return Path(hub.hf_hub_download(filename=names[-1], **options))


def own_preprocessing(config: BackboneConfig, *, pretrained: bool) -> Preprocessing:
    """The preprocessing that timm uses with a network's weights.

    Raises:
        UserError: It is one that featcache does not do, and no --resize replaces it.
    """
    name = full_name(config, pretrained=pretrained)
    about = _about(name)
    data = importlib.import_module("timm.data")
    found = data.resolve_data_config(pretrained_cfg=about.to_dict() if about else {})
    channels, side, other = found["input_size"]
    squash = found["crop_mode"] == "squash"
    known = found["crop_mode"] == "center" or (squash and found["crop_pct"] == 1.0)
    if channels != 3 or side != other or not (known or config.resize):
        raise UserError(
            f"{TIMM}{name} takes images of {channels} x {side} x {other}, "
            f"{found['crop_mode']} {found['crop_pct']}: featcache gives 3 channels, square, after "
            "--resize crop or squash"
        )
    return Preprocessing(
        image_px=side,
        resize="squash" if squash else "crop",
        resize_px=side if squash else math.floor(side / found["crop_pct"]),
        interpolation=found["interpolation"],
        mean=tuple(map(float, found["mean"])),
        std=tuple(map(float, found["std"])),
    )


def new_head(model: Any, num_classes: int) -> None:
    """Replace the head by a new one, drawn as timm does."""
    model.reset_classifier(num_classes)


def heads_of(model: Any) -> dict[str, nn.Module]:
    """The classification heads of one of timm's networks by their dotted names."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple | list) else [found]
    return {name: part for name, part in model.named_modules() if any(part is h for h in heads)}


def remove_heads(model: Any) -> int:
    """Take the heads off, as timm does; returns the width of the features."""
    model.reset_classifier(0)
    return int(model.head_hidden_size)

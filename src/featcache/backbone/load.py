"""Networks with their weights loaded: frozen without a head, or whole with a fresh one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from featcache.backbone import timm_networks
from featcache.backbone.matching import load_matching
from featcache.backbone.networks import (
    build_network,
    drawn_by,
    feature_dim_of,
    head_of,
    is_timm,
    remove_heads,
    state_sha256,
)
from featcache.backbone.weights import WeightsFile, is_pretrained, pretrained_name, weights_of
from featcache.config import TIMM, BackboneConfig, BackboneInfo, StageColumns
from featcache.display import say
from featcache.errors import UserError, shown
from featcache.random_order import init_linear
from featcache.tensor_files import State, not_finite

if TYPE_CHECKING:
    from torch import nn


def load_backbone(config: BackboneConfig, seed: int, info: BackboneInfo | None = None) -> nn.Module:
    """Load the frozen network without its head, on the CPU, in eval mode.

    Args:
        config: Which backbone and weights.
        seed: Draws `random` weights.
        info: What `identify` found: other weights are refused, and its layers are features too, or
            the input of one is what the network gives, with the columns of those before.

    Returns:
        A module mapping float32 images [N, 3, H, W] to features [N, D]; no parameter needs
        a gradient.

    Raises:
        UserError: Unknown backbone, or weights that are missing, do not fit, or have changed.
    """
    network = verified_network(config, seed, info.weights_sha256 if info else None)
    remove_heads(network)
    if info is None or info.stage_input is None:
        return frozen(network, info.stages if info else None)
    from featcache.backbone.tail import Front

    return Front(frozen(network), info.stage_input.stage, info.stages).eval()


def frozen(network: nn.Module, stages: StageColumns | None = None) -> nn.Module:
    """Freeze a network that gives features, and add the columns of its layers.

    Raises:
        UserError: It has no such layers.
    """
    network.requires_grad_(False).eval()
    if stages is None:
        return network
    from featcache.backbone.stages import StageFeatures

    return StageFeatures(network, stages.names).eval()


def build_classifier(
    config: BackboneConfig, num_classes: int, seed: int, sha256: str | None = None
) -> nn.Module:
    """Load the whole network with a fresh head for `num_classes`, every parameter trainable.

    Args:
        config: Which backbone and weights.
        num_classes: Outputs of the head.
        seed: Draws the head, and `random` weights.
        sha256: What `identify` found the weights to be; others are refused.

    Raises:
        UserError: Unknown backbone, or weights that are missing, do not fit, or have changed.
    """
    import torch
    from torch import nn

    model = verified_network(config, seed, sha256)
    if is_timm(model):
        with drawn_by(seed):
            timm_networks.new_head(model, num_classes)
    name, old = head_of(model)
    dim = feature_dim_of(old)
    weight, bias = (torch.from_numpy(array) for array in init_linear(dim, num_classes, seed))
    head: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Linear):
        head = nn.Linear(dim, num_classes)
    else:
        head, weight = nn.Conv2d(dim, num_classes, 1), weight[:, :, None, None]
    head.load_state_dict({"weight": weight, "bias": bias})
    model.set_submodule(name, head)
    return model


class OtherWeightsError(UserError):
    """The weights are not the ones that were asked for; `found` is their sha256."""

    def __init__(self, what: str, found: str) -> None:
        super().__init__(f"{what} changed during the run: run the same command again")
        self.found = found


def verified_network(config: BackboneConfig, seed: int, sha256: str | None) -> nn.Module:
    """The whole network, if its weights are those with the given sha256.

    Raises:
        OtherWeightsError: They are not.
        UserError: Unknown backbone, or weights that cannot be obtained or do not fit.
    """
    file = weights_of(config)
    if file is not None and sha256 not in (None, file.sha256):
        raise OtherWeightsError(str(file.path), file.sha256)
    model = loaded_network(config, seed, file)
    if file is None and sha256 is not None and sha256 != (found := state_sha256(model)):
        raise OtherWeightsError("what --weights random draws", found)
    return model


def loaded_network(config: BackboneConfig, seed: int, file: WeightsFile | None) -> nn.Module:
    """A network with all weights but those of its head, which is for the caller to replace.

    Args:
        config: Which backbone and weights.
        seed: Draws the weights where there is no file.
        file: What `weights_of` read.
    """
    if file is None:
        return build_network(config.backbone, seed=seed, image_px=config.image_px)
    of_timm, published = config.backbone.startswith(TIMM), is_pretrained(config)
    state, source = file.tensors(), str(file.path)
    if published:
        source = "timm's weights" if of_timm else "torchvision's weights"
    if published and of_timm:
        return _filled_by_timm(pretrained_name(config), state, config.image_px, source)
    model = build_network(config.backbone, seed=None, image_px=config.image_px)
    quiet = published or config.weights == "bundled"
    try:
        load_matching(model, state, source, config.backbone, quiet=quiet)
    except UserError:
        if not of_timm:
            raise
        # The original authors' names, or position embeddings for another size.
        with contextlib.suppress(UserError):
            model = _filled_by_timm(config.backbone, state, config.image_px, source)
            say(f"{source}, as weights of {config.backbone}: renamed and resized as timm does")
            return model
        raise
    return model


def _filled_by_timm(name: str, state: State, image_px: int | None, source: str) -> nn.Module:
    """One of timm's networks with pretrained weights, every tensor in its place and finite."""
    with drawn_by(None):
        try:
            model = timm_networks.build_pretrained(name, state, image_px)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = shown(" ".join(str(error).split()), 200)
            raise UserError(f"{source} do not fit {name}: {reason}") from error
    key = not_finite(model.state_dict())
    if key is not None:
        raise UserError(f"{source} of {name}: {key} has values that are not finite")
    return model

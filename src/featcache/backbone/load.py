"""Networks with their weights loaded: frozen without a head, or whole with a fresh one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.backbone.networks import build_network, feature_dim_of, head_of, state_sha256
from featcache.backbone.weights import WeightsFile, load_matching, weights_of
from featcache.config import BackboneConfig, BackboneInfo, StageColumns
from featcache.errors import UserError
from featcache.random_order import init_linear

if TYPE_CHECKING:
    from torch import nn


def load_backbone(config: BackboneConfig, seed: int, info: BackboneInfo | None = None) -> nn.Module:
    """Load the frozen network without its head, on the CPU, in eval mode.

    Args:
        config: Which backbone and weights.
        seed: Draws `random` weights.
        info: What `identify` found: other weights are refused, and its stages are features too,
            or the input of one is what the network gives.

    Returns:
        A module mapping float32 images [N, 3, H, W] to features [N, D]; no parameter needs
        a gradient.

    Raises:
        UserError: Unknown backbone, or weights that are missing, do not fit, or have changed.
    """
    network = verified_network(config, seed, info.weights_sha256 if info else None)
    if info is None or info.stage_input is None:
        return without_head(network, info.stages if info else None)
    from featcache.backbone.tail import Front

    return Front(without_head(network), info.stage_input.stage).eval()


def without_head(model: nn.Module, stages: StageColumns | None = None) -> nn.Module:
    """Take the head off a network, freeze the rest, and add the columns of its stages."""
    from torch import nn

    model.set_submodule(head_of(model)[0], nn.Identity())
    model.requires_grad_(False).eval()
    if stages is None:
        return model
    from featcache.backbone.stages import StageFeatures

    return StageFeatures(model, stages.names).eval()


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
        return build_network(config.backbone, seed=seed)
    model = build_network(config.backbone, seed=None)
    source = "torchvision's weights" if config.weights == "imagenet" else str(file.path)
    load_matching(model, file.tensors(), source, config.backbone)
    return model

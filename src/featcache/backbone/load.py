"""Networks with their weights in: frozen without a head, or whole with a fresh one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.backbone.networks import build_network, feature_dim_of, head_of
from featcache.backbone.weights import download, given_file, load_matching, read_state
from featcache.config import BackboneConfig
from featcache.recipe import init_linear

if TYPE_CHECKING:
    from torch import nn


def load_backbone(config: BackboneConfig, seed: int) -> nn.Module:
    """Load the frozen network without its head, on the CPU, in eval mode.

    Args:
        config: Which backbone and weights.
        seed: Draws `random` weights.

    Returns:
        A module mapping float32 images [N, 3, H, W] to features [N, D]; no parameter needs
        a gradient.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    return without_head(loaded_network(config, seed))


def without_head(model: nn.Module) -> nn.Module:
    """Take the head off a network and freeze the rest."""
    from torch import nn

    model.set_submodule(head_of(model)[0], nn.Identity())
    return model.requires_grad_(False).eval()


def build_classifier(config: BackboneConfig, num_classes: int, seed: int) -> nn.Module:
    """Load the whole network with a fresh head for `num_classes`, every parameter trainable.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    import torch
    from torch import nn

    model = loaded_network(config, seed)
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


def loaded_network(config: BackboneConfig, seed: int) -> nn.Module:
    """A network with all weights but those of its head, which is for the caller to replace."""
    if config.weights == "random":
        return build_network(config.backbone, seed=seed)
    if config.weights != "imagenet":
        given_file(config)  # complain of a missing file before building anything
    model = build_network(config.backbone, seed=None)
    if config.weights == "imagenet":
        state, source = download(config.backbone), "torchvision's weights"
    else:
        path = given_file(config)
        state, source = read_state(path), str(path)
    load_matching(model, state, source, config.backbone)
    return model

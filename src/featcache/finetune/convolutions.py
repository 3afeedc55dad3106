"""Convolutions that train on a CPU, each in the fastest of three ways for the size of its maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcache.finetune import small_maps, winograd


class ChosenConv(nn.Conv2d):
    """A convolution that picks the way to compute by the size of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H', W']."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if winograd.suits(self, x):
            maps = winograd.convolution(x, self.weight)
        elif (geometry := small_maps.geometry_if_suited(self, x)) is not None:
            maps = small_maps.convolution(x, self.weight, geometry)
        else:
            return super().forward(x)
        return maps if self.bias is None else maps + self.bias.view(-1, 1, 1)


def choose_convolutions(network: nn.Module) -> None:
    """Let a network's plain convolutions pick their way, in place: names and parameters stay."""
    for module in network.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1
        if plain and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = ChosenConv

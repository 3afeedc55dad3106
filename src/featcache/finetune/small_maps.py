"""Convolutions over maps of a few pixels as one matrix product, on a CPU.

The last stage of a network sees maps of 1 x 1 to 2 x 2 pixels where images are small. Weights are
then the larger part of what a convolution reads, and oneDNN reorders them in every pass: measured
with ResNet18 at 64 px, a training step of its last stage takes two thirds of the time this way.
"""

from __future__ import annotations

import math

from torch import Tensor, fx, nn
from torch.nn import functional

MAX_PIXELS = 4
"""Pixels of the output up to which the product is faster; at 3 x 3 both take the same time."""


class SmallMapConv(nn.Module):
    """A convolution that picks the way to compute by the size of its output.

    Args:
        conv: Its parameters are shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H', W']."""
        conv = self.conv
        assert not isinstance(conv.padding, str)
        numbers = zip(
            x.shape[2:], conv.kernel_size, conv.dilation, conv.padding, conv.stride, strict=True
        )
        size = [
            (n + 2 * pad - apart * (k - 1) - 1) // step + 1 for n, k, apart, pad, step in numbers
        ]
        if x.device.type != "cpu" or math.prod(size) > MAX_PIXELS:
            maps: Tensor = conv(x)
            return maps
        patches = functional.unfold(
            x, conv.kernel_size, conv.dilation, conv.padding, conv.stride
        ).transpose(1, 2)
        products = functional.linear(patches, conv.weight.flatten(1), conv.bias)
        return products.view(len(x), *size, -1).permute(0, 3, 1, 2)


def with_small_maps(network: fx.GraphModule) -> fx.GraphModule:
    """Replace a traced network's plain convolutions by `SmallMapConv`, in place."""
    for name, module in list(network.named_modules()):
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        if plain and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            network.set_submodule(name, SmallMapConv(module))
    return network

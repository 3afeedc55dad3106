"""Convolutions over small maps as one matrix product, forward and backward, on a CPU.

The last stages of a network see maps of a few pixels where images are small. Weights are then the
larger part of what a convolution reads, and oneDNN reorders them in every pass: measured with
ResNet18 at 64 px and batches of 32, a training step of a convolution of `layer4` takes a third of
the time this way, and one of `layer3` as long as before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from featcache.finetune import winograd

MAX_ROWS_PER_CHANNEL = 2
"""Pixels of a batch's output, per output channel, up to which the product is not slower."""


class SmallMapConv(nn.Conv2d):
    """A convolution that picks the way to compute by the size of its output."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H', W']."""
        num_rows = len(x) * math.prod(self._output_size(x))
        elsewhere = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        maps: Tensor
        if not elsewhere and winograd.suits(self, x):
            maps = winograd.convolution(x, self.weight)
        elif elsewhere or num_rows > MAX_ROWS_PER_CHANNEL * self.out_channels:
            return super().forward(x)
        else:
            maps = _Product.apply(x, self.weight, self.stride, self.padding, self.dilation)
        return maps if self.bias is None else maps + self.bias.view(-1, 1, 1)

    def _output_size(self, x: Tensor) -> list[int]:
        assert not isinstance(self.padding, str)
        numbers = zip(
            x.shape[2:], self.kernel_size, self.dilation, self.padding, self.stride, strict=True
        )
        return [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, gap, pad, step in numbers]


class _Product(Function):
    """The convolution of maps [N, C, H, W], zero padding, as `patches @ weight`.

    Everything is in channels-last memory: there a weight [C', C, k, l] is a matrix [C', k l C] as
    it lies, and so is its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        maps = x.permute(0, 2, 3, 1)
        if any(padding):
            maps = functional.pad(maps, (0, 0, padding[1], padding[1], padding[0], padding[0]))
        maps = maps.contiguous()
        windows = _windows(maps, weight.shape[2:], stride, dilation)
        num, height, width = windows.shape[:3]
        patches = windows.reshape(num * height * width, -1)
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
        ctx.save_for_backward(patches, matrix)
        ctx.geometry = maps.shape, weight.shape, stride, padding, dilation, windows.shape
        return (patches @ matrix.t()).view(num, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, matrix = ctx.saved_tensors
        maps_shape, weight_shape, stride, (top, left), dilation, windows_shape = ctx.geometry
        rows = grad.permute(0, 2, 3, 1).reshape(len(patches), -1)
        num_out, channels, *kernel = weight_shape
        x_grad = weight_grad = None
        if ctx.needs_input_grad[1]:
            product = (rows.t() @ patches).view(num_out, *kernel, channels)
            weight_grad = product.permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            parts = (rows @ matrix).view(windows_shape)
            padded = parts.new_zeros(maps_shape)
            # A pixel lies in several windows; of a place in the window, each pixel in only one.
            windows = _windows(padded, kernel, stride, dilation)
            for row, column in itertools.product(*map(range, kernel)):
                windows[:, :, :, row, column] += parts[:, :, :, row, column]
            height, width = maps_shape[1] - top, maps_shape[2] - left
            x_grad = padded[:, top:height, left:width].permute(0, 3, 1, 2)
        return x_grad, weight_grad, None, None, None


def _windows(
    maps: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Views [N, H', W', k, l, C] of what the kernel sees of padded maps [N, H, W, C]."""
    size = [
        (n - gap * (k - 1) - 1) // step + 1
        for n, k, step, gap in zip(maps.shape[1:3], kernel, stride, dilation, strict=True)
    ]
    n, h, w, c = maps.stride()
    strides = (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c)
    return maps.as_strided((len(maps), *size, *kernel, maps.shape[3]), strides)


def use_products(network: nn.Module) -> None:
    """Let a network's plain convolutions pick their way, in place: names and parameters stay."""
    for module in network.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1
        if plain and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = SmallMapConv

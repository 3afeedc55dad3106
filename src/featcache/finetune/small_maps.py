"""Convolutions over small maps as matrix products, forward and backward, on a CPU.

The last stages of a network see maps of a few pixels where images are small. Weights are then the
larger part of what a convolution reads, oneDNN reorders them in every pass, and most of what it
multiplies is padding: of a 3x3 kernel on a map of 2x2 pixels, each pixel meets four taps of nine.
Here each tap is one product, over the pixels that it meets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from featcache.runtime import computing_threads

MAX_ROWS_PER_CHANNEL = 2
"""Rows of a product, the mean over taps, per output channel, up to which products win."""
MIN_PART = 128
"""Least channels for a thread to take, so that its products cost more than their calls."""


class _Tap(NamedTuple):
    """A place in the kernel, and the pixels that it joins: slices of [N, H', W'] and [N, H, W]."""

    place: tuple[int, int]
    outputs: tuple[slice, ...]
    inputs: tuple[slice, ...]


class Geometry(NamedTuple):
    """The output's height and width, the taps that meet pixels, and how many all of them meet."""

    size: tuple[int, ...]
    taps: list[_Tap]
    num_pairs: int


def geometry_if_suited(conv: nn.Conv2d, x: Tensor) -> Geometry | None:
    """Where the taps of a plain convolution meet maps [N, C, H, W]; None if products lose there."""
    assert not isinstance(conv.padding, str)
    geometry = _geometry(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    num_rows = len(x) * geometry.num_pairs / math.prod(conv.kernel_size)
    return geometry if 0 < num_rows <= MAX_ROWS_PER_CHANNEL * conv.out_channels else None


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve maps [N, C, H, W] with weights [C', C, k, l]."""
    maps: Tensor = _Product.apply(x, weight, geometry)
    return maps


class _Product(Function):
    """The convolution of maps [N, C, H, W], zero padding, as a product for each tap of the kernel.

    Everything is in channels-last memory: there the weight of a tap [C', C] is a matrix as it lies,
    and so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        maps = x.permute(0, 2, 3, 1).contiguous()
        ctx.save_for_backward(maps, weight)
        ctx.taps = geometry.taps
        out = maps.new_zeros(len(maps), *geometry.size, len(weight))

        def work(part: slice) -> None:
            out_part, matrices = out[..., part], weight[part].permute(2, 3, 1, 0)
            for tap in geometry.taps:
                _add_product(out_part[tap.outputs], _rows(maps[tap.inputs]), matrices[tap.place])

        _in_parts(len(weight), work)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        out_grad = grad.permute(0, 2, 3, 1).contiguous()
        x_grad = torch.zeros_like(maps) if ctx.needs_input_grad[0] else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            # A tap that meets no pixel has no product.
            whole = len(ctx.taps) == math.prod(weight.shape[2:])
            weight_grad = torch.empty_like(weight) if whole else torch.zeros_like(weight)

        def work(part: slice) -> None:
            maps_part, matrices = maps[..., part], weight[:, part].permute(2, 3, 0, 1)
            for tap in ctx.taps:
                rows = _rows(out_grad[tap.outputs])
                if x_grad is not None:
                    _add_product(x_grad[..., part][tap.inputs], rows, matrices[tap.place])
                if weight_grad is not None:
                    product = weight_grad[:, part].permute(2, 3, 0, 1)[tap.place]
                    torch.mm(rows.t(), _rows(maps_part[tap.inputs]), out=product)

        _in_parts(weight.shape[1], work)
        return None if x_grad is None else x_grad.permute(0, 3, 1, 2), weight_grad, None


@lru_cache(maxsize=256)
def _geometry(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    sizes: list[int] = []
    met: list[list[tuple[int, slice, slice]]] = []
    for n, k, step, pad, gap in zip(size, kernel, stride, padding, dilation, strict=True):
        num = (n + 2 * pad - gap * (k - 1) - 1) // step + 1
        sizes.append(num)
        met.append([])
        for tap in range(k):
            shift = tap * gap - pad
            first, end = max(0, -(shift // step)), min(num, (n - 1 - shift) // step + 1)
            if first < end:
                inputs = slice(first * step + shift, (end - 1) * step + shift + 1, step)
                met[-1].append((tap, slice(first, end), inputs))
    taps = []
    for pair in itertools.product(*met):
        (row, column), outputs, inputs = zip(*pair, strict=True)
        taps.append(_Tap((row, column), (slice(None), *outputs), (slice(None), *inputs)))
    num_pairs = math.prod(sum(s.stop - s.start for _, s, _ in axis) for axis in met)
    return Geometry(tuple(sizes), taps, num_pairs)


def _rows(maps: Tensor) -> Tensor:
    """The pixels of maps [N, H, W, C] as a matrix [N H W, C], a copy where they lie apart."""
    return maps.reshape(-1, maps.shape[3])


def _add_product(maps: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add `rows @ matrix` to the pixels of maps [N, H, W, C]."""
    steps = [(n, step) for n, step in zip(maps.shape[:3], maps.stride(), strict=False) if n > 1]
    if all(step == n * inner for (_, step), (n, inner) in itertools.pairwise(steps)):
        maps.view(-1, maps.shape[3]).addmm_(rows, matrix)
    else:
        maps += (rows @ matrix).view(maps.shape)


def _in_parts(num_channels: int, work: Callable[[slice], None]) -> None:
    """Do work for a part of the channels on each thread.

    Otherwise the threads would share each of many small products, and wait for each other after it:
    that takes twice the processor time.
    """
    num_threads = torch.get_num_threads()
    num_parts = min(num_threads, num_channels // MIN_PART)
    if num_parts < 2:
        work(slice(None))
        return
    ends = [num_channels * number // num_parts for number in range(num_parts + 1)]
    modeless = torch.inference_mode()(work)  # a thread has modes of its own
    pool = computing_threads(num_parts, num_threads // num_parts)
    list(pool.map(modeless, map(slice, ends, ends[1:])))

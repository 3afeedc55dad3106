"""3x3 convolutions by Winograd's method in training, forward and backward, on a CPU.

`engine.winograd` describes the method. Its transforms are linear, so the backward pass is their
transposes around 36 products each for the gradients of inputs and weights. Kernels change with
every step and are transformed anew. A batch is divided into chunks whose tiles fit a core's cache;
every thread computes chunks of its own, since waiting for each other after every small operation
would cost what the method saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from featcache.engine.winograd import (
    KERNEL_TO_PLACES,
    MIN_CHANNELS,
    PLACES,
    TILE,
    TO_OUTPUTS,
    TO_PLACES,
    buffer,
    convolve,
    fills_tiles,
    in_tiles,
    num_tiles,
    to_places,
    windows,
)
from featcache.runtime import computing_threads, processor_name

MIN_TILES = 32
"""Of a batch: with fewer, transforming the kernels costs more than the products save."""
CHUNK_TILES = 256
"""With more, a core's cache overflows; with fewer, kernels are read too often."""


def suits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution of groups = 1 and zero padding of maps [N, C, H, W] is faster so."""
    plain = conv.stride == conv.padding == conv.dilation == (1, 1) and conv.kernel_size == (3, 3)
    wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    enough = len(x) * math.prod(num_tiles(*x.shape[2:])) >= MIN_TILES
    fits = wide and enough and fills_tiles(*x.shape[2:]) and x.dtype == torch.float32
    return plain and fits and _products_are_fast()


@functools.cache
def _products_are_fast() -> bool:
    """Whether torch multiplies matrices as fast as it convolves.

    MKL, its library for that, takes several times as long on other makers' processors. A rule and
    no measurement: two runs on one machine have to agree to the bit.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and "Intel" in processor_name()


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps [N, C, H, W] with weights [C', C, 3, 3], padding by one zero."""
    maps: Tensor = _Convolution.apply(x, weight)
    return maps


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        maps = x.permute(0, 2, 3, 1)
        out = maps.new_empty(*maps.shape[:3], len(weight))
        kernel = _kernel_places(weight).mT

        def compute(chunks: Sequence[slice]) -> None:
            for chunk in chunks:
                convolve(maps[chunk], kernel, out[chunk])

        _by_chunks(compute, maps)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        maps, out_grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        x_needed, weight_needed = ctx.needs_input_grad
        maps_grad = maps.new_empty(maps.shape)
        kernel = _kernel_places(weight)

        def compute(chunks: Sequence[slice]) -> Tensor:
            total = torch.empty_like(kernel)
            for number, chunk in enumerate(chunks):
                products_grad = _outputs_to_products(out_grad[chunk])
                if weight_needed:  # the first product replaces what is in memory
                    pair = products_grad.mT, to_places(maps[chunk], "places")
                    total.baddbmm_(*pair, beta=min(number, 1))
                if x_needed:
                    _add_tiles(products_grad, kernel, maps_grad[chunk])
            return total

        total = functools.reduce(torch.add, _by_chunks(compute, maps))
        weight_grad = None
        if weight_needed:
            by_place = KERNEL_TO_PLACES.to(weight).t() @ total.view(PLACES**2, -1)
            weight_grad = by_place.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
        return maps_grad.permute(0, 3, 1, 2) if x_needed else None, weight_grad


def _kernel_places(weight: Tensor) -> Tensor:
    """Transformed kernels [36, C', C] of weights [C', C, 3, 3]."""
    by_place = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (KERNEL_TO_PLACES.to(weight) @ by_place).view(PLACES**2, *weight.shape[:2])


def _outputs_to_products(grad: Tensor) -> Tensor:
    """The gradient of products [36, tiles, C'], given that of outputs [N, H, W, C']."""
    num, height, width, num_out = grad.shape
    rows, columns = num_tiles(height, width)
    whole = grad
    if grad.shape[1:3] != (TILE * rows, TILE * columns):
        whole = buffer("padded", grad, num, TILE * rows, TILE * columns, num_out)
        whole[:, height:].zero_()
        whole[:, :, width:].zero_()
        whole[:, :height, :width] = grad
    in_order = in_tiles(whole).permute(2, 4, 0, 1, 3, 5)
    tiles = buffer("tiles", grad, *in_order.shape).copy_(in_order)
    products = buffer("products", grad, PLACES**2, num * rows * columns * num_out)
    torch.mm(TO_OUTPUTS.to(grad).t(), tiles.view(TILE**2, -1), out=products)
    return products.view(PLACES**2, -1, num_out)


def _add_tiles(products_grad: Tensor, kernel: Tensor, out: Tensor) -> None:
    """Write the gradient of maps [N, H, W, C], given those of products."""
    num, height, width, channels = out.shape
    rows, columns = num_tiles(height, width)
    places = buffer("places", out, PLACES**2, num * rows * columns, channels)
    torch.bmm(products_grad, kernel, out=places)
    tiles = buffer("tiles", out, PLACES, PLACES, num, rows, columns, channels)
    torch.mm(TO_PLACES.to(out).t(), places.view(PLACES**2, -1), out=tiles.view(PLACES**2, -1))
    padded = buffer("padded", out, num, TILE * rows + 2, TILE * columns + 2, channels)
    padded[:, TILE * rows :].zero_()
    padded[:, :, TILE * columns :].zero_()
    # Tiles overlap by two rows and columns; of each part here, a pixel lies in at most one.
    windows(padded, 0, 0, TILE, TILE).copy_(tiles[:TILE, :TILE])
    windows(padded, TILE, 0, 2, TILE).add_(tiles[TILE:, :TILE])
    windows(padded, 0, TILE, TILE, 2).add_(tiles[:TILE, TILE:])
    windows(padded, TILE, TILE, 2, 2).add_(tiles[TILE:, TILE:])
    out.copy_(padded[:, 1 : height + 1, 1 : width + 1])


def _by_chunks(compute: Callable[[Sequence[slice]], Any], maps: Tensor) -> list[Any]:
    """Have maps [N, H, W, C] computed by chunks of images; returns what each thread gave.

    Which thread computes what depends on nothing but sizes: sums are the same in every run.
    """
    num, num_threads = len(maps), torch.get_num_threads()
    rows = num * math.prod(num_tiles(*maps.shape[1:3]))
    alone = torch.inference_mode()(compute)
    if num_threads > 1 and rows < num_threads * CHUNK_TILES:
        return [alone([slice(0, num)])]  # each operation by all threads
    num_chunks = min(num, math.ceil(rows / CHUNK_TILES))
    ends = [num * i // num_chunks for i in range(num_chunks + 1)]
    chunks = [slice(*ends[i : i + 2]) for i in range(num_chunks)]
    if num_threads == 1:
        return [alone(chunks)]
    shares = [share for i in range(num_threads) if (share := chunks[i::num_threads])]
    return list(computing_threads(num_threads, 1).map(alone, shares))

"""3x3 convolutions by Winograd's F(4x4, 3x3): 36 multiplications where a direct one takes 144.

Tiles of 6x6 inputs and the kernels are transformed, multiplied place by place (36 matrix products
over the channels), and transformed back into tiles of 4x4 outputs. After Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015, https://arxiv.org/abs/1509.09308. Sums of
larger numbers round more: results are off by 2e-6 of the largest where a direct convolution is off
by 1e-6. The transformed kernels take four times the memory.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx, nn

from featcache.engine.fusion import FusedConv

if TYPE_CHECKING:
    from torch import Tensor

MIN_CHANNELS = 128
"""With fewer, the products save less than the transforms cost."""
MIN_FILL = 0.6
"""The least share of the tiles' outputs that lie inside of the image."""
TILE, PLACES = 4, 6
POINTS = np.sqrt([0, 0.5, 0.5, 2, 2]) * [1, 1, -1, 1, -1]
"""Where the polynomials behind the method are multiplied, besides infinity. The usual 0, 1, -1, 2
and -2 need no multiplication to transform, which matrix products do not mind, and round four times
as much."""
_memory = threading.local()


def _matrices() -> list[Tensor]:
    """What transforms tiles [36, 36], kernels [36, 9] and products [16, 36], in double precision.

    They are Toom and Cook's for one dimension, `B^T`, `G` and `A^T` in the paper, for rows times
    columns.
    """
    inputs, kernels, outputs = np.zeros((6, 6)), np.zeros((6, 3)), np.zeros((4, 6))
    for place, point in enumerate(POINTS):
        others = np.delete(POINTS, place)
        inputs[place, :5] = np.poly(others)[::-1]
        kernels[place] = point ** np.arange(3) / np.prod(point - others)
        outputs[:, place] = point ** np.arange(4)
    inputs[5] = np.poly(POINTS)[::-1]
    kernels[5, 2] = outputs[3, 5] = 1
    return [torch.from_numpy(np.kron(m, m)) for m in (inputs, kernels, outputs)]


TO_PLACES, KERNEL_TO_PLACES, TO_OUTPUTS = _matrices()


def num_tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover a map."""
    return math.ceil(height / TILE), math.ceil(width / TILE)


def fills_tiles(height: int, width: int) -> bool:
    """Whether enough of the tiles is image for the method to pay."""
    return height * width >= MIN_FILL * TILE**2 * math.prod(num_tiles(height, width))


def to_places(maps: Tensor, name: str) -> Tensor:
    """Transform the 6x6 tiles of maps.

    Args:
        maps: [N, H, W, C].
        name: The memory of this thread for the result; "tiles" is used on the way.

    Returns:
        [36, N * rows * columns of tiles, C].
    """
    num, height, width, channels = maps.shape
    rows, columns = num_tiles(height, width)
    padded = buffer("padded", maps, num, TILE * rows + 2, TILE * columns + 2, channels)
    for outside in (padded[:, :1], padded[:, height + 1 :], padded[:, :, width + 1 :]):
        outside.zero_()
    padded[:, :, :1].zero_()
    padded[:, 1 : height + 1, 1 : width + 1] = maps
    tiles = buffer("tiles", maps, PLACES, PLACES, num, rows, columns, channels)
    tiles.copy_(windows(padded, 0, 0, PLACES, PLACES))
    places = buffer(name, maps, PLACES**2, num * rows * columns * channels)
    torch.mm(TO_PLACES.to(maps), tiles.view(PLACES**2, -1), out=places)
    return places.view(PLACES**2, -1, channels)


def windows(padded: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Of every 6x6 tile, the part at a place: a view [height, width, N, rows, columns, C]."""
    num, rows, columns, channels = padded.shape
    image, row, column, _ = padded.stride()
    shape = (height, width, num, rows // TILE, columns // TILE, channels)
    strides = (row, column, image, TILE * row, TILE * column, 1)
    return padded.as_strided(shape, strides, padded.storage_offset() + top * row + left * column)


def in_tiles(maps: Tensor) -> Tensor:
    """A view [N, rows, 4, columns, 4, C] of maps whose sides are multiples of 4."""
    num, height, width, channels = maps.shape
    image, row, column, channel = maps.stride()
    shape = (num, height // TILE, TILE, width // TILE, TILE, channels)
    return maps.as_strided(shape, (image, TILE * row, row, TILE * column, column, channel))


def convolve(maps: Tensor, kernel: Tensor, out: Tensor) -> None:
    """Convolve maps with transformed kernels.

    Args:
        maps: [N, H, W, C].
        kernel: [36, C, C'].
        out: Where the results go, [N, H, W, C'].
    """
    num, height, width, num_out = out.shape
    rows, columns = num_tiles(height, width)
    places = to_places(maps, "places")
    products = buffer("tiles", maps, PLACES**2, num * rows * columns, num_out)
    torch.bmm(places, kernel, out=products)
    outputs = buffer("places", maps, TILE**2, num * rows * columns * num_out)
    torch.mm(TO_OUTPUTS.to(maps), products.view(PLACES**2, -1), out=outputs)
    in_order = outputs.view(TILE, TILE, num, rows, columns, num_out).permute(2, 3, 0, 4, 1, 5)
    exact = out.shape[1:3] == (TILE * rows, TILE * columns)
    whole = out if exact else buffer("padded", maps, num, TILE * rows, TILE * columns, num_out)
    in_tiles(whole).copy_(in_order)
    if not exact:
        out.copy_(whole[:, :height, :width])


class WinogradConv(FusedConv):
    """A 3x3 convolution of stride 1 that uses Winograd's method where the image fills its tiles."""

    def __init__(self, direct: FusedConv) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(direct.__dict__)
        num_out, num_in = direct.weight.shape[:2]
        by_place = direct.weight.permute(2, 3, 1, 0).reshape(9, num_in * num_out).double()
        self.kernel = (KERNEL_TO_PLACES @ by_place).float().view(PLACES**2, num_in, num_out)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve; see `FusedConv`."""
        num, _, height, width = x.shape
        if not fills_tiles(height, width):
            return super().forward(x, residual)
        maps = x.new_empty(num, height, width, self.kernel.shape[2])
        convolve(x.permute(0, 2, 3, 1), self.kernel, maps)
        out = maps.permute(0, 3, 1, 2)
        if self.bias is not None:
            out += self.bias[:, None, None]
        if residual is not None:
            return residual.add_(out).relu_()
        return out.relu_() if self.activation == "relu" else out


def buffer(name: str, like: Tensor, *shape: int) -> Tensor:
    """This thread's memory of that name, kept from call to call, since new pages cost time."""
    size = math.prod(shape)
    kept: Tensor | None = getattr(_memory, name, None)
    if kept is None or len(kept) < size or kept.dtype != like.dtype:
        kept = like.new_empty(size)
        setattr(_memory, name, kept)
    return kept[:size].view(shape)


def use_winograd(fused: fx.GraphModule) -> bool:
    """Replace a fused network's convolutions where the method may pay; whether there are any."""
    found = False
    for name, module in list(fused.named_modules()):
        if isinstance(module, FusedConv) and _suits(module):
            fused.set_submodule(name, WinogradConv(module))
            found = True
    return found


def _suits(conv: FusedConv) -> bool:
    num_out, num_in, *sides = conv.weight.shape
    plain = conv.stride == conv.padding == conv.dilation == [1, 1] and conv.groups == 1
    return plain and sides == [3, 3] and min(num_out, num_in) >= MIN_CHANNELS

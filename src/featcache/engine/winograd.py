"""3x3 convolutions by Winograd's F(4x4, 3x3): 36 multiplications where a direct one takes 144.

Tiles of 6x6 inputs and the kernels are transformed, multiplied place by place (36 matrix products
over the channels), and transformed back into tiles of 4x4 outputs. After Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015, https://arxiv.org/abs/1509.09308. Sums of
larger numbers round more: results are off by 1e-5 of the largest where a direct convolution is off
by 1e-6. The transformed kernels take four times the memory.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

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
_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = torch.tensor(
    [[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)  # / 24
_OUTPUT = torch.tensor(
    [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
_memory = threading.local()


class WinogradConv(FusedConv):
    """A 3x3 convolution of stride 1 that uses Winograd's method where the image fills its tiles."""

    def __init__(self, direct: FusedConv) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(direct.__dict__)
        kernel = torch.einsum(
            "ai,oijc,bj->abco",
            _KERNEL / 24,
            direct.weight.permute(0, 2, 3, 1).double(),
            _KERNEL / 24,
        )
        self.kernel = kernel.reshape(PLACES**2, *kernel.shape[2:]).float().contiguous()
        self.to_places = torch.kron(_INPUT, _INPUT)
        self.to_outputs = torch.kron(_OUTPUT, _OUTPUT)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve; see `FusedConv`."""
        num, channels, height, width = x.shape
        rows, columns = math.ceil(height / TILE), math.ceil(width / TILE)
        if height * width < MIN_FILL * TILE**2 * rows * columns:
            return super().forward(x, residual)
        num_out, num_tiles = self.kernel.shape[2], num * rows * columns
        padded = _buffer("padded", num, TILE * rows + 2, TILE * columns + 2, channels).zero_()
        padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
        image, row, column, _ = padded.stride()
        shape = (PLACES, PLACES, num, rows, columns, channels)
        steps = (row, column, image, TILE * row, TILE * column, 1)
        tiles = _buffer("a", *shape).copy_(padded.as_strided(shape, steps))
        places = _buffer("b", PLACES**2, num_tiles * channels)
        torch.mm(self.to_places, tiles.view(PLACES**2, -1), out=places)
        products = _buffer("a", PLACES**2, num_tiles, num_out)
        torch.bmm(places.view(PLACES**2, num_tiles, channels), self.kernel, out=products)
        outputs = _buffer("b", TILE**2, num_tiles * num_out)
        torch.mm(self.to_outputs, products.view(PLACES**2, -1), out=outputs)
        in_order = outputs.view(TILE, TILE, num, rows, columns, num_out).permute(2, 3, 0, 4, 1, 5)
        whole = in_order.reshape(num, TILE * rows, TILE * columns, num_out)
        out = whole[:, :height, :width].contiguous().permute(0, 3, 1, 2)
        if self.bias is not None:
            out += self.bias[:, None, None]
        if residual is not None:
            return residual.add_(out).relu_()
        return out.relu_() if self.activation == "relu" else out


def _buffer(name: str, *shape: int) -> Tensor:
    """This thread's memory of that name, kept from call to call, since new pages cost time."""
    size = math.prod(shape)
    kept: Tensor | None = getattr(_memory, name, None)
    if kept is None or len(kept) < size:
        kept = torch.empty(size)
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

"""Winograd's convolutions give what direct ones give, to rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from featcache.backbone import load_backbone, own_preprocessing
from featcache.config import BackboneConfig
from featcache.engine import base, sample_pixels
from featcache.engine.fusion import FusedConv, fuse_for_cpu
from featcache.engine.torch_cpu import torch_forward
from featcache.engine.winograd import WinogradConv, use_winograd


def pair(*, bias: bool = True, activation: str = "none") -> tuple[FusedConv, WinogradConv]:
    """A direct convolution of 128 to 136 channels, and the same by Winograd's method."""
    torch.manual_seed(0)
    direct = FusedConv(nn.Conv2d(128, 136, 3, padding=1, bias=bias))
    direct.activation = activation
    return direct, WinogradConv(direct)


def maps(num: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(num, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 4, 4), (2, 7, 7), (2, 14, 11), (5, 13, 4)])
@pytest.mark.parametrize("activation", ["none", "relu"])
@torch.inference_mode()
def test_equal_to_a_direct_convolution(size: tuple[int, int, int], activation: str) -> None:
    x = maps(size[0], 128, *size[1:])
    for bias in (True, False):
        direct, winograd = pair(bias=bias, activation=activation)
        before = x.clone()
        found = winograd(x)
        assert not torch.equal(found, direct(x))  # else the method was not used
        assert error(found, direct(x)) < 2e-5
        assert torch.equal(x, before)


@torch.inference_mode()
def test_a_residual_is_added_in_its_place() -> None:
    direct, winograd = pair()
    x, residual = maps(2, 128, 8, 8), maps(2, 136, 8, 8, seed=1)
    wanted = direct(x, residual.clone())
    found = winograd(x, residual)
    assert found.data_ptr() == residual.data_ptr()
    assert error(found, wanted) < 2e-5
    assert found.min() == 0


@torch.inference_mode()
def test_maps_that_do_not_fill_tiles_are_convolved_directly() -> None:
    direct, winograd = pair()
    for size in ((1, 1), (2, 2), (5, 5), (3, 4)):
        x = maps(2, 128, *size)
        assert torch.equal(winograd(x), direct(x)) == (size != (3, 4))


@torch.inference_mode()
def test_threads_do_not_share_memory_and_smaller_batches_reuse_it() -> None:
    _, winograd = pair()
    inputs = [maps(1 + i % 3, 128, 8, 8, seed=i) for i in range(12)]
    wanted = [winograd(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(torch.inference_mode()(winograd), inputs))
    for got, alone in zip(found, wanted, strict=True):
        assert error(got, alone) < 1e-6


def test_a_whole_network_keeps_its_features() -> None:
    config = BackboneConfig(weights="bundled")
    network, prep = load_backbone(config, 0), own_preprocessing(config)
    pixels = sample_pixels(prep, 4)
    fused = fuse_for_cpu(network.to(memory_format=torch.channels_last))
    direct = torch_forward(fused, prep)(pixels)
    assert use_winograd(fused)
    # Three convolutions of stride 1 in each of the last three stages have 128 channels or more.
    assert sum(isinstance(module, WinogradConv) for module in fused.modules()) == 9
    assert base.relative_error(torch_forward(fused, prep)(pixels), direct) < 1e-5


def test_a_network_without_such_convolutions_is_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3, padding=1, groups=128),
        nn.Conv2d(128, 64, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
    )
    fused = fuse_for_cpu(network.eval())
    assert not use_winograd(fused)
    assert not any(isinstance(module, WinogradConv) for module in fused.modules())

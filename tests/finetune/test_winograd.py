"""Winograd's convolutions in training are the convolution: outputs, gradients, every run alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from featcache.finetune import winograd
from featcache.finetune.convolutions import choose_convolutions

CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any machine that runs these tests passes for one on which the method is used."""
    monkeypatch.setattr(winograd, "_products_are_fast", lambda: True)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(x: torch.Tensor, weight: torch.Tensor, *, ours: bool) -> list[torch.Tensor]:
    """The output of a convolution, and the gradients of its input and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = winograd.convolution(x, weight) if ours else torch.conv2d(x, weight, padding=1)
    grad = numbers(*out.shape, seed=2).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(1, 5, 6), (3, 4, 4)])
def test_gradients_are_those_of_finite_differences(size: tuple[int, int, int]) -> None:
    num, height, width = size
    x = numbers(num, 2, height, width).double().requires_grad_()
    weight = numbers(3, 2, 3, 3, seed=1).double().requires_grad_()
    assert gradcheck(winograd.convolution, (x, weight))


@pytest.mark.parametrize(
    # The last two are divided into chunks, which two threads share.
    "size",
    [(1, 4, 4), (2, 7, 7), (1, 13, 10), (40, 14, 11), (7, 32, 33)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_it_is_the_convolution(
    size: tuple[int, int, int], layout: torch.memory_format, threads: int
) -> None:
    x = numbers(size[0], 12, *size[1:]).to(memory_format=layout)
    weight = numbers(8, 12, 3, 3, seed=1).to(memory_format=layout)
    exact = results(x.double(), weight.double(), ours=False)
    for found, expected in zip(results(x, weight, ours=True), exact, strict=True):
        assert error(found, expected) < 5e-6
    assert torch.get_num_threads() == threads


def test_what_is_cut_out_of_larger_maps_is_convolved(threads: int) -> None:
    x = numbers(8, 9, 20, 20)[:, 1:, 2:18:2, 3:]
    weight = numbers(3, 3, 5, 8, seed=1).permute(2, 3, 0, 1)
    for found, expected in zip(*(results(x, weight, ours=o) for o in (True, False)), strict=True):
        assert error(found, expected) < 5e-6


def test_two_runs_agree_to_the_bit_and_scoring_with_training(threads: int) -> None:
    x, weight = numbers(40, 8, 14, 14).to(memory_format=CHANNELS_LAST), numbers(8, 8, 3, 3, seed=1)
    one = results(x, weight, ours=True)
    with torch.inference_mode():
        scored = winograd.convolution(x.clone(), weight)
    two = results(x, weight, ours=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(scored, one[0])


def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight = numbers(2, 8, 8, 8), numbers(8, 8, 3, 3, seed=1)
    _, x_grad, weight_grad = results(x, weight, ours=True)
    for asked, expected in ((x, x_grad), (weight, weight_grad)):
        asked.requires_grad_()
        out = winograd.convolution(x, weight)
        found = torch.autograd.grad(out, asked, numbers(*out.shape, seed=2))[0]
        assert torch.equal(found, expected)
        asked.requires_grad_(False)


def uses_it(conv: nn.Conv2d, *size: int) -> bool:
    choose_convolutions(conv)
    x = numbers(size[0], conv.in_channels, *size[1:]).to(memory_format=CHANNELS_LAST)
    return "_Convolution" in str(conv(x).grad_fn)


@pytest.mark.parametrize(
    ("options", "size", "used"),
    [
        ({"padding": 1, "bias": False}, (2, 16, 16), True),
        ({"padding": 1, "bias": False}, (2, 14, 15), True),
        ({"padding": 1, "bias": False}, (1, 16, 16), False),  # 16 tiles
        ({"padding": 1, "bias": False}, (16, 5, 5), False),  # tiles of which 39 % are image
        ({"padding": 1, "bias": False, "stride": 2}, (2, 16, 16), False),
        ({"padding": 2, "bias": False, "dilation": 2}, (2, 16, 16), False),
        ({"padding": 0, "bias": False}, (2, 16, 16), False),
        ({"padding": 1, "bias": False, "groups": 2}, (2, 16, 16), False),
    ],
)
def test_where_it_is_used(options: dict, size: tuple[int, int, int], used: bool) -> None:
    conv = nn.Conv2d(128, 128, 3, **options).to(memory_format=CHANNELS_LAST)
    assert uses_it(conv, *size) == used


def test_other_makers_processors_convolve_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    for name, mkl, used in (
        ("Intel(R) Xeon(R) Processor", True, True),
        ("Intel(R) Xeon(R) Processor", False, False),
        ("AMD EPYC 9654 96-Core Processor", True, False),
    ):
        winograd._products_are_fast.cache_clear()
        monkeypatch.setattr(winograd, "processor_name", lambda name=name: name)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert uses_it(conv, 2, 16, 16) == used
    winograd._products_are_fast.cache_clear()


def test_few_channels_and_half_precision_go_to_torch() -> None:
    assert not uses_it(nn.Conv2d(64, 128, 3, padding=1, bias=False), 2, 16, 16)
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_it(conv, 2, 16, 16)
    assert uses_it(conv, 2, 16, 16)
    assert conv.bfloat16()(numbers(2, 128, 16, 16).bfloat16()).dtype == torch.bfloat16


def test_a_bias_is_added_and_trains() -> None:
    conv = nn.Conv2d(128, 130, 3, padding=1)
    x, grad = numbers(3, 128, 15, 13), numbers(3, 130, 15, 13, seed=2)
    expected = torch.autograd.grad(conv(x), tuple(conv.parameters()), grad)
    plain = conv(x)
    choose_convolutions(conv)
    assert error(conv(x).detach(), plain.detach()) < 1e-5
    for found, wanted in zip(
        torch.autograd.grad(conv(x), tuple(conv.parameters()), grad), expected, strict=True
    ):
        assert error(found, wanted) < 1e-5

"""A convolution as matrix products is the convolution: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from featcache.finetune.convolutions import ChosenConv, choose_convolutions
from featcache.runtime import torch_threads_kept

CASES = [
    (3, (2, 2), {"kernel_size": 3, "padding": 1}),
    (1, (2, 2), {"kernel_size": 3, "padding": 1}),
    (7, (2, 2), {"kernel_size": 3, "padding": 1}),
    (3, (4, 4), {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}),
    (3, (1, 1), {"kernel_size": 1}),
    (3, (1, 1), {"kernel_size": 3, "padding": 1}),  # eight taps see padding only
    (3, (4, 4), {"kernel_size": 1, "stride": 2}),
    (3, (4, 4), {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2}),
    (1, (3, 3), {"kernel_size": 3, "padding": 3, "dilation": 3}),
    (3, (3, 5), {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2)}),
    (1, (3, 3), {"kernel_size": 3, "padding": 1}),
    (2, (5, 1), {"kernel_size": 5, "padding": 2, "stride": 3}),
    (1, (7, 3), {"kernel_size": 7, "padding": 3, "stride": (5, 3)}),
    (1, (1, 1), {"kernel_size": 1, "padding": 1}),  # pixels of the output that see padding only
]
LARGE = [
    (3, (6, 6), {"kernel_size": 3, "padding": 1}),
    (8, (2, 2), {"kernel_size": 3, "padding": 1}),
]


def by_products(network: nn.Module) -> nn.Module:
    """A copy that may use products."""
    ours = copy.deepcopy(network)
    choose_convolutions(ours)
    return ours


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("num", "side", "options"), [*CASES, *LARGE])
def test_it_is_the_convolution(
    num: int, side: tuple[int, int], options: dict, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, **options).to(memory_format=layout)
    ours = by_products(plain)
    assert isinstance(ours, ChosenConv)
    results = []
    for conv in (plain, ours):
        x = torch.randn(num, 5, *side, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=layout).requires_grad_()
        out = conv(x)
        graph = f"{out.grad_fn} {out.grad_fn.next_functions}"
        assert ("_Product" in graph) == (conv is ours and (num, side, options) not in LARGE)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in conv.parameters())])
        # Fused kernels pair numbers by their place in memory, whatever the strides.
        torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9, fused=conv is ours).step()
        results[-1] += conv.parameters()
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num", "side", "options"), CASES)
def test_the_gradients_are_those_of_the_outputs(
    num: int, side: tuple[int, int], options: dict
) -> None:
    torch.manual_seed(0)
    conv = by_products(nn.Conv2d(2, 3, **options)).double().to(memory_format=torch.channels_last)
    x = torch.randn(num, 2, *side, dtype=torch.float64, requires_grad=True)

    def outputs(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), x)

    names = [name for name, _ in conv.named_parameters()]
    assert torch.autograd.gradcheck(outputs, (x, *conv.parameters()), fast_mode=True)


@pytest.mark.parametrize("trains", [(True, False), (False, True), (True, True)])
def test_only_what_is_asked_for_gets_a_gradient(trains: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, padding=1, bias=False)
    gradients = []
    for conv in (plain, by_products(plain)):
        x = torch.ones(3, 5, 2, 2, requires_grad=trains[0])
        conv.weight.requires_grad_(trains[1])
        conv(x).square().sum().backward()
        gradients.append((x.grad, conv.weight.grad))
    for wanted, expected, found in zip(trains, *gradients, strict=True):
        assert (found is not None) == wanted
        if wanted:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_same_again_to_the_bit_and_in_the_parameters_layout(num_threads: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 384, 3, padding=1).to(memory_format=torch.channels_last)
    conv = by_products(plain)
    x = torch.randn(32, 256, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    runs = []
    with torch_threads_kept():
        torch.set_num_threads(num_threads)
        for module in (plain, conv, conv):
            x.grad = module.weight.grad = None
            out = module(x)
            out.square().sum().backward()
            runs.append((out, x.grad, module.weight.grad))
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert x.grad.stride() == x.stride()
            assert module.weight.grad.stride() == module.weight.stride()
            with torch.inference_mode():
                assert module is plain or torch.equal(module(x), out)
        assert torch.get_num_threads() == num_threads
    for expected, one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_grouped_and_odd_convolutions_stay_as_they_are() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    choose_convolutions(network)
    assert {type(module) for module in network} == {nn.Conv2d}

"""A convolution as a matrix product is the convolution: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from featcache.finetune.small_maps import SmallMapConv, use_products


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("side", "options", "product"),
    [
        ((2, 2), {"kernel_size": 3, "padding": 1}, True),
        ((4, 4), {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}, True),
        ((1, 1), {"kernel_size": 1}, True),
        ((4, 4), {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2}, True),
        ((3, 5), {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2)}, True),
        ((6, 6), {"kernel_size": 3, "padding": 1}, False),
    ],
)
def test_it_is_the_convolution(
    side: tuple[int, int], options: dict, product: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, **options).to(memory_format=layout)
    ours = copy.deepcopy(plain)
    use_products(ours)
    assert isinstance(ours, SmallMapConv)
    results = []
    for conv in (plain, ours):
        x = torch.randn(3, 5, *side, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=layout).requires_grad_()
        out = conv(x)
        graph = f"{out.grad_fn} {out.grad_fn.next_functions}"
        assert ("_Product" in graph) == (product and conv is ours)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in conv.parameters())])
        # Fused kernels pair numbers by their place in memory, whatever the strides.
        torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9, fused=conv is ours).step()
        results[-1] += conv.parameters()
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_grouped_and_odd_convolutions_stay_as_they_are() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    use_products(network)
    assert {type(module) for module in network} == {nn.Conv2d}

"""The fast forms of the network compute the plain network's features."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from featcache import engine as en
from featcache.backbone import load_backbone, own_preprocessing, state_sha256
from featcache.config import BackboneConfig
from featcache.engine import base
from featcache.engine.fusion import FusedConv, fold_batchnorm, fuse_for_cpu
from featcache.errors import UserError

BUNDLED = BackboneConfig(weights="bundled")
PREP = own_preprocessing(BUNDLED)


def settings(**changes: object) -> en.EngineSettings:
    return en.EngineSettings(**{"backbone": "resnet18", **changes})


def images(num: int = 4, side: int = 64) -> torch.Tensor:
    noise = torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))
    return noise.contiguous(memory_format=torch.channels_last)


def with_real_statistics(network: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that folding cannot ignore."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return network


NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg11_bn", "regnet_y_400mf"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", [fold_batchnorm, fuse_for_cpu])
def test_forms_agree_with_the_plain_network(name: str, form) -> None:
    network = load_backbone(BackboneConfig(backbone=name, weights="random"), 0)
    network = with_real_statistics(network)
    before = state_sha256(network)
    with torch.inference_mode():
        wanted, got = network(images()).numpy(), form(network)(images()).numpy()
    assert base.relative_error(got, wanted) < 2e-5
    assert state_sha256(network) == before


def test_resnet18_fuses_whole() -> None:
    fused = fuse_for_cpu(load_backbone(BUNDLED, 0))
    called = [fused.get_submodule(n.target) for n in fused.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(m, FusedConv) for m in called) == 20
    assert not any(isinstance(m, nn.ReLU | nn.BatchNorm2d | nn.Conv2d) for m in called)
    assert not any(n.op == "call_function" and "add" in str(n.target) for n in fused.graph.nodes)


def test_a_residual_that_is_needed_later_is_not_overwritten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.relu(self.b(y) + y) * y

    network = Twice().eval().requires_grad_(False)
    with torch.inference_mode():
        wanted, got = network(images()), fuse_for_cpu(network)(images())
    torch.testing.assert_close(got, wanted)


def test_the_input_is_never_written() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.conv(x) + x)

    x = images()
    copy = x.clone()
    with torch.inference_mode():
        fuse_for_cpu(Plus().eval().requires_grad_(False))(x)
    assert torch.equal(x, copy)


def test_an_untraceable_network_runs_plain_and_says_so(capsys) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    engine = en.choose_engine(settings(), Branch().eval(), PREP, num_images=10)
    assert engine.run(en.sample_pixels(PREP, 2)).shape == (2, 3)
    assert engine.max_error is None
    assert "unfused" in capsys.readouterr().err


SEEN: list[object] = []


class Watched(nn.Module):
    """A network that looks, while it is traced, at what other networks would meet then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        SEEN[:] = [nn.Module.__call__, nn.Module.__getattr__, math.floor]
        SEEN.append(other(torch.ones(1, 2)).shape)
        return self.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale[:, 0, 0]


def test_other_networks_compute_while_one_is_traced() -> None:
    network = Watched().eval()
    untouched = [nn.Module.__call__, nn.Module.__getattr__, math.floor, (1, 2)]
    traced = fold_batchnorm(network)
    assert untouched == SEEN
    assert not any(isinstance(m, nn.BatchNorm2d) for m in map(traced.get_submodule, called(traced)))
    assert [type(m) for m in network.modules()] == [
        *(Watched, nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    ]
    assert network.scale.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(traced(images()), network(images()))


def called(traced: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


def test_a_part_that_cannot_be_traced_is_called_as_it_is() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y if y.sum() > 0 else -y

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Branch(), nn.ReLU()).eval()
    network = with_real_statistics(network).requires_grad_(False)
    fused = fuse_for_cpu(network)
    assert called(fused) == ["0", "2", "3"]
    with torch.inference_mode():
        torch.testing.assert_close(fused(images()), network(images()))


def test_the_callers_network_stays_as_it_is() -> None:
    network = load_backbone(BUNDLED, 0)
    before = [(t.data_ptr(), t.stride()) for t in network.state_dict().values()]
    run = en.choose_engine(settings(), network, PREP, num_images=10).run
    assert [(t.data_ptr(), t.stride()) for t in network.state_dict().values()] == before
    pixels = en.sample_pixels(PREP, 2)
    wanted = run(pixels)
    with torch.no_grad():
        network.conv1.weight.zero_()
    assert np.array_equal(run(pixels), wanted)


def test_features_do_not_depend_on_batch_size() -> None:
    run = en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, num_images=10).run
    pixels = en.sample_pixels(PREP, 33)
    whole = run(pixels)
    for size in (1, 7, 32):
        parts = np.concatenate([run(pixels[i : i + size]) for i in range(0, 33, size)])
        assert base.relative_error(parts, whole) < 1e-5


def test_images_too_small_for_a_network_are_refused_in_one_line() -> None:
    prep = dataclasses.replace(PREP, image_px=16, resize_px=16)
    config = settings(backbone="alexnet")
    with pytest.raises(UserError, match=r"alexnet cannot run on images of 16 px .*--image-px"):
        en.choose_engine(config, nn.Conv2d(3, 4, 32), prep, num_images=10)


def test_the_gpu_and_int8_are_refused_where_they_cannot_be(monkeypatch) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        en.choose_engine(settings(precision="amp"), load_backbone(BUNDLED, 0), PREP, num_images=10)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = settings(engine="openvino", device="cuda")
    with pytest.raises(UserError, match="--device cpu"):
        en.choose_engine(on_gpu, nn.Identity(), PREP, num_images=10)

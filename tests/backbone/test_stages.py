"""Pooled outputs of every stage beside the last layer, from one pass."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import featcache.backbone as bb
from featcache.backbone.load import frozen
from featcache.backbone.networks import remove_heads
from featcache.backbone.stages import StageFeatures, stage_columns
from featcache.config import BackboneInfo, ExtractConfig, StageColumns
from featcache.engine.fusion import fuse_for_cpu
from featcache.errors import UserError

RESNET18 = {
    "layer1.mean": 64, "layer1.std": 64, "layer2.mean": 128, "layer2.std": 128,
    "layer3.mean": 256, "layer3.std": 256, "layer4.std": 512, "last": 512,
}  # fmt: skip


def plain(name: str) -> torch.nn.Module:
    network = bb.build_network(name, seed=0)
    remove_heads(network)
    return frozen(network)


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_a_resnets_columns_end_in_its_last_layer() -> None:
    network, x = plain("resnet18"), images()
    columns = stage_columns(network, 64, "avg+std")
    assert dict(zip(columns.names, columns.widths, strict=True)) == RESNET18
    with torch.inference_mode():
        maps = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
        features = StageFeatures(network, columns.names)(x)
        assert torch.equal(features[:, columns.group("last")], network(x))
    assert torch.allclose(features[:, :64], maps.mean((2, 3)), atol=1e-6)
    deviation = maps.std((2, 3), correction=0)
    assert torch.allclose(features[:, columns.group("layer1.std")], deviation, atol=1e-5)


def test_means_alone() -> None:
    columns = stage_columns(plain("resnet18"), 64, "avg")
    assert columns.names == ("layer1.mean", "layer2.mean", "layer3.mean", "last")
    assert sum(columns.widths) == 960


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet50", 64), ("mobilenet_v3_small", 64), ("efficientnet_b0", 64), ("swin_t", 64),
        ("convnext_tiny", 64), ("densenet121", 64), ("shufflenet_v2_x0_5", 64), ("vgg11", 64),
        ("squeezenet1_1", 64), ("regnet_y_400mf", 64), ("mnasnet0_5", 64),
        pytest.param("vit_b_16", 224, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
        pytest.param("inception_v3", 224, marks=pytest.mark.slow),
        pytest.param("googlenet", 64, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_family_has_stages(name: str, side: int) -> None:
    network, x = plain(name), images(side)
    columns = stage_columns(network, side, "avg+std")
    assert len(columns.names) >= 5
    whole = StageFeatures(network, columns.names)
    with torch.inference_mode():
        features, last = whole(x), network(x).flatten(1)
        assert features.shape == (2, sum(columns.widths))
        assert torch.equal(features[:, -columns.widths[-1] :], last)
        # Engines run a copy, in a fused form where there is one.
        assert torch.equal(copy.deepcopy(whole)(x), features)
        fused = fuse_for_cpu(whole)(x.to(memory_format=torch.channels_last))
    assert (fused - features).norm() < 1e-5 * features.norm()


def test_what_is_identified_is_what_is_loaded(tmp_path: Path) -> None:
    config = ExtractConfig(dataset="digits", weights="bundled", layers="stages", pool="avg")
    info = bb.identify(config, 0, tmp_path)
    again = bb.identify(config, 0, tmp_path)
    assert again == info
    assert info.feature_dim == 960
    network = bb.load_backbone(config, 0, info)
    assert network(images()).shape == (2, 960)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    last = ExtractConfig(dataset="digits", weights="bundled")
    assert bb.identify(last, 0, tmp_path).stages is None


def test_records_of_columns_are_checked() -> None:
    for names, widths in (((), ()), (("a", "a"), (1, 1)), (("a", "last"), (1,)), (("a",), (0,))):
        with pytest.raises(UserError, match="columns"):
            StageColumns(pool="avg", names=names, widths=widths)
    with pytest.raises(UserError, match="not a backbone's record"):
        BackboneInfo.from_dict({"backbone": "resnet18"})


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (("layer3.1", "layer4"), ("layer3.1.mean", "layer3.1.std", "layer4.mean", "layer4.std")),
        (("last", "layer2.gem"), ("layer2.gem", "last")),
        (("layer1", "layer1.max"), ("layer1.mean", "layer1.std", "layer1.max")),
    ],
)
def test_layers_by_name(layers: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert stage_columns(plain("resnet18"), 64, "avg+std", layers).names == names


def test_outputs_are_pooled_before_the_next_layer_works_in_place() -> None:
    network, x = plain("resnet18"), images()
    with torch.inference_mode():
        stem = network.bn1(network.conv1(x))
        features = StageFeatures(network, ("bn1.mean", "bn1.max"))(x)
    assert stem.min() < 0  # the ReLU that follows would have removed that
    assert torch.allclose(features[:, :64], stem.mean((2, 3)), atol=1e-6)
    assert torch.equal(features[:, 64:], stem.amax((2, 3)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer9", r"--layers: ResNet has no module 'layer9'; there are layer4, layer3"),
        ("cls", r"--layers cls is for transformers, and ResNet is none: give last, stages or mod"),
        ("last4", r"--layers last4: ResNet has 0 transformer blocks in a row; give stages or nam"),
        ("layer4.cls", r"--layers: there is no class token in the output of this module"),
    ],
)
def test_layers_that_there_are_not(layers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_columns(plain("resnet18"), 64, "avg", (layers,))


@pytest.mark.parametrize("layers", ["", "last,last", "layer1,,layer2", "a b", "cls+max"])
def test_what_layers_cannot_say(layers: str) -> None:
    with pytest.raises(UserError, match="give last, stages, cls, mean, cls"):
        ExtractConfig(dataset="digits", layers=layers)

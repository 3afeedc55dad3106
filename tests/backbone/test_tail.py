"""A network cut before a stage: front and tail together are the network."""

from __future__ import annotations

import pytest
import torch

import featcache.backbone as bb
from featcache.backbone.stages import StageFeatures, stage_columns, stage_names
from featcache.backbone.tail import (
    Front,
    StagesTail,
    last_stage,
    names_in_tail,
    split_columns,
    stage_input,
    tail_layers,
    tail_of,
)
from featcache.config import BackboneInfo, Pool, Preprocessing, StageColumns, StageInput
from featcache.errors import UserError


@pytest.mark.parametrize(
    ("name", "side", "trained"),
    [
        ("resnet18", 64, ["layer4", "fc"]),
        ("squeezenet1_1", 64, [f"features.{n}" for n in (9, 10, 11, 12)] + ["classifier"]),
        ("shufflenet_v2_x0_5", 64, ["stage4", "conv5", "fc"]),
        ("regnet_y_400mf", 64, ["trunk_output.block4", "fc"]),
        pytest.param(
            "mobilenet_v3_small", 64, [f"features.{n}" for n in (9, 10, 11, 12)] + ["classifier"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mnasnet0_5", 64, [f"layers.{n}" for n in (12, 13, 14, 15)] + ["classifier"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "efficientnet_b0", 64, ["features.6", "features.7", "features.8", "classifier"],
            marks=pytest.mark.slow,
        ),
        pytest.param("vgg11", 64, ["classifier"], marks=pytest.mark.slow),
        pytest.param(
            "densenet121", 64,
            [f"features.{n}" for n in ("transition3", "denseblock4", "norm5")] + ["classifier"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "convnext_tiny", 64, ["features.6", "features.7", "classifier"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "swin_t", 64, ["features.6", "features.7", "norm", "head"], marks=pytest.mark.slow
        ),
        pytest.param("googlenet", 64, ["inception5a", "inception5b", "fc"], marks=pytest.mark.slow),
        pytest.param(
            "inception_v3", 224, ["Mixed_7a", "Mixed_7b", "Mixed_7c", "fc"], marks=pytest.mark.slow
        ),
        pytest.param("maxvit_t", 224, ["blocks.3", "classifier"], marks=pytest.mark.slow),
        pytest.param(
            "vit_b_16", 224,
            [f"encoder.layers.encoder_layer_{n}" for n in (9, 10, 11)] + ["encoder.ln", "heads"],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_every_family_can_be_cut(name: str, side: int, trained: list[str]) -> None:
    network = bb.build_network(name, seed=0).eval()
    stage = stage_names(network)[-1]
    cut = stage_input(network, stage, side)
    front, tail = Front(network, stage), tail_of(network, stage)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        activations = front(images)
        assert torch.equal(tail(activations.unflatten(1, cut.shape)), network(images))
    assert list(names_in_tail(network, tail)) == trained
    owned = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in tail.parameters()} <= owned


@pytest.mark.parametrize(
    ("name", "side", "number", "pool"),
    [
        ("resnet18", 64, -1, "avg+std"),
        ("resnet18", 64, 2, "max"),
        ("shufflenet_v2_x0_5", 64, -1, "avg+std"),
        pytest.param("densenet121", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 64, -2, "gem", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("vgg11", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("swin_t", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("googlenet", 64, -1, "avg+std", marks=pytest.mark.slow),
        pytest.param("vit_b_16", 224, -1, "avg+std", marks=pytest.mark.slow),
    ],
)
def test_with_all_stages_the_head_takes_what_a_cache_holds(
    name: str, side: int, number: int, pool: Pool
) -> None:
    network = bb.build_network(name, seed=0).eval()
    headless = bb.build_network(name, seed=0).eval()
    bb.networks.remove_heads(headless)
    stage = stage_names(network)[number]
    columns = stage_columns(headless, side, pool)
    early, late = split_columns(network, stage, columns)
    assert columns.names == (*early.names, *late.names)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    tail = StagesTail(network, stage, columns, side)
    assert bb.head_of(network)[1] is tail.head
    with torch.inference_mode():
        features = StageFeatures(headless, columns.names)(images)
        tail.head.mean.copy_(features.mean(0))
        tail.head.scale.copy_(1 + features[0].abs())
        logits = tail(Front(headless, stage, early)(images))
        expected = torch.nn.functional.linear(features, **tail.head.folded())
    # Reductions over the same numbers may be in another order.
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_no_linear_layer_takes_the_last_layer_only() -> None:
    assert (tail_layers("resnet18"), tail_layers("squeezenet1_1")) == ("stages", "last")
    network = bb.build_network("squeezenet1_1", seed=0)
    columns = StageColumns(pool="avg", names=("last",), widths=(512,))
    with pytest.raises(
        UserError, match=r"^--layers stages: the head of SqueezeNet is no linear layer; leave"
    ):
        StagesTail(network, stage_names(network)[-1], columns, 64)


def test_optional_arguments_of_a_network_are_left_at_their_defaults() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    network = bb.build_network("timm/vit_tiny_patch16_224", seed=0).eval()
    stage = stage_names(network)[-1]
    cut = stage_input(network, stage, 224)
    front, tail = Front(network, stage), tail_of(network, stage)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = tail(front(images).unflatten(1, cut.shape))
        assert torch.equal(logits, network(images))


def test_a_network_that_cannot_be_traced_says_so() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    network = bb.build_network("timm/test_vit", seed=0)
    with pytest.raises(UserError, match="this network cannot be cut before a stage"):
        tail_of(network, stage_names(network)[-1])


def test_every_stage_but_the_first() -> None:
    network = bb.build_network("resnet18", seed=0)
    shapes = [stage_input(network, f"layer{n}", 64).shape for n in (2, 3, 4)]
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert (last_stage("resnet18"), last_stage("shufflenet_v2_x0_5")) == ("layer4", "stage4")
    for stage in ("layer1", "layer9"):
        with pytest.raises(UserError, match="--from-stage"):
            tail_of(network, stage)


def test_records_are_checked() -> None:
    for stage, shape in (("", (1,)), ("layer4", ()), ("layer4", (2, 0))):
        with pytest.raises(UserError, match="activations"):
            StageInput(stage=stage, shape=shape)
    cut = StageInput(stage="layer4", shape=(2, 3))
    prep = Preprocessing(image_px=32, resize="squash", resize_px=32)
    fields = {"backbone": "resnet18", "weights": "random", "weights_sha256": "ab" * 32}
    made = BackboneInfo(**fields, feature_dim=6, preprocessing=prep, stage_input=cut)
    assert BackboneInfo.from_dict(made.to_dict()) == made
    with pytest.raises(UserError, match=r"activations of shape \(2, 3\) are not 7 numbers"):
        BackboneInfo(**fields, feature_dim=7, preprocessing=prep, stage_input=cut)

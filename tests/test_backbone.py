"""Backbones: weights by name and file, identity, freezing."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache import backbone as bb
from featcache.config import IMAGENET_MEAN, BackboneConfig
from featcache.errors import UserError

BUNDLED_SHA = "9ef04ded836621e09d9c91d88f5b4ededa694f938499ef2d95d7ffd8bbba8070"


def bundled(**changes: object) -> BackboneConfig:
    return BackboneConfig(weights="bundled", **changes)


def test_identity_of_the_bundled_backbone(tmp_path: Path) -> None:
    info = bb.identify(bundled(), 0, tmp_path)
    assert (info.backbone, info.weights, info.weights_sha256) == (
        "resnet18",
        "bundled",
        BUNDLED_SHA,
    )
    assert info.feature_dim == 512
    prep = info.preprocessing
    assert (prep.image_px, prep.resize, prep.resize_px) == (64, "crop", 64)
    assert prep.mean == IMAGENET_MEAN


def test_identity_is_remembered_and_a_changed_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = bb.read_state(bb.BUNDLED_FILE)
    save_file(state, path)
    config = BackboneConfig(weights=str(path))
    first = bb.identify(config, 0, tmp_path)
    state["conv1.weight"] = state["conv1.weight"] + 1
    save_file(state, path)
    second = bb.identify(config, 0, tmp_path)
    assert first.weights_sha256 != second.weights_sha256
    assert second.weights == "w.safetensors"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"image_px": 224, "resize": "squash", "normalize": "half"}, (224, "squash", 224, 0.5)),
        ({"image_px": 32}, (32, "crop", 32, IMAGENET_MEAN[0])),
        ({"normalize": "imagenet"}, (64, "crop", 64, IMAGENET_MEAN[0])),
    ],
)
def test_overrides_of_preprocessing(tmp_path: Path, overrides: dict, wanted: tuple) -> None:
    prep = bb.identify(bundled(**overrides), 0, tmp_path).preprocessing
    assert (prep.image_px, prep.resize, prep.resize_px, prep.mean[0]) == wanted


def test_imagenet_crop_keeps_its_ratio() -> None:
    own = bb.own_preprocessing(BackboneConfig())
    assert (own.image_px, own.resize_px) == (224, 256)
    assert BackboneConfig(image_px=112).preprocessing(own).resize_px == 128


def test_parameter_counts_are_exact() -> None:
    model = bb.build_classifier(bundled(), 10, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 11_181_642
    head = bb.head_of(model)[1]
    assert sum(p.numel() for p in head.parameters()) == 5_130
    frozen = bb.load_backbone(bundled(), 0)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


def test_features_are_those_of_torchvision() -> None:
    from torchvision import models

    network = models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    state = {k: v.float() for k, v in load_file(bb.BUNDLED_FILE).items()}
    network.load_state_dict(state)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), bb.load_backbone(bundled(), 0)(images))


@pytest.mark.parametrize(
    ("name", "dim", "px"),
    [
        ("squeezenet1_1", 512, 64),
        ("mobilenet_v3_small", 1024, 64),
        ("googlenet", 1024, 64),
        ("densenet121", 1024, 64),
        ("vit_b_32", 768, 224),
    ],
)
def test_other_networks_lose_their_head(tmp_path: Path, name: str, dim: int, px: int) -> None:
    config = BackboneConfig(backbone=name, weights="random")
    network = bb.load_backbone(config, 1)
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, px, px)).shape == (2, dim)
    assert bb.identify(config, 1, tmp_path).feature_dim == dim


def test_a_classifier_of_squeezenet_has_a_convolution_for_head() -> None:
    config = BackboneConfig(backbone="squeezenet1_1", weights="random")
    model = bb.build_classifier(config, 7, seed=0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_random_weights_follow_the_seed_and_leave_torch_alone() -> None:
    config = BackboneConfig(weights="random")
    before = torch.random.get_rng_state()
    one, again, other = (bb.state_sha256(bb.load_backbone(config, s)) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def wrapped_files(tmp_path: Path) -> list[Path]:
    state = bb.read_state(bb.BUNDLED_FILE)
    full = {**state, "fc.weight": torch.zeros(200, 512), "fc.bias": torch.zeros(200)}
    variants = {
        "plain.pth": state,
        "with_head.pth": full,
        "wrapped.pth": {"epoch": 3, "state_dict": full},
        "parallel.pt": {"model": {f"module.{k}": v for k, v in full.items()}},
        "lightning.pth": {"state_dict": {f"model.backbone.{k}": v for k, v in state.items()}},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / name)
    save_file(full, tmp_path / "with_head.safetensors")
    return [tmp_path / name for name in (*variants, "with_head.safetensors")]


def test_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    wanted = bb.state_sha256(bb.load_backbone(bundled(), 0))
    for path in wrapped_files(tmp_path):
        assert bb.state_sha256(bb.load_backbone(BackboneConfig(weights=str(path)), 0)) == wanted


class Boom:
    def __reduce__(self):
        return (Path("/nonexistent/executed").touch, ())


def bad_weights(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    paths: dict[str, tuple[Path, str]] = {}

    def put(name: str, content: object, message: str) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        paths[name] = (path, message)

    put("empty.pth", b"", "cannot be read as weights")
    put("text.safetensors", b"hello", "cannot be read as weights|not a safetensors file")
    huge = (2**62).to_bytes(8, "little") + b"{}"
    put("huge.safetensors", huge, "cannot be read as weights|not a safetensors file")
    put("list.pth", [1, 2], "holds a list, not a state dict")
    put("none.pth", {"state_dict": {"a": 1}}, "holds no tensors")
    put("pickle.pth", {"x": Boom()}, "cannot be read as weights")
    put("other.pth", {"a": torch.zeros(1)}, "does not fit --backbone resnet18: bn1.bias is missing")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**26))
    paths["bomb.pth"] = (bomb, "unpacks to")
    state = bb.read_state(bb.BUNDLED_FILE)
    put("shape.pth", {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, r"wanted \[64, 3, 7, 7\]")
    put("nan.pth", {**state, "bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias.*not finite")
    return paths


def test_bad_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    for path, message in bad_weights(tmp_path).values():
        with pytest.raises(UserError) as caught:
            bb.load_backbone(BackboneConfig(weights=str(path)), 0)
        assert re.search(message, str(caught.value)), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean resnet18"),
        ({"backbone": "resnet34", "weights": "bundled"}, "--weights bundled is a resnet18"),
        ({"weights": "bundle"}, "did you mean bundled"),
        ({"weights": "gone.pth"}, "no such file"),
        ({"backbone": "resnet34", "weights": str(bb.BUNDLED_FILE)}, "does not fit --backbone"),
    ],
)
def test_wrong_names_say_what_is_accepted(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bb.load_backbone(BackboneConfig(**{"weights": "random", **config}), 0)


def test_a_failed_download_names_both_ways_out(monkeypatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"--weights bundled .* or --weights FILE"):
        bb.load_backbone(BackboneConfig(), 0)


def test_safetensors_carry_their_preprocessing(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    prep = '{"image_px": 96, "resize": "squash", "mean": [0.5,0.5,0.5], "std": [0.5,0.5,0.5]}'
    save_file(bb.read_state(bb.BUNDLED_FILE), path, metadata={"preprocessing": prep})
    own = bb.own_preprocessing(BackboneConfig(weights=str(path)))
    assert (own.image_px, own.resize, own.mean[0]) == (96, "squash", 0.5)
    save_file({"x": torch.zeros(1)}, path, metadata={"preprocessing": '{"image_px": "a"}'})
    with pytest.raises(UserError, match="no usable preprocessing"):
        bb.own_preprocessing(BackboneConfig(weights=str(path)))


def test_state_hash_sees_batchnorm_buffers() -> None:
    network = bb.load_backbone(BackboneConfig(weights="random"), 0)
    before = bb.state_sha256(network)
    network.train()(torch.from_numpy(np.ones((2, 3, 32, 32), np.float32)))
    assert bb.state_sha256(network) != before


ARCHITECTURES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_that_is_filled_from_a_file_is_the_one_that_was_saved(
    name: str, tmp_path: Path
) -> None:
    saved = bb.build_network(name, seed=0).eval()
    file = tmp_path / "w.safetensors"
    save_file(saved.state_dict(), file)
    drawn = torch.random.get_rng_state()
    loaded = bb.load_backbone(BackboneConfig(backbone=name, weights=str(file)), 0)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    saved.set_submodule(bb.head_of(saved)[0], torch.nn.Identity())
    for part in ("named_parameters", "named_buffers"):
        wanted, got = dict(getattr(saved, part)()), dict(getattr(loaded, part)())
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_weights_without_counters_fill_a_network(tmp_path: Path) -> None:
    state = bb.read_state(bb.BUNDLED_FILE)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    config = BackboneConfig(weights=str(tmp_path / "w.safetensors"))
    network = bb.load_backbone(config, 0)
    assert int(network.bn1.num_batches_tracked) == 0
    assert network.conv1.weight.dtype == torch.float32
    model = bb.build_classifier(config, 3, 0)
    assert all(p.requires_grad and p.isfinite().all() for p in model.parameters())


def test_importing_torchvision_leaves_the_compiler_for_later() -> None:
    code = (
        "import sys; from featcache.runtime import import_torchvision as get;"
        "models = get('models'); print('torch._dynamo' in sys.modules);"
        "import torchvision; print(torchvision.ops.roi_align.__module__);"
        "from torchvision.ops import roi_align; import torch;"
        "box = torch.tensor([[0., 0., 0., 2., 2.]]);"
        "print(tuple(roi_align(torch.ones(1, 1, 4, 4), box, 2).shape));"
        "import torch._dynamo; print(torch._dynamo.is_compiling())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[0] == "False"
    assert out.stdout.split("\n")[2:4] == ["(1, 1, 2, 2)", "False"]

"""Weights by the names that torchvision gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featcache import backbone as bb
from featcache.config import BackboneConfig, weights_text
from featcache.errors import UserError

V1, V2 = "mobilenet_v2-b0353104.pth", "mobilenet_v2-7ebf99e0.pth"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as torch.hub's, with weights of our own under the names of torchvision's files."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    for seed, name in enumerate((V1, V2)):
        state = bb.build_network("mobilenet_v2", seed=seed).state_dict()
        torch.save(state, folder / "checkpoints" / name)
    return folder


def test_a_set_is_pinned_by_its_name(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    found = {
        weights: bb.identify(BackboneConfig(backbone="mobilenet_v2", weights=weights), 0, tmp_path)
        for weights in ("imagenet", "IMAGENET1K_V1", "IMAGENET1K_V2")
    }
    hashes = {weights: info.weights_sha256 for weights, info in found.items()}
    assert hashes["IMAGENET1K_V1"] == bb.file_sha256(hub / "checkpoints" / V1)
    assert hashes["IMAGENET1K_V2"] == bb.file_sha256(hub / "checkpoints" / V2)
    assert hashes["imagenet"] == hashes["IMAGENET1K_V2"]
    names = [(info.weights, info.weight_set) for info in found.values()]
    assert names == [
        ("imagenet", "IMAGENET1K_V2"),
        ("IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("IMAGENET1K_V2", "IMAGENET1K_V2"),
    ]
    assert weights_text(found["imagenet"].to_dict()) == "IMAGENET1K_V2"
    sizes = [info.preprocessing.resize_px for info in found.values()]
    assert sizes == [232, 256, 232]
    for weights, info in found.items():
        config = BackboneConfig(backbone="mobilenet_v2", weights=weights)
        network = bb.load_backbone(config, 0, info)
        seed = 0 if weights == "IMAGENET1K_V1" else 1
        drawn = bb.build_network("mobilenet_v2", seed=seed)
        assert torch.equal(network.features[0][0].weight, drawn.features[0][0].weight)


def test_sets_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        bb.identify(BackboneConfig(backbone="mobilenet_v2", weights="imagenet1k_v1"), 0, tmp_path)
    assert str(caught.value) == (
        "--weights 'imagenet1k_v1': give imagenet, bundled, random, a set of weights of "
        "mobilenet_v2 "
        "(IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT), or a file that ends in .safetensors or .pth, "
        ".pt, .ckpt, .bin, .tar; did you mean IMAGENET1K_V1?"
    )


def test_offline_one_line_names_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as caught:
        bb.identify(BackboneConfig(backbone="mobilenet_v2", weights="IMAGENET1K_V1"), 0, tmp_path)
    assert str(caught.value) == (
        "the weights IMAGENET1K_V1 of mobilenet_v2 could not be downloaded (no route to host); use "
        "--weights bundled (ResNet18, 64 px, offline) or --weights FILE (.safetensors or .pth)"
    )

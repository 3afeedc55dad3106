"""Networks given as modules in Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_helpers import make_folder
from featcache import (
    Classifier,
    ExportConfig,
    ExtractConfig,
    FeatureCache,
    PredictConfig,
    Preprocessing,
    TrainHeadConfig,
    export_classifier,
    extract_features,
    predict_images,
    train_head,
)
from featcache.config import InfoConfig, VerifyConfig
from featcache.errors import CacheError, UserError
from featcache.extract import check, check_lines, inspect, inspect_lines

PREP = Preprocessing(image_px=24, resize="squash", resize_px=24, mean=(0.0,) * 3, std=(1.0,) * 3)
NAME = f"module/{__name__}.Net"


class Net(nn.Module):
    """Two convolutions; features of both if `both`."""

    def __init__(self, seed: int = 0, *, both: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.both = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 16, 3, 2), both
        self.norm = nn.BatchNorm2d(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        first = self.one(images).relu_()
        second = self.norm(self.two(first)).relu_().mean((2, 3))
        return {"first": first.mean((2, 3)), "second": second} if self.both else second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("own") / "pets", train=8, test=2)


def settings(folder: Path, tmp_path: Path, **changes: object) -> ExtractConfig:
    return ExtractConfig(
        dataset=str(folder), cache_dir=tmp_path, workers=1, device="cpu", **changes
    )


def test_a_module_is_cached_and_found_again(folder: Path, tmp_path: Path) -> None:
    net = Net().train()
    config = settings(folder, tmp_path)
    report = extract_features(config, backbone=net, preprocessing=PREP)
    assert not report["hit"]
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    cache = FeatureCache(report["cache"])
    info = cache.meta.backbone
    assert (info.backbone, info.weights, info.feature_dim) == (NAME, "own", 16)
    assert info.preprocessing == PREP
    again = extract_features(config, backbone=Net(), preprocessing=PREP)
    assert again["hit"]
    with pytest.raises(CacheError, match=r"backbone.weights_sha256 is \w+… in the cache"):
        extract_features(config, backbone=Net(1), preprocessing=PREP)
    images = torch.from_numpy(_pixels(folder)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        plain = net.eval()(images).numpy()
    assert np.abs(cache.split("test").X - plain).max() < 1e-5 * np.abs(plain).max()


def _pixels(folder: Path) -> np.ndarray:
    from PIL import Image

    paths = sorted((folder / "test").rglob("*.png"))
    return np.stack([np.asarray(Image.open(p).resize((24, 24), Image.BILINEAR)) for p in paths])


@pytest.mark.parametrize(
    ("both", "layers", "names"),
    [
        (True, "last", {"first": 8, "second": 16}),
        (False, "one,last", {"one.mean": 8, "one.std": 8, "last": 16}),
    ],
)
def test_columns_of_a_module(
    folder: Path, tmp_path: Path, both: bool, layers: str, names: dict[str, int]
) -> None:
    config = settings(folder, tmp_path, layers=layers)
    net = Net(both=both)
    report = extract_features(config, backbone=net, preprocessing=PREP)
    stages = FeatureCache(report["cache"]).meta.backbone.stages
    assert dict(zip(stages.names, stages.widths, strict=True)) == names
    head = train_head(TrainHeadConfig(cache=report["cache"], solver="ridge"))["head"]
    paths = sorted((folder / "test").rglob("*.png"))
    classifier = Classifier.load(head, backbone=net)
    cached = FeatureCache(report["cache"]).split("test").X
    assert np.allclose(classifier.features(paths), cached, atol=1e-6)
    exported = export_classifier(ExportConfig(model=head, output=tmp_path / "m.pt2"), backbone=net)
    assert exported["max_relative_difference"] < 1e-5


def test_what_a_name_cannot_rebuild_says_so(folder: Path, tmp_path: Path) -> None:
    report = extract_features(settings(folder, tmp_path), backbone=Net(), preprocessing=PREP)
    cache = Path(report["cache"])
    head = train_head(TrainHeadConfig(cache=cache, solver="ridge"))["head"]
    message = (
        f"{head} was trained on features of {NAME}, a module given in Python, which cannot be "
        f"rebuilt from its name: in Python, Classifier.load({head!r}, backbone=module)"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        predict_images(PredictConfig(model=head, inputs=(str(folder),)))
    with pytest.raises(CacheError, match="give the module that made the features"):
        Classifier.load(head, backbone=Net(1))
    sound = check_lines(check(VerifyConfig(cache=cache)))
    assert sound[1].startswith(f"not recomputable: {NAME} is a module given in Python")
    assert "module given in Python: its name" in inspect_lines(inspect(InfoConfig(cache=cache)))[2]
    data = bytearray(cache.read_bytes())
    features = FeatureCache(cache).file.layout.features("train").offset
    data[features] ^= 1
    cache.write_bytes(data)
    with pytest.raises(CacheError, match=f"cannot be repaired: {NAME} is a module given in Pyt"):
        check(VerifyConfig(cache=cache, repair=True, dataset=str(folder)))


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        ("net", {}, "backbone: give a torch module, not a str"),
        (nn.Conv2d(3, 4, 3), {}, r"Conv2d gives \[1, 4, 22, 22\] for one image: it has to give"),
        (nn.Linear(5, 5), {}, "Linear cannot run on images of 24 px"),
        (Net(), {"backbone": "resnet34"}, "was given as a module: leave backbone and weights out"),
        (
            Net(),
            {"batchnorm": "adapt"},
            'from_stage and batchnorm="adapt" are for networks by name',
        ),
        (Net(), {"from_stage": "two"}, 'from_stage and batchnorm="adapt" are for networks by'),
        (Net(), {"layers": "stages"}, "layers stages: the stages of Net are not known; name its"),
        (Net(), {"layers": "three"}, "layers: Net has no module 'three'; there are one, two, nor"),
        (Net(both=True), {"layers": "one"}, "gives a dict by itself: leave layers out"),
    ],
)
def test_what_is_no_backbone(
    folder: Path, tmp_path: Path, module: object, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        extract_features(settings(folder, tmp_path, **changes), backbone=module, preprocessing=PREP)


def test_a_module_for_a_head_of_a_named_network(tmp_path: Path) -> None:
    from trained_helpers import extracted_cache, linear_head, write_head

    head = write_head(tmp_path / "h.safetensors", linear_head(extracted_cache(tmp_path)))
    with pytest.raises(UserError, match="is for resnet18, which has a name: leave the module out"):
        Classifier.load(head, backbone=Net())

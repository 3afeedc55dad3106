"""Features of all stages, and of a network whose BatchNorm statistics are those of the images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import make_folder
from featcache import Classifier, FeatureCache
from featcache.backbone import load_backbone
from featcache.config import BackboneConfig, ExtractConfig, TrainHeadConfig, VerifyConfig
from featcache.data import load_dataset, normalize, to_pixels
from featcache.errors import UserError
from featcache.extract import check, extract
from featcache.heads import train_head


@pytest.fixture
def config(tmp_path: Path) -> ExtractConfig:
    folder = make_folder(tmp_path / "pets", train=10, test=3)
    return ExtractConfig(
        dataset=str(folder), weights="random", image_px=32, cache_dir=tmp_path, engine="torch"
    )


def test_stages_are_cached_as_halves_and_the_rest_follows(
    config: ExtractConfig, tmp_path: Path
) -> None:
    plain = FeatureCache(extract(config)["cache"]).split("train").X
    config = dataclasses.replace(config, layers="stages")
    report = extract(config)
    assert report["feature_dim"] == 1920
    assert extract(config)["hit"]
    cache = FeatureCache(report["cache"])
    X = cache.split("train").X
    assert X.dtype == np.float16
    assert np.allclose(X[:, -512:], plain, rtol=1e-3, atol=1e-3)
    head = train_head(TrainHeadConfig(cache=cache.path, solver="ridge"))
    test = cache.split("test")
    features = Classifier.load(head["head"]).features(tmp_path / "pets" / test.ids[0])
    assert np.allclose(features[0], test.X[0], rtol=1e-3, atol=1e-3)
    # A damaged row is computed again, stages and all.
    data = bytearray(cache.path.read_bytes())
    before = bytes(data)
    place = data.rfind(X[3].tobytes())
    data[place] ^= 1
    cache.path.write_bytes(data)
    settings = {"cache": cache.path, "dataset": config.dataset}
    assert check(VerifyConfig(**settings, repair=True))["num_repaired"] > 0
    assert cache.path.read_bytes() == before


def adapted_network(config: ExtractConfig) -> torch.nn.Module:
    cache = FeatureCache(extract(config)["cache"])
    weights = config.cache_dir / cache.meta.backbone.weights
    assert weights.name.startswith("random-batchnorm-")
    return load_backbone(BackboneConfig(weights=str(weights)), 0)


def test_a_head_beside_the_cache_finds_its_weights(config: ExtractConfig, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere" / "x.h5"
    cache = extract(dataclasses.replace(config, batchnorm="adapt", output=place))["cache"]
    head = train_head(TrainHeadConfig(cache=Path(cache), solver="ridge"))["head"]
    picture = next((tmp_path / "pets").rglob("*.png"))
    assert len(Classifier.load(head).predict(picture)) == 1


def test_statistics_are_those_of_the_train_images(config: ExtractConfig) -> None:
    config = dataclasses.replace(config, batchnorm="adapt")
    network = adapted_network(config)
    train = load_dataset(config).splits["train"]
    prep = FeatureCache(extract(config)["cache"]).meta.backbone.preprocessing
    pixels = np.stack([to_pixels(train.load(row), prep) for row in range(len(train))])
    with torch.inference_mode():
        maps = network.conv1(normalize(torch.from_numpy(pixels), prep))
    # Two batches of ten: the mean of their means is that of all.
    assert torch.allclose(network.bn1.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    again = dataclasses.replace(config, cache_dir=config.cache_dir / "again")
    other = adapted_network(again)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))


def test_an_adapted_network_is_frozen_and_serves_everywhere(config: ExtractConfig) -> None:
    config = dataclasses.replace(config, batchnorm="adapt")
    report = extract(config)
    assert not report["hit"]
    assert extract(config)["hit"]
    plain = extract(dataclasses.replace(config, batchnorm="frozen"))
    assert plain["weights_sha256"] != report["weights_sha256"]
    head = train_head(TrainHeadConfig(cache=Path(report["cache"]), solver="ridge"))
    split = FeatureCache(report["cache"]).split("test")
    images = [Path(config.dataset) / name for name in split.ids]
    features = Classifier.load(head["head"]).features(images)
    assert np.allclose(features, split.X, rtol=1e-4, atol=1e-4)


def test_the_test_split_has_no_say(config: ExtractConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, batchnorm="adapt")
    network = adapted_network(config)
    for path in (tmp_path / "pets" / "test").rglob("*.png"):
        path.unlink()
    make_folder(tmp_path / "more", train=1, test=3)
    for path in (tmp_path / "more" / "train").rglob("*.png"):
        name = f"{path.parent.name}/{path.name}"
        (tmp_path / "pets" / "test" / name).write_bytes(path.read_bytes())
    other = adapted_network(dataclasses.replace(config, cache_dir=tmp_path / "other"))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))


def test_a_network_without_batchnorm_is_refused(config: ExtractConfig) -> None:
    config = dataclasses.replace(config, backbone="squeezenet1_1", batchnorm="adapt")
    with pytest.raises(UserError, match="squeezenet1_1 has no BatchNorm layers"):
        extract(config)

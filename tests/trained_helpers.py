"""Caches that a small network extracted, and trained heads and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_helpers import make_folder
from featcache.backbone import build_classifier
from featcache.cache import FeatureCache
from featcache.config import BackboneConfig, ExtractConfig, Preprocessing
from featcache.extract import extract
from featcache.heads import KnnHead, LinearHead, save_head
from featcache.tensor_files import ModelCard, write_model

PREP = Preprocessing(image_px=32, resize="squash", resize_px=32, mean=(0.4,) * 3, std=(0.3,) * 3)


def extracted_cache(root: Path, **settings: object) -> FeatureCache:
    """Features of 16 train pictures under root/pets, by a random resnet18 at 32 px."""
    folder = make_folder(root / "pets", train=8, test=2)
    options = {"weights": "random", "image_px": 32, "cache_dir": root / "cache", "workers": 1}
    report = extract(ExtractConfig(dataset=str(folder), **{**options, **settings}))
    return FeatureCache(Path(report["cache"]))


def provenance_of(cache: FeatureCache) -> dict[str, Any]:
    """What train-head records of a cache."""
    values: dict[str, Any] = json.loads(cache.meta.to_json())
    return {**values, "cache": cache.path.name}


def linear_head(cache: FeatureCache) -> LinearHead:
    """A head with drawn weights, made for logits of a few units on the cache's features."""
    rng = np.random.default_rng(0)
    X = cache.split("train").X.astype(np.float32)
    weight = rng.normal(size=(2, X.shape[1])).astype(np.float32) / X.std()
    return LinearHead(
        weight=weight,
        bias=(-weight @ X.mean(0)).astype(np.float32),
        class_names=cache.class_names,
        provenance=provenance_of(cache),
    )


def knn_head(cache: FeatureCache, metric: str) -> KnnHead:
    split = cache.split("train")
    return KnnHead(
        rows=np.array(split.X, np.float32),
        labels=np.array(split.y),
        class_names=cache.class_names,
        k=3,
        metric=metric,
        provenance=provenance_of(cache),
    )


def write_head(path: Path, head: LinearHead | KnnHead, **backbone: object) -> Path:
    """Write a head file; keywords replace what its provenance says of the backbone."""
    provenance = {**head.provenance, "backbone": {**head.provenance["backbone"], **backbone}}
    save_head(path, head, provenance)
    return path


def make_model(path: Path, backbone: str = "resnet18", **card: object) -> Path:
    """A fine-tuned model that was never tuned, of three classes."""
    network = build_classifier(BackboneConfig(backbone=backbone, weights="random"), 3, 0)
    fields = {
        "backbone": backbone,
        "class_names": ["cat", "dog", "eel"],
        "preprocessing": PREP,
        "provenance": {},
        "scores": {"test_top1": 0.5},
    }
    write_model(path, network.state_dict(), ModelCard(**{**fields, **card}))
    return path

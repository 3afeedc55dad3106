"""Which network and weights a command means, in a form that can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from featcache.backbone.load import loaded_network
from featcache.backbone.networks import build_network, feature_dim_of, head_of, state_sha256
from featcache.backbone.weights import (
    NAMED_WEIGHTS,
    download,
    given_file,
    own_preprocessing,
    weights_file,
)
from featcache.config import BackboneConfig, BackboneInfo, Preprocessing
from featcache.memo import Memo, is_settled, stamp_of
from featcache.runtime import version_of


def identify(config: BackboneConfig, seed: int, cache_dir: Path) -> BackboneInfo:
    """Say which network and weights a command means, without torch where that is already known.

    Answers are remembered in `cache_dir` under the weights file's size, times and inode.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    is_file = config.weights not in NAMED_WEIGHTS
    spec = str(given_file(config).absolute()) if is_file else config.weights
    # Random weights depend on the seed and on how this torch draws.
    drawn = f"{seed}:{version_of('torch')}:{version_of('torchvision')}"
    key = f"backbone:{config.backbone}:{spec}:{drawn if spec == 'random' else ''}"
    known = _remembered(memo := Memo(cache_dir), key)
    if known is None:
        path, known = _identity(config, seed)
        status = os.stat(path) if path else None
        if status is None or is_settled(status, time.time()):
            memo.put(f"{key}:path", (), path)
            memo.put(key, stamp_of(status) if status else (), known)
            memo.save()
    own = Preprocessing.from_dict(known["preprocessing"])
    return BackboneInfo(
        backbone=config.backbone,
        weights=Path(spec).name if is_file else spec,
        weights_sha256=known["weights_sha256"],
        feature_dim=known["feature_dim"],
        preprocessing=config.preprocessing(own),
    )


def _identity(config: BackboneConfig, seed: int) -> tuple[str, dict[str, Any]]:
    """Compute what `identify` remembers: the weights file ("" for random) and its facts."""
    if config.weights == "imagenet":
        download(config.backbone)
    file = weights_file(config)
    model = build_network(config.backbone, seed=None) if file else loaded_network(config, seed)
    return str(file or ""), {
        "weights_sha256": file_sha256(file) if file else state_sha256(model),
        "feature_dim": feature_dim_of(head_of(model)[1]),
        "preprocessing": dataclasses.asdict(own_preprocessing(config)),
    }


def _remembered(memo: Memo, key: str) -> dict[str, Any] | None:
    """What `identify` found earlier, if the weights file is still the same."""
    path = memo.get(f"{key}:path", ())
    if not isinstance(path, str):
        return None
    try:
        known = memo.get(key, stamp_of(os.stat(path)) if path else ())
    except OSError:
        return None
    return known if isinstance(known, dict) else None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

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
    WeightsFile,
    given_file,
    own_preprocessing,
    weights_of,
)
from featcache.config import BackboneConfig, BackboneInfo, Preprocessing
from featcache.file_hashes import Memo, is_settled, stamp_of
from featcache.files import open_regular
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
        now_s = time.time()
        file = weights_of(config)
        known = _identity(config, seed, file)
        if file is None or (is_settled(file.status, now_s) and _is_still(file)):
            memo.put(f"{key}:path", (), str(file.path) if file else "")
            memo.put(key, stamp_of(file.status) if file else (), known)
            memo.save()
    own = Preprocessing.from_dict(known["preprocessing"])
    return BackboneInfo(
        backbone=config.backbone,
        weights=Path(spec).name if is_file else spec,
        weights_sha256=known["weights_sha256"],
        feature_dim=known["feature_dim"],
        preprocessing=config.preprocessing(own),
    )


def _identity(config: BackboneConfig, seed: int, file: WeightsFile | None) -> dict[str, Any]:
    """Compute what `identify` remembers; no file means random weights."""
    if file is None:
        model = loaded_network(config, seed, None)
    else:
        model = build_network(config.backbone, seed=None)
    return {
        "weights_sha256": file.sha256 if file else state_sha256(model),
        "feature_dim": feature_dim_of(head_of(model)[1]),
        "preprocessing": dataclasses.asdict(own_preprocessing(config, file)),
    }


def _is_still(file: WeightsFile) -> bool:
    """Whether the file was left alone while it was read."""
    try:
        return stamp_of(os.stat(file.path)) == stamp_of(file.status)
    except OSError:
        return False


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
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

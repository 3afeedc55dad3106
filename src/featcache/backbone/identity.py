"""The identity of a command's network and weights, in a form that can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from pathlib import Path

from featcache.backbone.load import loaded_network, without_head
from featcache.backbone.networks import build_network, feature_dim_of, head_of, state_sha256
from featcache.backbone.weights import (
    NAMED_WEIGHTS,
    WeightsFile,
    given_file,
    own_preprocessing,
    weights_of,
)
from featcache.config import (
    BackboneConfig,
    BackboneInfo,
    JsonObject,
    Preprocessing,
    StageColumns,
    StageInput,
)
from featcache.file_hashes import Memo, is_settled, stamp_of
from featcache.files import open_regular
from featcache.runtime import version_of


def identify(config: BackboneConfig, seed: int, cache_dir: Path) -> BackboneInfo:
    """Identify the network and weights of a command, without torch where they are known already.

    Identities are remembered in `cache_dir` under the weights file's size, times and inode.

    Raises:
        UserError: Unknown backbone, or weights that cannot be obtained or do not fit.
    """
    is_file = config.weights not in NAMED_WEIGHTS
    spec = str(given_file(config).absolute()) if is_file else config.weights
    # Random weights depend on the seed and on how this torch draws.
    drawn = f"{seed}:{version_of('torch')}:{version_of('torchvision')}"
    key = f"backbone:{config.backbone}:{spec}:{drawn if spec == 'random' else ''}"
    if config.stage_pool is not None:
        key += f":{config.stage_pool}"
    if config.cached_stage is not None:
        key += f":from {config.cached_stage}"
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
    return BackboneInfo.from_dict(
        {
            **known,
            "backbone": config.backbone,
            "weights": Path(spec).name if is_file else spec,
            "preprocessing": dataclasses.asdict(config.preprocessing(own)),
        }
    )


def _identity(config: BackboneConfig, seed: int, file: WeightsFile | None) -> JsonObject:
    """Compute what `identify` remembers; no file means random weights."""
    if file is None:
        model = loaded_network(config, seed, None)
    else:
        model = build_network(config.backbone, seed=None)
    own = own_preprocessing(config, file)
    stages = None if config.stage_pool is None else _stages(config, own)
    cut = None if config.cached_stage is None else _stage_input(config, own)
    width = feature_dim_of(head_of(model)[1])
    return {
        "weights_sha256": file.sha256 if file else state_sha256(model),
        "feature_dim": sum(stages.widths) if stages else math.prod(cut.shape) if cut else width,
        "preprocessing": dataclasses.asdict(own),
        "stages": dataclasses.asdict(stages) if stages else None,
        "stage_input": dataclasses.asdict(cut) if cut else None,
    }


def _stages(config: BackboneConfig, own: Preprocessing) -> StageColumns:
    """The columns of a network's stages, which do not depend on its weights."""
    from featcache.backbone.stages import stage_columns

    assert config.stage_pool is not None
    network = without_head(build_network(config.backbone, seed=0))
    return stage_columns(network, config.preprocessing(own).image_px, config.stage_pool)


def _stage_input(config: BackboneConfig, own: Preprocessing) -> StageInput:
    """The shape of a stage's input, which does not depend on the weights."""
    from featcache.backbone.tail import stage_input

    assert config.cached_stage is not None
    network = without_head(build_network(config.backbone, seed=0))
    return stage_input(network, config.cached_stage, config.preprocessing(own).image_px)


def _is_still(file: WeightsFile) -> bool:
    """Whether the file was unchanged while it was read."""
    try:
        return stamp_of(os.stat(file.path)) == stamp_of(file.status)
    except OSError:
        return False


def _remembered(memo: Memo, key: str) -> JsonObject | None:
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

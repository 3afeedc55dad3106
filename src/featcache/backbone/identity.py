"""The identity of a command's network and weights, in a form that can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.backbone.load import frozen, loaded_network
from featcache.backbone.networks import build_network, remove_heads, state_sha256
from featcache.backbone.weights import (
    WeightsFile,
    given_file,
    is_file,
    is_pretrained,
    own_preprocessing,
    pretrained_name,
    weights_of,
)
from featcache.config import (
    TIMM,
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

if TYPE_CHECKING:
    pass


def identify(config: BackboneConfig, seed: int, cache_dir: Path) -> BackboneInfo:
    """Identify the network and weights of a command, without torch where they are known already.

    Identities are remembered in `cache_dir` under the weights file's size, times and inode.

    Raises:
        UserError: Unknown backbone, or weights that cannot be obtained or do not fit.
    """
    given = not is_pretrained(config) and config.weights != "random"
    spec = str(given_file(config).absolute()) if given else config.weights
    known = _remembered(memo := Memo(cache_dir), key := _key(config, spec, seed))
    if known is None:
        now_s = time.time()
        file = weights_of(config)
        known = _identity(config, seed, file)
        if file is None or (is_settled(file.status, now_s) and _is_still(file)):
            memo.put(f"{key}:path", (), str(file.path) if file else "")
            memo.put(key, stamp_of(file.status) if file else (), known)
            memo.save()
    own = Preprocessing.from_dict(known["preprocessing"])
    named = {
        "backbone": config.backbone,
        "weights": Path(spec).name if is_file(config.weights) else config.weights,
    }
    prep = dataclasses.asdict(config.preprocessing(own))
    return BackboneInfo.from_dict({**named, **known, "preprocessing": prep})


def _key(config: BackboneConfig, spec: str, seed: int) -> str:
    """Under which name an identity is remembered."""
    parts = ["backbone", config.backbone, spec]
    if config.weights == "random":  # depend on the seed, and on how this torch draws
        parts += [str(seed), version_of("torch")]
    if not is_file(config.weights):  # the libraries say which network and weights a name means
        parts.append(version_of("torchvision"))
    if config.backbone.startswith(TIMM):
        parts += [version_of("timm"), str(config.image_px)]
    if config.cached_stage is not None:
        parts += ["from", config.cached_stage, str(config.image_px)]
    if config.stage_pool is not None:
        parts += [*config.asked_layers, config.stage_pool, str(config.image_px)]
    return ":".join(parts)


def _identity(config: BackboneConfig, seed: int, file: WeightsFile | None) -> JsonObject:
    """Compute what `identify` remembers; no file means random weights."""
    if file is None:
        model = loaded_network(config, seed, None)
    else:
        model = build_network(config.backbone, seed=None, image_px=config.image_px)
    sha256 = file.sha256 if file else state_sha256(model)
    own = own_preprocessing(config, file)
    dim = remove_heads(model)
    stages, cut = _layers(config, config.preprocessing(own).image_px)
    width = stages.num_columns if stages else 0
    found = {
        "weights_sha256": sha256,
        "feature_dim": math.prod(cut.shape) + width if cut else width or dim,
        "preprocessing": dataclasses.asdict(own),
        "stages": dataclasses.asdict(stages) if stages else None,
        "stage_input": dataclasses.asdict(cut) if cut else None,
    }
    return {**found, **_published(config)}


def _published(config: BackboneConfig) -> dict[str, str]:
    """What pretrained weights are called; those of timm by one name however they were asked for."""
    if not is_pretrained(config):
        return {}
    name = pretrained_name(config)
    if not config.backbone.startswith(TIMM):
        return {"weight_set": name}
    architecture, _, tag = name.partition(".")
    return {"backbone": TIMM + architecture, "weights": tag, "weight_set": name}


def _layers(config: BackboneConfig, image_px: int) -> tuple[StageColumns | None, StageInput | None]:
    """The columns that a row has, and the stage whose input comes before them.

    Neither depends on the weights.
    """
    if config.stage_pool is None and config.cached_stage is None:
        return None, None
    from featcache.backbone.stages import stage_columns
    from featcache.backbone.tail import split_columns, stage_input

    network = build_network(config.backbone, seed=0, image_px=config.image_px)
    remove_heads(network)
    network, columns, cut = frozen(network), None, None
    if config.stage_pool is not None:
        columns = stage_columns(network, image_px, config.stage_pool, config.asked_layers)
    if config.cached_stage is not None:
        cut = stage_input(network, config.cached_stage, image_px)
        if columns is not None:
            columns, _ = split_columns(network, cut.stage, columns)
    return columns, cut


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

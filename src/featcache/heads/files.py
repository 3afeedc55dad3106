"""Head files: safetensors with JSON metadata; no pickle, and nothing believed unchecked.

Format "featcache-head", version 1. Tensors: `weight` [C, D] and `bias` [C], with `mean` and `scale`
[D] when features were standardized (already folded into weight and bias); or, for knn, `rows`
[N, D] and `labels` [N]. Metadata: `format`, `version`, and `head`, a JSON object of the rest;
without `decision`, which 0.1.0 did not write, nothing is calibrated. Where rows were held out,
`known.rows` [m, D] and `known.confidence`, `known.distance` and `known.strangeness` [n] tell images
of other classes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from featcache.config import BackboneInfo, CacheMeta, JsonObject, flatten
from featcache.errors import CacheError, UserError
from featcache.files import write_atomically
from featcache.heads.linear import PLAIN, Decision, KnownRows, LinearHead
from featcache.heads.solvers.knn import KnnHead
from featcache.tensor_files import Arrays, TensorFile, read_tensor_file

FORMAT, VERSION = "featcache-head", "1"
MARKS = re.compile(rb'"%s"' % FORMAT.encode())
DTYPES = ("float16", "float32", "float64", "int64")
KNOWN = "known."
"""How the names of a head's `KnownRows` begin in the file."""
Head = LinearHead | KnnHead


def save_head(path: Path, head: Head, provenance: JsonObject | None = None) -> None:
    """Write a head file, whole or not at all.

    Args:
        path: The .safetensors file.
        head: What to write.
        provenance: Replaces the head's own, if given.

    Raises:
        StorageError: The file system refused.
    """
    from safetensors.numpy import save

    if provenance is not None:
        head = head.replace(provenance=provenance)
    tensors: Arrays = {}
    rest: JsonObject = {}
    for item in dataclasses.fields(head):
        value = getattr(head, item.name)
        if isinstance(value, np.ndarray):
            tensors[item.name] = np.ascontiguousarray(value)
        elif isinstance(value, KnownRows):
            tensors |= {
                KNOWN + part.name: getattr(value, part.name) for part in dataclasses.fields(value)
            }
        elif isinstance(value, Decision):
            rest |= {} if value == PLAIN else {item.name: value.to_json()}
        elif value is not None:
            rest[item.name] = value
    metadata = {"format": FORMAT, "version": VERSION, "head": json.dumps(rest, sort_keys=True)}
    write_atomically(path, save(tensors, metadata=metadata))


def load_head(path: Path | str) -> Head:
    """Read a head file.

    Raises:
        UserError: It is not a head file, is damaged, or is of another version.
        StorageError: It cannot be read.
    """
    return parse_head(read_tensor_file(Path(path)))


def parse_head(file: TensorFile) -> Head:
    """The head in a file that was read.

    Raises:
        UserError: It is not a head file, is damaged, or is of another version.
    """
    path, metadata = file.path, file.metadata
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a head file: give one that train-head wrote")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} is of head format version {metadata.get('version')!r:.20}; this featcache "
            f"reads version {VERSION}: upgrade featcache, or run train-head again"
        )
    tensors = file.arrays()
    try:
        rest = json.loads(metadata["head"])
        kind = KnnHead if "rows" in tensors else LinearHead
        known = {KNOWN + item.name: item.name for item in dataclasses.fields(KnownRows)}
        names = known.keys() | {item.name for item in dataclasses.fields(kind)} - {"known"}
        if unknown := (rest.keys() | tensors.keys()) - names:
            raise UserError(f"unknown parts {', '.join(sorted(unknown))}")
        _check_types(rest, tensors)
        parts: JsonObject = {**rest, **tensors}
        if "decision" in rest:
            parts["decision"] = Decision.from_json(rest["decision"])
        if stored := {name: parts.pop(key) for key, name in known.items() if key in tensors}:
            parts["known"] = KnownRows(**stored)
        head = kind(**parts)
        _check_values(head, tensors)
    except (UserError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is a damaged head file ({str(error)[:200]}): run train-head again"
        ) from error
    return head


def check_head_fits(head: Head, features: CacheMeta | BackboneInfo) -> None:
    """Refuse a head for features that another network or preprocessing made.

    The weights file's name does not matter, its content does.

    Args:
        head: With the provenance of the cache it was trained on.
        features: How the features to be classified were made.

    Raises:
        CacheError: Naming the first field that differs.
    """
    theirs = head.provenance.get("backbone")
    if not isinstance(theirs, dict):
        raise CacheError("the head does not say which features it is for: run train-head again")
    info = features if isinstance(features, BackboneInfo) else features.backbone
    ours = flatten(json.loads(json.dumps(info.to_dict())))
    recorded = flatten(theirs)
    for name in sorted(ours.keys() | recorded.keys()):
        if name != "weights" and ours.get(name) != recorded.get(name):
            raise CacheError(
                f"the head was trained on features with {name} {recorded.get(name)!r:.80}, these "
                f"have {ours.get(name)!r:.80}: use the head's weights and preprocessing, or run "
                "train-head on a cache of these features"
            )


def _check_types(rest: JsonObject, tensors: Arrays) -> None:
    for name, values in tensors.items():
        if values.dtype not in DTYPES or values.ndim > 2 or not values.size:
            raise UserError(f"tensor {name!r:.40} is {values.dtype} {list(values.shape)}")
    names = rest["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("class_names is not a list of names")
    for key in ("chosen", "scores", "provenance"):
        if not isinstance(rest.get(key, {}), dict):
            raise UserError(f"{key} is not a table")


def _check_values(head: Head, tensors: Arrays) -> None:
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise UserError(f"{name} has values that are not finite")
        if name == f"{KNOWN}rows" and values.shape[1] != head.feature_dim:
            raise UserError(f"{name} has shape {values.shape}, not [m, {head.feature_dim}]")
        if name in ("mean", "scale") and values.shape != (head.feature_dim,):
            raise UserError(f"{name} has shape {values.shape}, not [{head.feature_dim}]")
    num_outputs, decision = len(head.class_names), head.decision
    if decision.label_thresholds is not None and len(decision.label_thresholds) != num_outputs:
        raise UserError(f"{len(decision.label_thresholds)} thresholds for {num_outputs} labels")
    if decision.task == "regression" and num_outputs != 1:
        raise UserError(f"{num_outputs} outputs for one number")

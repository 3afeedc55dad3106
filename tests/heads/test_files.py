"""Head files: what was saved comes back, and nothing else is believed."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save

from featcache import tensor_files
from featcache.errors import CacheError, UserError
from featcache.heads import KnnHead, LinearHead, check_head_fits, load_head, save_head
from heads_data import blobs, cache_meta

NAMES = ["ape", "bee", "cat"]


def linear(dtype=np.float32, **fields):
    random = np.random.default_rng(0)
    return LinearHead(
        weight=random.normal(size=(3, 8)).astype(dtype),
        bias=random.normal(size=3).astype(dtype),
        class_names=NAMES,
        **fields,
    )


def saved_linear(**rest):
    """Bytes of a head file whose parts can be changed by keyword."""
    parts = {"class_names": NAMES, "solver": "ridge", **rest.pop("head", {})}
    metadata = {"format": "featcache-head", "version": "1", "head": json.dumps(parts)}
    tensors = {"weight": np.ones((3, 8), np.float32), "bias": np.ones(3, np.float32)}
    tensors |= rest.pop("tensors", {})
    metadata |= rest
    return save({k: v for k, v in tensors.items() if v is not None}, metadata)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear_head_comes_back(tmp_path, dtype):
    head = linear(
        dtype, mean=np.arange(8.0), scale=np.ones(8), solver="ridge",
        chosen={"strength": 0.1, "candidates": [{"strength": 0.1}]}, scores={"test_top1": 0.5},
    )  # fmt: skip
    save_head(tmp_path / "h.safetensors", head, {"backbone": {"backbone": "resnet18"}})
    back = load_head(tmp_path / "h.safetensors")
    for name in ("weight", "bias", "mean", "scale"):
        assert np.array_equal(getattr(back, name), getattr(head, name))
        assert getattr(back, name).dtype == getattr(head, name).dtype
    assert (back.class_names, back.solver) == (NAMES, "ridge")
    assert (back.chosen, back.scores) == (head.chosen, head.scores)
    assert back.provenance == {"backbone": {"backbone": "resnet18"}}


def test_knn_head_comes_back(tmp_path):
    X, y = blobs(20)
    head = KnnHead(rows=X.astype(np.float16), labels=y, class_names=NAMES, k=3, metric="euclidean")
    save_head(tmp_path / "h.safetensors", head)
    back = load_head(tmp_path / "h.safetensors")
    assert isinstance(back, KnnHead)
    assert np.array_equal(back.predict_proba(X), head.predict_proba(X))
    assert back.rows.dtype == np.float16


def test_other_readers_of_safetensors_read_it(tmp_path):
    head = linear()
    save_head(tmp_path / "h.safetensors", head)
    with safe_open(tmp_path / "h.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("weight"), head.weight)
        assert file.metadata()["format"] == "featcache-head"


def test_linear_layers_convert_exactly_both_ways():
    for dtype in (torch.float32, torch.float64):
        layer = torch.nn.Linear(8, 3, dtype=dtype)
        head = LinearHead.from_linear(layer, NAMES)
        state = torch.get_rng_state()
        back = head.to_linear()
        assert torch.equal(torch.get_rng_state(), state)  # no random number was used up
        assert torch.equal(back.weight, layer.weight)
        assert torch.equal(back.bias, layer.bias)
        X = torch.randn(5, 8, dtype=dtype)
        assert head.decision_function(X.numpy()) == pytest.approx(
            layer(X).detach().numpy(), abs=1e-5
        )
    head = LinearHead.from_linear(torch.nn.Linear(8, 3, bias=False), NAMES)
    assert head.bias.tolist() == [0, 0, 0]
    assert head.num_params == 27


def test_head_refuses_features_of_another_width():
    with pytest.raises(UserError, match=r"features of shape \(5, 9\) do not fit.*\[N, 8\]"):
        linear().predict(np.zeros((5, 9)))


def test_head_fits_the_features_it_was_trained_on_and_no_others():
    meta = cache_meta(8)
    provenance = json.loads(meta.to_json())
    head = linear(provenance=provenance)
    check_head_fits(head, meta)
    renamed = dataclasses.replace(meta.backbone, weights="elsewhere/copy.safetensors")
    check_head_fits(head, dataclasses.replace(meta, backbone=renamed))  # same content
    prep = dataclasses.replace(meta.backbone.preprocessing, mean=(0.5, 0.5, 0.5))
    for changes, field in (
        ({"weights_sha256": "1" * 64}, "weights_sha256"),
        ({"backbone": "resnet50"}, "backbone 'resnet18'"),
        ({"feature_dim": 9}, "feature_dim 8, these have 9"),
        ({"preprocessing": prep}, "preprocessing.mean"),
    ):
        other = dataclasses.replace(meta, backbone=dataclasses.replace(meta.backbone, **changes))
        with pytest.raises(CacheError, match=field):
            check_head_fits(head, other)
    with pytest.raises(CacheError, match="does not say which features"):
        check_head_fits(linear(), meta)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a safetensors file .*give another file"),
        (b"12345678", "is not a safetensors file .*give another file"),
        (pickle.dumps({"weight": [1.0]}), "is not a safetensors file .*give another file"),
        (b"\xff" * 64, "is not a safetensors file .*give another file"),
        (
            (40).to_bytes(8, "little") + b"{" * 40,
            "safetensors file .*Expecting property name",
        ),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a table"),
        ((10).to_bytes(8, "little") + b'{"a":  1} ', "not a head file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "is not a safetensors file .*give another file"),
        (save({"weight": np.ones((3, 8), np.float32)}), "not a head file"),
        (saved_linear(format="other"), "not a head file"),
        (saved_linear(version="2"), "version '2'; this featcache reads version 1"),
        (saved_linear(tensors={"bias": None}), "damaged head file"),
        (saved_linear(tensors={"bias": np.ones(4, np.float32)}), r"weight \[C, D\] and bias"),
        (saved_linear(tensors={"bias": np.full(3, np.nan, np.float32)}), "not finite"),
        (saved_linear(tensors={"mean": np.ones(7, np.float32)}), "mean has shape"),
        (saved_linear(tensors={"extra": np.ones(7, np.float32)}), "unknown parts extra"),
        (saved_linear(tensors={"weight": np.ones((3, 8), np.int8)}), "tensor 'weight' is int8"),
        (saved_linear(tensors={"weight": np.ones((1, 3, 8))}), "'weight' is float64 .1, 3, 8"),
        (saved_linear(tensors={"weight": np.ones((0, 8))}), "'weight' is float64 .0, 8"),
        (saved_linear().replace(b"F32", b"F99"), "not a safetensors file"),
        (saved_linear().replace(b'"version":', b'"format": '), "duplicate key format"),
        (saved_linear().replace(b'"weight":', b'"bias":  '), "duplicate key bias"),
        (saved_linear(head={"class_names": ["a"]}), "1 class names for 3 outputs"),
        (saved_linear(head={"class_names": "abc"}), "is not a list of names"),
        (saved_linear(head={"provenance": 3}), "provenance is not a table"),
        (saved_linear(head={"other": 3}), "unknown parts other"),
    ],
)
def test_other_and_damaged_files_are_refused(tmp_path, data, message):
    path = tmp_path / "h.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_head(path)


def test_claims_beyond_the_file_are_refused(tmp_path):
    good = saved_linear()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["weight"]["shape"] = [1 << 40, 1 << 40]
    text = json.dumps(header).encode()
    path = tmp_path / "h.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    with pytest.raises(UserError, match="not a safetensors file"):
        load_head(path)
    path.write_bytes(good[:-4])
    with pytest.raises(UserError, match="not a safetensors file"):
        load_head(path)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": 2.5},
        {"metric": "manhattan"},
        {"labels": np.array([0, 1, 9])},
        {"labels": np.array([0, 1])},
        {"row_weights": np.ones(2)},
    ],
)
def test_impossible_neighbours_are_refused(change):
    fields = {"rows": np.ones((3, 2)), "labels": np.array([0, 1, 2]), "class_names": NAMES, "k": 1}
    with pytest.raises(UserError, match="knn"):
        KnnHead(**(fields | change))


def test_only_ordinary_files_are_read(tmp_path):
    with pytest.raises(UserError, match=r"none.safetensors: there is no such file; check the path"):
        load_head(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is not an ordinary file"),
        (Path("/dev/zero"), "it is not an ordinary file"),
    ):
        with pytest.raises(UserError, match=rf"^cannot read {path}: {reason}; check the path$"):
            load_head(path)


def test_files_and_headers_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "h.safetensors"
    path.write_bytes(saved_linear())
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", 64)
    with pytest.raises(UserError, match="its header has more than 64 bytes"):
        load_head(path)
    with path.open("wb") as file:
        file.truncate(tensor_files.MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(UserError, match="17,179,869,185 bytes, more than the 17,179,869,184 that"):
        load_head(path)


def test_reading_a_head_imports_no_torch(tmp_path):
    save_head(tmp_path / "h.safetensors", linear())
    code = (
        "import sys; from featcache.heads import load_head; load_head(sys.argv[1]);"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "h.safetensors")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"False\n"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, double or overwrite some of a file."""
    bad = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(bad) or 1))
        kind = rng.integers(0, 4)
        if kind == 0 and bad:
            bad[at % len(bad)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del bad[at : at + int(rng.integers(1, 64))]
        elif kind == 2:
            bad[at:at] = bad[at : at + int(rng.integers(1, 64))]
        else:
            bad[at : at + 8] = rng.bytes(8)
    return bytes(bad)


@pytest.mark.parametrize("num_cases", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_heads_are_refused_or_usable(tmp_path, num_cases):
    path = tmp_path / "h.safetensors"
    path.write_bytes(saved_linear())
    sound, rng, refusals = path.read_bytes(), np.random.default_rng(num_cases), []
    for _ in range(num_cases):
        path.write_bytes(mutated(sound, rng))
        try:
            head = load_head(path)
        except UserError as error:
            refusals.append(str(error))
            continue
        assert np.isfinite(head.predict_proba(np.zeros((2, 8), np.float32))).all()
    assert len(refusals) > num_cases // 4
    assert not [text for text in refusals if "\n" in text]

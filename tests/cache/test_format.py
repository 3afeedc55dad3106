"""The file is what docs/format.md says: read here with nothing but that page's rules."""

from __future__ import annotations

import hashlib
import json
import re
import zlib

import h5py
import numpy as np
import pytest

from cache_helpers import CLASSES, expected, fill, make_meta, make_splits, synthetic_cache
from conftest import REPO
from featcache.cache import open_writer
from featcache.cache.schema import RECORD_BYTES

PAGE = REPO / "docs" / "format.md"


@pytest.fixture
def path(tmp_path):
    """Two views, every column, and one skipped sample in the last block of train."""
    path = tmp_path / "x.h5"
    meta, splits = make_meta(num_views=2), make_splits(columns=True)
    with open_writer(path, meta, CLASSES, splits) as new:
        status = np.zeros(22, np.uint8)
        status[5] = 3
        new.write_block("train", range(128, 150), expected("train", range(128, 150), 2), status)
        fill(new, num_views=2)
        new.finish()
    return path


def test_plain_h5py_reads_it(path):
    """What a user with any HDF5 tool does: no featcache, no rules."""
    with h5py.File(path) as file:
        assert [name.decode() for name in file["class_names"]] == CLASSES
        train = file["train"]
        good = train["row_status"][:] == 0
        assert np.flatnonzero(~good).tolist() == [133]
        wanted = expected("train", range(150), 2)
        assert np.array_equal(train["features"][:][:, good], wanted[:, good])
        assert not train["features"][:, 133].any()
        assert train["labels"][:].tolist() == [i % 3 for i in range(150)]
        assert train["ids"][7].decode() == "train/00007.png"
        assert train["ids"].dtype == h5py.string_dtype("utf-8", 15)
        assert train["weights"][:3].tolist() == [0.0, 0.25, 0.5]
        assert train["groups"][10].decode() == "büro 1"
        assert train["groups"].dtype == h5py.string_dtype("utf-8", 8)
        assert train["content"][7].tobytes() == hashlib.sha256(b"train/00007.png").digest()
        meta = json.loads(file["meta_json"][:].tobytes())
        assert meta["backbone"]["feature_dim"] == 5


def test_hdf5_file_is_as_plain_as_hdf5_gets(path):
    with h5py.File(path) as file:
        assert file.userblock_size == 0
        assert file.id.get_create_plist().get_version()[0] == 0  # superblock
        for group in (file, file["train"], file["test"]):
            assert len(group.attrs) == 0
            assert all(type(group.get(n, getlink=True)) is h5py.HardLink for n in group)
        datasets = [v for g in (file, file["train"], file["test"]) for v in g.values()]
        for dataset in (d for d in datasets if isinstance(d, h5py.Dataset)):
            create = dataset.id.get_create_plist()
            assert create.get_layout() == h5py.h5d.CONTIGUOUS
            assert (create.get_nfilters(), create.get_external_count()) == (0, 0)
            assert dataset.id.get_offset() % 4096 == 0
            assert len(dataset.attrs) == 0
        layout = file["layout"]
        assert layout.id.get_offset() + RECORD_BYTES == path.stat().st_size


def test_rules_of_the_page_without_the_hdf5_library(path):
    """Every rule of the page's section on checking, written again from its text."""
    data = path.read_bytes()
    assert data[:8] == b"\x89HDF\r\n\x1a\n"
    record = data[-32768:]
    assert record[:16] == b"featcache-layout"
    assert int.from_bytes(record[16:20], "little") == 1
    assert hashlib.sha256(record[:-32]).digest() == record[-32:]
    length = int.from_bytes(record[20:24], "little")
    layout = json.loads(record[24 : 24 + length])
    assert not any(record[24 + length : -32])
    assert layout["file_bytes"] == len(data)
    assert (layout["format"], layout["block_rows"]) == ("featcache", 64)

    places = {}
    for entry in layout["datasets"]:
        size = np.dtype(entry["dtype"]).itemsize * int(np.prod(entry["shape"]))
        places[entry["name"]] = (entry["offset"], entry["offset"] + size)
        raw = data[entry["offset"] : entry["offset"] + size]
        if "sha256" in entry:
            assert hashlib.sha256(raw).hexdigest() == entry["sha256"]

    def outside(names):
        digest, at = hashlib.sha256(), 0
        for start, end in sorted(places[name] for name in names):
            digest.update(data[at:start])
            at = end
        digest.update(data[at:])
        return digest

    assert outside(places).hexdigest() == layout["structure_sha256"]
    but = [name for name in places if name == "digest" or name.endswith("/features")]
    start, end = places["digest"]
    assert outside(but).digest() == data[start:end]

    def array(name):
        entry = next(e for e in layout["datasets"] if e["name"] == name)
        start, end = places[name]
        return np.frombuffer(data[start:end], entry["dtype"]).reshape(entry["shape"])

    features, status = array("train/features"), array("train/row_status")
    for block, stored in enumerate(array("train/crc32")):
        rows = slice(64 * block, 64 * block + 64)
        crc = zlib.crc32(f"train/{block}".encode())
        for view in features:
            crc = zlib.crc32(view[rows].tobytes(), crc)
        assert zlib.crc32(status[rows].tobytes(), crc) == stored
        assert array("train/state")[block] == 1


def test_page_names_every_dataset_and_number(path):
    text = PAGE.read_text(encoding="utf-8")
    with h5py.File(path) as file:
        for name in [n for n in file if n not in ("train", "test")] + list(file["train"]):
            assert f"`{name}`" in text, name
    for number in ("32768", "featcache-layout", "64 rows", "2^33", "16 splits"):
        assert number in text, number


def test_example_of_the_page_runs(path, capsys):
    """The page's Python reader prints what the file holds."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code.replace("cache/NAME.h5", str(path)), str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "(149, 5) (149,) ['cat', 'dog', 'føx']\n"


def test_float16_is_half_the_size_and_exact_here(tmp_path):
    large = {"train": 2000}
    full = synthetic_cache(tmp_path / "a.h5", large, dim=64)
    half = synthetic_cache(tmp_path / "b.h5", large, dim=64, dtype="float16")
    saved = full.stat().st_size - half.stat().st_size
    assert abs(saved - 2000 * 64 * 2) <= 4096
    with h5py.File(half) as file:
        assert file["train/features"].dtype == np.float16
        assert np.array_equal(file["train/features"][0], expected("train", range(2000), 1, 64)[0])

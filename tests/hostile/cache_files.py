"""Makes files that a stranger could send as a cache. Each maker writes one file at `path`.

`forge` gives a changed cache every checksum it needs to look sound, so that what is tested is the
check of the claim itself and not of a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cache_helpers import copy_cache
from featcache.cache.layout import MAGIC, Extent, block_crc, complement
from featcache.cache.schema import DIGEST_BYTES, RECORD_BYTES, block_range

Maker = Callable[[Path], object]
Record = dict[str, Any]


def read_record(data: bytes) -> Record:
    """The JSON of a cache's layout record."""
    record = data[-RECORD_BYTES:]
    length = int.from_bytes(record[20:24], "little")
    return json.loads(record[24 : 24 + length])


def write_record(data: bytes, text: bytes, *, version: int = 1, magic: bytes = MAGIC) -> bytes:
    """The same file with another record, correctly hashed."""
    head = magic + version.to_bytes(4, "little") + len(text).to_bytes(4, "little")
    body = (head + text).ljust(RECORD_BYTES - DIGEST_BYTES, b"\0")[: RECORD_BYTES - DIGEST_BYTES]
    return data[:-RECORD_BYTES] + body + hashlib.sha256(body).digest()


def extent_of(record: Record, name: str) -> Extent:
    """One dataset's place."""
    (entry,) = (e for e in record["datasets"] if e["name"] == name)
    return Extent(entry["offset"], entry["dtype"], tuple(entry["shape"]))


def forge(path: Path, **arrays: np.ndarray) -> Path:
    """Replace datasets of a cache (same size; "__" stands for "/") and fix every checksum."""
    data = bytearray(path.read_bytes())
    record = read_record(data)
    for name, array in arrays.items():
        extent = extent_of(record, name.replace("__", "/"))
        raw = array.tobytes()
        assert len(raw) == extent.num_bytes
        data[extent.offset : extent.end] = raw
    path.write_bytes(rehash(bytes(data), record))
    return path


def rehash(data: bytes, record: Record) -> bytes:
    """Fix block checksums, fixed datasets' hashes, the structure's, the record's, the digest."""
    raw = bytearray(data)
    extents = {e["name"]: extent_of(record, e["name"]) for e in record["datasets"]}
    for name in extents:
        if name.endswith("/features"):
            _fix_crcs(raw, name.partition("/")[0], extents)
    for entry in record["datasets"]:
        if "sha256" in entry:
            extent = extents[entry["name"]]
            entry["sha256"] = hashlib.sha256(raw[extent.offset : extent.end]).hexdigest()
    record["structure_sha256"] = _sha(raw, list(extents.values())).hex()
    raw = bytearray(write_record(bytes(raw), json.dumps(record, separators=(",", ":")).encode()))
    left_out = [e for n, e in extents.items() if n == "digest" or n.endswith("/features")]
    digest = extents["digest"]
    raw[digest.offset : digest.end] = _sha(raw, left_out)
    return bytes(raw)


def _sha(data: bytearray, left_out: list[Extent]) -> bytes:
    ranges = complement(left_out, len(data))
    return hashlib.sha256(b"".join(bytes(data[a:b]) for a, b in ranges)).digest()


def _fix_crcs(raw: bytearray, split: str, extents: dict[str, Extent]) -> None:
    def array(name: str) -> np.ndarray:
        e = extents[f"{split}/{name}"]
        return np.frombuffer(bytes(raw[e.offset : e.end]), e.dtype).reshape(e.shape)

    features, status, crc = array("features"), array("row_status"), array("crc32").copy()
    for block in range(len(crc)):
        rows = block_range(block, features.shape[1])
        views = (np.ascontiguousarray(v[rows.start : rows.stop]) for v in features)
        crc[block] = block_crc(split, block, views, status[rows.start : rows.stop])
    e = extents[f"{split}/crc32"]
    raw[e.offset : e.end] = crc.tobytes()


def _claiming(change: Callable[[Record], object], *, small: bool = False) -> Maker:
    """A cache whose record is changed and correctly hashed; `small` keeps only the record."""

    def make(path: Path) -> None:
        data = copy_cache(path).read_bytes()
        record = read_record(data)
        if small:
            data = data[:64] + data[-RECORD_BYTES:]
        replacement = change(record)
        text = replacement if isinstance(replacement, bytes) else json.dumps(record).encode()
        path.write_bytes(write_record(data, text))

    return make


def _dataset(record: Record, name: str) -> Record:
    return next(e for e in record["datasets"] if e["name"] == name)


def _set(name: str, **values: object) -> Callable[[Record], object]:
    return lambda record: _dataset(record, name).update(values)


def _huge(record: Record) -> None:
    """Two terabytes of features in a file of 33 KB."""
    _dataset(record, "train/features")["shape"] = [1, 2**30, 512]
    for name, shape in (("labels", [2**30]), ("ids", [2**30]), ("row_status", [2**30])):
        _dataset(record, f"train/{name}")["shape"] = shape
    record["file_bytes"] = 64 + RECORD_BYTES


def _overlap(record: Record) -> None:
    _dataset(record, "test/labels")["offset"] = _dataset(record, "train/labels")["offset"]


def _features_over_record(record: Record) -> None:
    layout = _dataset(record, "layout")
    _dataset(record, "test/features")["offset"] = layout["offset"]


def _many_splits(record: Record) -> None:
    train = [e for e in record["datasets"] if e["name"].startswith("train/")]
    for i in range(40):
        record["datasets"] += [{**e, "name": e["name"].replace("train", f"s{i}")} for e in train]


RECORDS: dict[str, Callable[[Record], object]] = {
    "more_than_the_file": _set("train/features", shape=[1, 150, 2**19]),
    "offset_negative": _set("train/labels", offset=-8),
    "offset_huge": _set("train/labels", offset=2**63),
    "offset_over_64_bits": _set("train/labels", offset=10**400),
    "offset_float": _set("train/labels", offset=4096.0),
    "offset_true": _set("train/labels", offset=True),
    "offset_odd": lambda r: _dataset(r, "train/labels").update(
        offset=_dataset(r, "train/labels")["offset"] + 4
    ),
    "offset_in_signature": _set("train/state", offset=0),
    "shape_negative": _set("train/features", shape=[1, -150, 5]),
    "shape_of_zeros": _set("train/features", shape=[0, 150, 5]),
    "shape_of_ten": _set("train/features", shape=[1] * 10),
    "shape_text": _set("train/features", shape="150"),
    "shape_product_wraps": _set("train/features", shape=[2**32, 2**32, 1]),
    "rows_differ": _set("train/labels", shape=[149]),
    "object_dtype": _set("train/features", dtype="|O"),
    "void_dtype": _set("train/features", dtype="|V20"),
    "dtype_as_list": _set("train/features", dtype=[["a", "<f4"]]),
    "dtype_big_endian": _set("train/features", dtype=">f4"),
    "labels_as_floats": _set("train/labels", dtype="<f4"),
    "text_very_long": _set("train/ids", dtype="|S9999"),
    "sha_missing": lambda r: _dataset(r, "train/labels").pop("sha256"),
    "sha_where_none_is": _set("train/features", sha256="0" * 64),
    "sha_not_hex": _set("train/labels", sha256="z" * 64),
    "dataset_missing": lambda r: r["datasets"].remove(_dataset(r, "train/crc32")),
    "dataset_unknown": lambda r: r["datasets"].append({**_dataset(r, "digest"), "name": "extra"}),
    "dataset_twice": lambda r: r["datasets"].append(dict(_dataset(r, "digest"))),
    "no_datasets": lambda r: r["datasets"].clear(),
    "datasets_not_a_list": lambda r: r.update(datasets={"a": 1}),
    "dataset_not_a_dict": lambda r: r["datasets"].append(7),
    "name_not_text": lambda r: r["datasets"].append({**_dataset(r, "digest"), "name": [1]}),
    "split_of_strange_name": lambda r: [
        e.update(name=e["name"].replace("train", "../../etc")) for e in r["datasets"]
    ],
    "split_named_like_a_dataset": lambda r: [
        e.update(name=e["name"].replace("train/", "digest/")) for e in r["datasets"]
    ],
    "many_splits": _many_splits,
    "overlap": _overlap,
    "features_over_record": _features_over_record,
    "layout_elsewhere": _set("layout", offset=4096),
    "file_bytes_wrong": lambda r: r.update(file_bytes=12345),
    "block_rows_other": lambda r: r.update(block_rows=1),
    "format_other": lambda r: r.update(format="other"),
    "extra_field": lambda r: r.update(run="rm -rf"),
    "json_list": lambda _: b"[]",
    "json_null": lambda _: b"null",
    "json_empty": lambda _: b"",
    "json_not": lambda _: b"{not json}",
    "json_nan": lambda _: b'{"format": NaN}',
    "json_nested_deep": lambda _: b"[" * 32000,
    "json_dict_nested_deep": lambda _: b'{"a":' * 6000,
    "json_huge_number": lambda _: b'{"format": ' + b"9" * 20000 + b"}",
    "json_not_utf8": lambda _: b'{"format": "\xff\xfe"}',
    "json_surrogate": lambda _: b'{"\\ud800": 1}',
}


def _meta(change: Callable[[Record], object] | bytes) -> Maker:
    """A cache of sound checksums whose metadata is changed (padded with spaces to its size)."""

    def make(path: Path) -> None:
        data = copy_cache(path).read_bytes()
        extent = extent_of(read_record(data), "meta_json")
        if isinstance(change, bytes):
            text = change
        else:
            meta = json.loads(data[extent.offset : extent.end])
            change(meta)
            text = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
        _resize_meta(path, data, text)

    return make


def _resize_meta(path: Path, data: bytes, text: bytes) -> None:
    """Put metadata of any size up to a page in place: the page behind it is free."""
    record = read_record(data)
    entry = _dataset(record, "meta_json")
    raw = bytearray(data)
    text = text[: 4096 - 8]
    raw[entry["offset"] : entry["offset"] + len(text)] = text
    entry["shape"] = [len(text)]
    path.write_bytes(rehash(bytes(raw), record))


METAS: dict[str, Callable[[Record], object] | bytes] = {
    "meta_not_json": b"{",
    "meta_list": b"[1,2]",
    "meta_deep": b"[" * 4000,
    "meta_nan": b'{"backbone":NaN}',
    "meta_huge_number": b'{"backbone":' + b"9" * 4050 + b"}",
    "meta_not_utf8": b"\xff\xfe{}",
    "meta_extra_field": lambda m: m.update(extra=1),
    "meta_field_missing": lambda m: m.pop("views"),
    "meta_dim_lies": lambda m: m["backbone"].update(feature_dim=6),
    "meta_dim_text": lambda m: m["backbone"].update(feature_dim="5"),
    "meta_dim_true": lambda m: m["backbone"].update(feature_dim=True),
    "meta_dim_overflows": lambda m: m["backbone"].update(feature_dim=1e308),
    "meta_views_lie": lambda m: m["views"].update(num=2),
    "meta_dtype_lies": lambda m: m.update(dtype="float16"),
    "meta_dtype_list": lambda m: m.update(dtype=["float32"]),
    "meta_name_a_list": lambda m: m["backbone"].update(backbone=["resnet18"]),
    "meta_escape_codes": lambda m: m["dataset"].update(name="\x1b[2Jowned"),
    "meta_control_of_terminals": lambda m: m["dataset"].update(name="\x9b2Jowned"),
    "meta_right_to_left": lambda m: m["versions"].update({"torch\u202e": "2.6"}),
    "meta_surrogate": lambda m: m["dataset"].update(name="\ud800"),
    "meta_mean_infinite": lambda m: m["backbone"]["preprocessing"].update(mean=[1e999, 0, 0]),
    "meta_versions_nested": lambda m: m.update(versions={"torch": {"a": 1}}),
    "meta_prep_a_list": lambda m: m["backbone"].update(preprocessing=[1]),
    "meta_preprocessing_impossible": lambda m: m["backbone"]["preprocessing"].update(std=[0, 0, 0]),
}


def _hdf5(build: Callable[[Any, Path], object]) -> Maker:
    """An HDF5 file that is no cache, with something nasty inside."""

    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            build(file, path)

    return make


def _external_storage(file: Any, path: Path) -> None:
    secret = path.with_suffix(".secret")
    secret.write_bytes(b"secret" * 100)
    file.create_dataset("features", (100,), "u1", external=[(str(secret), 0, 100)])


def _soft_loop(file: Any, _: Path) -> None:
    file["train"] = h5py.SoftLink("/test")
    file["test"] = h5py.SoftLink("/train")


def _virtual(file: Any, _: Path) -> None:
    layout = h5py.VirtualLayout((10,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (10,))
    file.create_virtual_dataset("features", layout)


def _unknown_filter(file: Any, _: Path) -> None:
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_chunk((10,))
    create.set_filter(32765, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    space = h5py.h5s.create_simple((10,))
    h5py.h5d.create(file.id, b"features", h5py.h5t.NATIVE_FLOAT, space, create)


def _nested(file: Any, _: Path) -> None:
    group = file
    for _level in range(500):
        group = group.create_group("g")


HDF5S: dict[str, Callable[[Any, Path], object]] = {
    "empty_hdf5": lambda f, _: None,
    "external_storage": _external_storage,
    "external_link": lambda f, _: f.update({"train": h5py.ExternalLink("/etc/passwd", "/x")}),
    "soft_link_loop": _soft_loop,
    "hard_link_loop": lambda f, _: f.create_group("train").update({"self": f["/"]}),
    "virtual_dataset": _virtual,
    "declares_terabytes": lambda f, _: f.create_dataset(
        "features", (2**40,), "f8", chunks=(2**10,)
    ),
    "unknown_filter": _unknown_filter,
    "bomb_of_zeros": lambda f, _: f.create_dataset(
        "features", data=np.zeros(4_000_000, "u1"), compression="gzip"
    ),
    "variable_length": lambda f, _: f.create_dataset("ids", data=["a", "bb"]),
    "references": lambda f, _: f.create_dataset("r", (1,), h5py.ref_dtype),
    "large_attribute": lambda f, _: f.attrs.create("meta", np.zeros(60_000, "u1")),
    "nested_groups": _nested,
}


def _plain(data: bytes) -> Maker:
    return lambda path: path.write_bytes(data)


def _garbage_header(path: Path) -> None:
    """A record and hashes without fault, before them an HDF5 header that is noise."""
    data = bytearray(copy_cache(path).read_bytes())
    record = read_record(bytes(data))
    first = min(e["offset"] for e in record["datasets"])
    data[8:first] = np.random.default_rng(0).integers(0, 256, first - 8, np.uint8).tobytes()
    path.write_bytes(rehash(bytes(data), record))


def _redirected_header(path: Path) -> None:
    """Record and hashes without fault; the HDF5 header says the features are elsewhere."""
    data = bytearray(copy_cache(path).read_bytes())
    record = read_record(bytes(data))
    offset = extent_of(record, "train/features").offset.to_bytes(8, "little")
    at = bytes(data).find(offset)
    assert 0 < at < len(data) - RECORD_BYTES
    data[at : at + 8] = extent_of(record, "test/features").offset.to_bytes(8, "little")
    path.write_bytes(rehash(bytes(data), record))


def _label_out_of_range(value: int) -> Maker:
    def make(path: Path) -> None:
        labels = np.zeros(150, "<i8")
        labels[7] = value
        forge(copy_cache(path), train__labels=labels)

    return make


def _ids(value: bytes) -> Maker:
    def make(path: Path) -> None:
        data = copy_cache(path).read_bytes()
        extent = extent_of(read_record(data), "train/ids")
        forge(path, train__ids=np.full(extent.shape, value, extent.dtype))

    return make


def _sparse_terabyte(path: Path) -> None:
    """A file that takes no room and claims 1 TiB, most of it outside every dataset."""
    data = copy_cache(path).read_bytes()
    record = read_record(data)
    size = 2**40
    record["file_bytes"] = size
    _dataset(record, "layout")["offset"] = size - RECORD_BYTES
    tail = write_record(data, json.dumps(record).encode())[-RECORD_BYTES:]
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size - RECORD_BYTES)
        file.write(tail)


# Refused by every way of reading.
REFUSED: dict[str, Maker] = {
    "empty": _plain(b""),
    "one_byte": _plain(b"\x89"),
    "signature_only": _plain(b"\x89HDF\r\n\x1a\n"),
    "text": _plain(b"path,label\n" * 5000),
    "zeros": _plain(bytes(100_000)),
    "pickle": _plain(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR." * 2000),
    "magic_only": _plain(MAGIC),
    "other_version": lambda p: p.write_bytes(
        write_record(copy_cache(p).read_bytes(), b"{}", version=2)
    ),
    "length_beyond_record": lambda p: p.write_bytes(
        write_record(copy_cache(p).read_bytes(), b"{" * 40_000)
    ),
    "two_terabytes_in_33_kb": _claiming(_huge, small=True),
    "sparse_terabyte": _sparse_terabyte,
    "label_negative": _label_out_of_range(-1),
    "label_too_large": _label_out_of_range(3),
    "label_minimum": _label_out_of_range(-(2**63)),
    "a_folder": lambda p: p.mkdir(),
    "a_pipe": lambda p: os.mkfifo(p),
    "a_device": lambda p: p.symlink_to("/dev/zero"),
    "a_link_to_itself": lambda p: p.symlink_to(p),
    "a_link_to_nothing": lambda p: p.symlink_to(p.with_suffix(".gone")),
    **{f"record_{name}": _claiming(change) for name, change in RECORDS.items()},
    **{name: _meta(change) for name, change in METAS.items()},
    **{f"hdf5_{name}": _hdf5(build) for name, build in HDF5S.items()},
}

# Sound for featcache, which never asks the HDF5 library; `verify` says what is wrong.
NAMED_BY_VERIFY: dict[str, Maker] = {
    "garbage_header": _garbage_header,
    "redirected_header": _redirected_header,
    "not_finite": lambda p: forge(
        copy_cache(p), train__features=np.full((1, 150, 5), np.nan, "<f4")
    ),
    "same_ids": _ids(b"same"),
    "ids_not_utf8": _ids(b"\xff\xfe"),
}

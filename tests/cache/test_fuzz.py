"""Random damage to cache files: found, or harmless; never a crash, a hang or a wrong row."""

from __future__ import annotations

import collections
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from cache_helpers import copy_cache
from featcache.cache import FeatureCache, verify
from featcache.cache.layout import complement
from featcache.errors import CacheError, FeatcacheError
from hostile.cache_files import extent_of, read_record, rehash, write_record

SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


def contents(path: Path) -> tuple[object, ...]:
    """Everything a user can get out of a cache."""
    cache = FeatureCache(path)
    splits = [
        (name, split.ids, split.y.tobytes(), split.views.tobytes(), split.content.tobytes())
        for name, split in ((name, cache.split(name)) for name in cache.splits)
    ]
    return (cache.meta, cache.class_names, cache.skipped, *splits)


def places(data: bytes) -> list[tuple[int, int]]:
    """Ranges to aim at: every dataset, and the bytes before the first."""
    record = read_record(data)
    found = [
        (e["offset"], int(np.prod(e["shape"])) * np.dtype(e["dtype"]).itemsize)
        for e in record["datasets"]
    ]
    return [(0, 2048), *((at, at + size) for at, size in found)]


def flip_bits(data: bytearray, r: random.Random) -> None:
    start, end = r.choice(places(bytes(data)))
    for _ in range(r.choice((1, 1, 1, 2, 20))):
        data[r.randrange(start, end)] ^= 1 << r.randrange(8)


def flip_anywhere(data: bytearray, r: random.Random) -> None:
    data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def noise(data: bytearray, r: random.Random) -> None:
    start, end = r.choice(places(bytes(data)))
    at = r.randrange(start, end)
    size = r.randrange(1, 64)
    data[at : min(at + size, len(data))] = r.randbytes(min(size, len(data) - at))


def truncate(data: bytearray, r: random.Random) -> None:
    del data[r.randrange(len(data)) :]


def append(data: bytearray, r: random.Random) -> None:
    data += r.choice((r.randbytes(r.randrange(1, 5000)), bytes(4096), bytes(data)))


def zero_tail(data: bytearray, r: random.Random) -> None:
    at = r.randrange(len(data))
    data[at:] = bytes(len(data) - at)


def zero_page(data: bytearray, r: random.Random) -> None:
    at = r.randrange(0, len(data), 4096)
    data[at : at + 4096] = bytes(4096)


def swap_pages(data: bytearray, r: random.Random) -> None:
    one, two = (r.randrange(0, len(data), 4096) for _ in range(2))
    data[one : one + 4096], data[two : two + 4096] = (
        data[two : two + 4096],
        data[one : one + 4096],
    )


def move_bytes(data: bytearray, r: random.Random) -> None:
    """Copy one dataset's bytes over another's: duplicated and swapped blocks among them."""
    (a, b), (c, d) = (r.choice(places(bytes(data))) for _ in range(2))
    size = r.randrange(1, min(b - a, d - c) + 1)
    data[c : c + size] = data[a : a + size]


def swap_blocks(data: bytearray, r: random.Random) -> None:
    """Two whole blocks of features change places."""
    (entry,) = (e for e in read_record(bytes(data))["datasets"] if e["name"] == "train/features")
    at, size = entry["offset"], 64 * entry["shape"][2] * 4
    data[at : at + 2 * size] = data[at + size : at + 2 * size] + data[at : at + size]


def remove_bytes(data: bytearray, r: random.Random) -> None:
    at = r.randrange(len(data))
    del data[at : at + r.randrange(1, 5000)]


def redigest(data: bytes, text: bytes) -> bytes:
    """Another record, and the digest of a file with that record."""
    places = {
        e["name"]: extent_of(read_record(data), e["name"]) for e in read_record(data)["datasets"]
    }
    changed = bytearray(write_record(data, text))
    left_out = [e for n, e in places.items() if n == "digest" or n.endswith("/features")]
    digest = hashlib.sha256()
    for start, end in complement(left_out, len(changed)):
        digest.update(changed[start:end])
    changed[places["digest"].offset : places["digest"].end] = digest.digest()
    return bytes(changed)


def claim(data: bytearray, r: random.Random) -> None:
    """A correctly hashed record with one value changed."""
    record = read_record(bytes(data))
    entry = r.choice(record["datasets"])
    values = [0, -1, 1, 7, 8, 64, 4096, 2**31, 2**63, 10**30, 0.5, None, "", "x", [], {}, True]
    target = r.choice([record, entry, entry, entry])
    key = r.choice(list(target))
    if key == "shape" and r.random() < 0.7:
        entry["shape"][r.randrange(len(entry["shape"]))] = r.choice(values)
    else:
        target[key] = r.choice([*values, r.choice(record["datasets"]).get(key, 5)])
    data[:] = redigest(bytes(data), json.dumps(record).encode())


def garble_record(data: bytearray, r: random.Random) -> None:
    """A correctly hashed record with noise in its JSON."""
    text = bytearray(json.dumps(read_record(bytes(data))).encode())
    for _ in range(r.randrange(1, 4)):
        text[r.randrange(len(text))] = r.choice(b'0123456789[]{}",:-.eEnulx\xff\\')
    data[:] = redigest(bytes(data), bytes(text))


HONEST = (
    flip_bits, flip_anywhere, noise, truncate, append, zero_tail, zero_page, swap_pages,
    move_bytes, swap_blocks, remove_bytes,
)  # fmt: skip


def forge_bytes(data: bytearray, r: random.Random) -> None:
    """Noise in a fixed dataset, then every checksum made right: only the claims can be refused."""
    record = read_record(bytes(data))
    names = ("meta_json", "class_names", "train/labels", "train/ids", "train/row_status")
    name = r.choice(names[:1] * 4 + names)
    entry = next(e for e in record["datasets"] if e["name"] == name)
    size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
    for _ in range(r.choice((1, 2, 5))):
        data[entry["offset"] + r.randrange(size)] = r.randrange(256)
    data[:] = rehash(bytes(data), record)


FORGED = (claim, garble_record, forge_bytes)


def use(path: Path) -> tuple[str, tuple[object, ...] | None]:
    """Open, read and verify: what a cache file can meet. Anything but our errors propagates."""
    report = verify(path, cross_check=False)
    json.dumps(report.to_dict())
    try:
        there = contents(path)
    except CacheError as error:
        (_line,) = str(error).encode().splitlines()
        return "refused", None
    return ("sound" if report.ok else "reported"), there


def fuzz(mutations, num_cases: int, path: Path, seed: int) -> collections.Counter[str]:
    data = copy_cache(path).read_bytes()
    wanted = contents(path)
    counts: collections.Counter[str] = collections.Counter()
    for case in range(num_cases):
        r = random.Random(f"{seed}/{case}")
        broken, mutate = bytearray(data), r.choice(mutations)
        mutate(broken, r)
        if bytes(broken) == data:
            counts["unchanged"] += 1
            continue
        path.write_bytes(broken)
        outcome, there = use(path)
        counts[outcome] += 1
        if mutations is HONEST:
            # Whatever was not refused is whole: the HDF5 library's bytes are part of the digest.
            assert there is None or there == wanted, f"case {case}: {mutate.__name__}: wrong rows"
            assert outcome != "sound", f"case {case}: {mutate.__name__} was not noticed"
    return counts


@pytest.mark.parametrize("num_cases", [600, pytest.param(12_000, marks=SLOW)])
def test_damage_is_found_or_harmless(num_cases, tmp_path):
    counts = fuzz(HONEST, num_cases, tmp_path / "x.h5", seed=1)
    print(f"damaged cache files: {dict(counts)}")
    assert counts["refused"] > 0.8 * num_cases


@pytest.mark.parametrize("num_cases", [100, pytest.param(4000, marks=SLOW)])
def test_forged_files_are_refused_or_read_without_a_traceback(num_cases, tmp_path):
    counts = fuzz(FORGED, num_cases, tmp_path / "x.h5", seed=2)
    print(f"forged cache files: {dict(counts)}")
    assert sum(counts.values()) == num_cases


def cut_everywhere(path: Path, step: int) -> int:
    data = copy_cache(path).read_bytes()
    sizes = [*range(0, len(data), step), *range(len(data) - 40, len(data))]
    for size in sizes:
        path.write_bytes(data[:size])
        with pytest.raises(FeatcacheError):
            FeatureCache(path)
        assert not verify(path, cross_check=False).ok
    return len(sizes)


def test_cut_at_many_places(tmp_path):
    assert cut_everywhere(tmp_path / "x.h5", 997) > 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_byte_that_is_no_padding_matters(tmp_path):
    """One flipped bit in every byte of every dataset and of the HDF5 metadata, one at a time."""
    path = copy_cache(tmp_path / "x.h5")
    data = path.read_bytes()
    wanted = [i for i in range(0, len(data)) if data[i] or i % 64 == 0]
    for at in wanted:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
            file.flush()
            with pytest.raises(CacheError):
                FeatureCache(path).check()
            file.seek(at)
            file.write(data[at : at + 1])
    print(f"single flipped bits, all found: {len(wanted)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_other_hdf5_tools_see_after_damage(tmp_path):
    """The HDF5 library, in its bounded process, on damaged metadata: always an answer."""
    path = tmp_path / "x.h5"
    data = copy_cache(path).read_bytes()
    r = random.Random(5)
    for _ in range(60):
        broken = bytearray(data)
        for _flip in range(r.choice((1, 3, 30))):
            broken[r.randrange(8, 6000)] ^= 1 << r.randrange(8)
        path.write_bytes(broken)
        report = verify(path)
        assert not report.ok
        assert all("\n" not in problem for problem in report.problems)

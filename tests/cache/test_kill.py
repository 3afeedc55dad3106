"""A writer killed at any moment loses nothing that it had written, and lies about nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache_helpers import CLASSES, fill, make_meta, make_splits, synthetic_cache
from conftest import TESTS
from featcache.cache import fileio, open_writer, part_path, verify, writer
from featcache.cache.storage import CacheFile

HERE = TESTS
PAGE = 4096
SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


def kill(kind: str, num_kills: int, folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(HERE / "cache_kills.py"), kind, str(num_kills), "7", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(f"{kind}: {counts}")
    return counts


@pytest.mark.parametrize(
    ("kind", "num_kills"),
    [
        ("extract", 30),
        ("update", 15),
        ("repair", 15),
        pytest.param("extract", 200, marks=SLOW),
        pytest.param("update", 100, marks=SLOW),
        pytest.param("repair", 100, marks=SLOW),
    ],
)
def test_killed_at_random_moments(kind, num_kills, tmp_path):
    counts = kill(kind, num_kills, tmp_path)
    assert counts["kills"] >= num_kills
    assert counts["parts_seen"] > num_kills // 10
    assert counts["finished"] >= 1
    assert counts["lost_blocks"] == counts["wrong_files"] == 0


class Disk:
    """Remembers every write and sync of a writer, to make the files a power cut could leave.

    After a power cut a disk holds what was synced, and any pages of what was written since.
    """

    def __init__(self, monkeypatch) -> None:
        self.writes: list[tuple[int, bytes] | None] = []  # None is a sync
        monkeypatch.setattr(writer, "write_at", self.write_at)
        monkeypatch.setattr(writer, "sync", self.sync)

    def write_at(self, fd, data, offset) -> None:
        self.writes.append((offset, memoryview(data).cast("B").tobytes()))
        fileio.write_at(fd, data, offset)

    def sync(self, fd) -> None:
        self.writes.append(None)
        fileio.sync(fd)

    def image(self, fresh: bytes, moment: int, choose: random.Random) -> tuple[bytes, bytes]:
        """The file after a cut before write number `moment`, and what was surely synced."""
        done = self.writes[:moment]
        last_sync = max((i for i, write in enumerate(done) if write is None), default=0)
        data = bytearray(fresh)
        for write in done[:last_sync]:
            if write is not None:
                data[write[0] : write[0] + len(write[1])] = write[1]
        synced = bytes(data)
        after = bytearray(data)
        for write in done[last_sync:]:
            if write is not None:
                after[write[0] : write[0] + len(write[1])] = write[1]
        for page in range(0, len(data), PAGE):
            if after[page : page + PAGE] != data[page : page + PAGE] and choose.random() < 0.5:
                data[page : page + PAGE] = after[page : page + PAGE]
        return bytes(data), synced


def done_blocks(path: Path) -> dict[str, np.ndarray]:
    file = CacheFile(path)
    return {split: file.good_blocks(split) for split in file.layout.splits}


@pytest.mark.parametrize("num_cuts", [40, pytest.param(1000, marks=SLOW)])
def test_power_cut_at_random_moments(num_cuts, tmp_path, monkeypatch):
    """Simulated: pages written since the last sync reach the disk or not, at random."""
    rows, dim = {"train": 1500, "test": 300}, 24
    path, whole = tmp_path / "x.h5", synthetic_cache(tmp_path / "w.h5", rows, dim=dim).read_bytes()
    meta = make_meta(dim=dim)
    choose = random.Random(3)
    with monkeypatch.context() as watching:
        open_writer(path, meta, CLASSES, make_splits(rows)).close()
        fresh = part_path(path).read_bytes()
        disk = Disk(watching)
        with open_writer(path, meta, CLASSES, make_splits(rows)) as new:
            fill(new, dim=dim)
    torn = redone = 0
    for _ in range(num_cuts):
        image, synced = disk.image(fresh, choose.randrange(len(disk.writes)), choose)
        part_path(path).write_bytes(synced)
        sure = done_blocks(part_path(path))
        part_path(path).write_bytes(image)
        torn += bool(verify(part_path(path), cross_check=False).damaged)
        found = done_blocks(part_path(path))
        assert all((found[split] | ~sure[split]).all() for split in sure), "synced rows are kept"
        with open_writer(path, meta, CLASSES, make_splits(rows)) as again:
            redone += fill(again, dim=dim)
            again.finish()
        assert path.read_bytes() == whole
        path.unlink()
    print(f"power cuts: {num_cuts}, with torn blocks that the checksum found: {torn}")
    assert torn
    assert redone

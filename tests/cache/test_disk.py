"""Disks that fill up, fail or vanish: one line is said, and the run resumes afterwards."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest

from cache_helpers import (
    assert_train,
    begin,
    fill,
    make_splits,
    sound_bytes,
    synthetic_cache,
)
from conftest import TESTS
from featcache.cache import create, fileio, part_path, verify, writer
from featcache.errors import CacheError, StorageError, UserError


def fail_with(code: int):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


CODES = [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EDQUOT, errno.EIO]


@pytest.mark.parametrize("code", [*CODES, errno.ESTALE])
@pytest.mark.parametrize("call", ["reserve", "write_at", "sync", "sync_folder"])
def test_every_failing_call_is_one_line_and_the_run_resumes_after(path, code, call, monkeypatch):
    whole = sound_bytes()
    with monkeypatch.context() as broken:
        for module in (create, writer):
            broken.setattr(module, call, fail_with(code), raising=False)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:  # noqa: PT012
            with begin(path) as new:
                fill(new)
                new.finish()
        assert "\n" not in str(caught.value)
    path.unlink(missing_ok=True)  # a folder that cannot be synced comes after the rename
    with begin(path) as again:
        fill(again)
        again.finish()
    assert path.read_bytes() == whole
    assert {p.name for p in path.parent.glob("x.*")} == {"x.h5", "x.h5.lock"}


def test_write_that_fails_midway_leaves_a_valid_file(path, monkeypatch):
    count = 0

    def fail_at_40(fd, data, offset):
        nonlocal count
        count += 1
        if count == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fileio.write_at(fd, data, offset)

    monkeypatch.setattr(writer, "write_at", fail_at_40)
    with pytest.raises(StorageError, match=r"No space left.*run the same command again"):
        with begin(path, splits=make_splits({"train": 1000})) as new:
            fill(new)
    report = verify(part_path(path))
    assert 0 < report.num_blocks_done < report.num_blocks
    assert report.damaged == {}
    with begin(path, splits=make_splits({"train": 1000})) as again:
        assert again.num_resumed["train"] == report.num_blocks_done * 64
        fill(again)
        again.finish()
    assert_train(path, 1000)


def test_short_writes_are_continued(path, monkeypatch):
    whole = sound_bytes()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
    assert synthetic_cache(path).read_bytes() == whole


def test_disk_that_cannot_reserve_still_works(path, monkeypatch):
    whole = sound_bytes()
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.EOPNOTSUPP))
    assert synthetic_cache(path).read_bytes() == whole
    monkeypatch.delattr(os, "posix_fallocate")
    assert synthetic_cache(path.with_name("y.h5")).read_bytes() == whole


def test_no_room_is_said_before_anything_is_written(path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(create.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"it needs \d+ bytes, 1000 are free.*--dtype float16"):
        begin(path)
    assert {p.name for p in path.parent.iterdir()} == {"x.h5.lock"}


def test_leftover_of_a_kill_during_creation_is_replaced(path):
    left = path.with_name(".x.h5.part.0123456789abcdef.tmp")
    left.mkdir()
    (left / "x.h5.part").write_bytes(b"half a skeleton")
    begin(path).close()
    assert {p.name for p in path.parent.iterdir()} == {"x.h5.lock", "x.h5.part"}


def test_long_runs_sync_by_time_too(path, monkeypatch):
    synced = []
    monkeypatch.setattr(writer, "sync", lambda fd: synced.append(fd))
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(clock))
    with begin(path) as new:
        fill(new)
        assert len(synced) == 5


def test_file_size_limit_is_one_line(path):
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from cache_helpers import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: open_writer(Path(sys.argv[1]), make_meta(), CLASSES, make_splits())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=True,
    )
    assert re.fullmatch(r"StorageError cannot write .*: File too large; .*\n", done.stdout)
    assert not part_path(path).exists()
    begin(path).close()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("this process may not mount a tmpfs; failing calls are tested above")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def test_full_disk_is_found_in_advance_then_the_run_resumes(small_disk, monkeypatch):
    path, ballast = small_disk / "x.h5", small_disk / "ballast"
    ballast.write_bytes(bytes(2**21 - 2**16))
    with pytest.raises(UserError, match="no room for"):
        begin(path)
    usage = type("Usage", (), {"free": 2**40})
    with monkeypatch.context() as lying:
        lying.setattr(create.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError, match="No space left on device"):
            begin(path)
    assert {p.name for p in small_disk.iterdir()} == {"ballast", "x.h5.lock"}
    ballast.unlink()
    synthetic_cache(path)
    assert verify(path).ok


def test_disk_that_fills_midway_keeps_what_was_written(small_disk, monkeypatch):
    path, ballast = small_disk / "x.h5", small_disk / "ballast"
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(create, "_check_room", lambda *_: None)
    with begin(path, splits=make_splits({"train": 2000})) as new:
        fill(new, stop_after=10)
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(2**21))
        with pytest.raises(StorageError, match="No space left on device"):
            fill(new)
    assert verify(part_path(path)).damaged == {}
    ballast.unlink()
    with begin(path, splits=make_splits({"train": 2000})) as again:
        assert again.num_resumed["train"] >= 640
        fill(again)
        again.finish()
    assert_train(path, 2000)


def test_read_only_disk_is_one_line(small_disk):
    synthetic_cache(small_disk / "x.h5")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        begin(small_disk / "y.h5")
    assert verify(small_disk / "x.h5").ok


def test_vanished_mount_is_one_line(small_disk):
    path = small_disk / "x.h5"
    with begin(path) as new:
        fill(new)
        subprocess.run(["umount", "-l", str(small_disk)], check=True)
        with pytest.raises((StorageError, CacheError), match=r"x\.h5"):
            new.finish()
    assert not path.exists()

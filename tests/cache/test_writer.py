"""Writing, going on, refusing, keeping rows, repairing."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cache_helpers import (
    CLASSES,
    copy_cache,
    expected,
    fill,
    make_meta,
    make_split,
    make_splits,
    sound_bytes,
    synthetic_cache,
)
from conftest import TESTS
from featcache.cache import (
    FeatureCache,
    SplitRows,
    create,
    fileio,
    open_writer,
    part_path,
    prepare_repair,
    verify,
    writer,
)
from featcache.errors import CacheError, StorageError, UserError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "x.h5"


def begin(path, *, meta=None, classes=CLASSES, splits=None, **options):
    return open_writer(path, meta or make_meta(), classes, splits or make_splits(), **options)


def leave_unfinished(path, blocks=2, **options):
    with begin(path, **options) as half:
        fill(half, stop_after=blocks)
    return part_path(path)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def features_offset(path: Path, split="train", row=0) -> int:
    cache = FeatureCache(path)
    return cache.file.layout.extents[f"{split}/features"].offset + row * cache.split(split).dim * 4


def test_pending_blocks_are_all_rows_once_in_order(path):
    with begin(path) as new:
        assert new.pending("train") == [range(64), range(64, 128), range(128, 150)]
        assert new.pending("test") == [range(64), range(64, 70)]
        assert new.num_resumed == new.num_reused == {"train": 0, "test": 0}


def test_two_undisturbed_runs_make_the_same_bytes(tmp_path):
    one, two = (synthetic_cache(tmp_path / name, num_views=2) for name in ("a.h5", "b.h5"))
    assert one.read_bytes() == two.read_bytes()


def test_resumed_run_makes_the_same_bytes(path, tmp_path):
    leave_unfinished(path, blocks=4)
    with begin(path) as again:
        assert again.num_resumed == {"train": 150, "test": 64}
        assert again.pending("test") == [range(64, 70)]
        fill(again)
        assert again.finish() == path
    assert path.read_bytes() == sound_bytes()
    assert not part_path(path).exists()


def test_blocks_may_be_written_in_any_order(path, tmp_path):
    with begin(path) as new:
        for split in ("test", "train"):
            for rows in reversed(new.pending(split)):
                values = expected(split, rows)
                new.write_block(split, rows, values, np.zeros(len(rows), np.uint8))
        new.finish()
    assert path.read_bytes() == sound_bytes()


def test_an_error_in_the_caller_keeps_what_was_written(path):
    with pytest.raises(KeyboardInterrupt), begin(path) as new:  # noqa: PT012
        fill(new, stop_after=1)
        raise KeyboardInterrupt
    with begin(path) as again:
        assert again.num_resumed == {"train": 64, "test": 0}


def test_block_damaged_in_the_unfinished_file_is_computed_again(path, tmp_path):
    part = leave_unfinished(path, blocks=3)
    whole = copy_cache(tmp_path / "whole.h5")
    flip(part, features_offset(whole, row=70))
    report = verify(part)
    assert report.damaged == {"train": [range(64, 128)]}
    assert "unfinished: 3 of 5 blocks" in report.problems[-1]
    with begin(path) as again:
        assert again.pending("train") == [range(64, 128)]
        fill(again)
        again.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_finish_refuses_while_blocks_are_missing(path):
    with begin(path) as new:
        with pytest.raises(AssertionError, match="blocks are missing"):
            new.finish()


def test_finish_finds_what_the_disk_did_not_keep(path):
    with begin(path) as new:
        fill(new)
        extent = new.layout.extents["train/features"]
        flip(part_path(path), extent.offset)
        with pytest.raises(StorageError, match=r"does not hold what was written.*rows 0 to 63"):
            new.finish()
    assert not path.exists()
    with begin(path) as again:
        assert again.pending("train") == [range(64)]
        fill(again)
        again.finish()


def assert_train(path: Path, num_rows: int) -> None:
    wanted = expected("train", range(num_rows))[0]
    assert np.array_equal(FeatureCache(path).split("train").X, wanted)


def changed(splits: list[SplitRows], **changes) -> list[SplitRows]:
    return [dataclasses.replace(splits[0], **changes), *splits[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": make_meta(weights="imagenet")}, "backbone.weights: cached 'random', requested"),
        ({"meta": make_meta(fingerprint="ef" * 32)}, "dataset.fingerprint: cached 'cdcd"),
        ({"meta": make_meta(dtype="float16")}, "dtype: cached 'float32', requested 'float16'"),
        ({"classes": ["cat", "dog", "fox"]}, "different class_names;"),
        ({"splits": changed(make_splits(), labels=np.zeros(150, int))}, "different train/labels;"),
        ({"splits": changed(make_splits(), ids=[f"{i}" for i in range(150)])}, "train/ids;"),
        ({"splits": changed(make_splits(), content=np.zeros((150, 32), "u1"))}, "train/content;"),
        ({"splits": make_splits(weights=True)}, "different test/weights, train/weights;"),
        ({"splits": make_splits({"train": 151, "test": 70})}, "train/crc32|train/content"),
        ({"splits": make_splits({"train": 150})}, "test/features"),
    ],
)
def test_unfinished_file_of_something_else_is_refused_by_field(path, change, said):
    part = leave_unfinished(path)
    before = part.read_bytes()
    with pytest.raises(CacheError, match=said) as caught:
        begin(path, **change)
    assert "--force" in str(caught.value)
    assert part.read_bytes() == before
    with begin(path, **change, force=True) as fresh:
        assert sum(fresh.num_resumed.values()) == 0


def test_damaged_unfinished_file_is_refused_not_believed(path):
    part = leave_unfinished(path)
    flip(part, 100)
    with pytest.raises(CacheError, match="damaged in HDF5 structure: give --force"):
        begin(path)


def test_foreign_file_in_the_way_is_not_removed(path):
    part_path(path).write_text("my notes")
    with pytest.raises(CacheError, match="not a featcache file"):
        begin(path)
    assert part_path(path).read_text() == "my notes"


def test_finished_cache_is_replaced_only_by_force_and_only_at_the_end(path):
    before = copy_cache(path).read_bytes()
    reader = FeatureCache(path)
    with pytest.raises(CacheError, match="exists: give --force"):
        begin(path)
    with begin(path, meta=make_meta(weights="imagenet"), force=True) as new:
        fill(new)
        assert path.read_bytes() == before
        new.finish()
    assert FeatureCache(path).meta.backbone.weights == "imagenet"
    # Who had it open still reads the old one.
    assert np.array_equal(reader.split("train").X, expected("train", range(150))[0])
    assert reader.meta.backbone.weights == "random"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_feature_that_is_not_finite_names_the_image(path, value):
    with begin(path) as new:
        values = expected("train", range(64))
        values[0, 9, 2] = value
        with pytest.raises(UserError, match=r"'train/00009\.png' \(train\) are not finite"):
            new.write_block("train", range(64), values, np.zeros(64, np.uint8))
        assert new.pending("train")[0] == range(64)


def test_feature_too_large_for_float16_names_the_image_and_the_flag(path):
    with begin(path, meta=make_meta(dtype="float16")) as new:
        values = expected("train", range(64))
        values[0, 9, 2] = 65520.0
        with pytest.raises(UserError, match=r"'train/00009\.png'.*give --dtype float32"):
            new.write_block("train", range(64), values, np.zeros(64, np.uint8))


def test_skipped_rows_are_zeros_whatever_was_computed(path):
    with begin(path, splits=make_splits({"train": 64})) as new:
        values, status = expected("train", range(64)), np.zeros(64, np.uint8)
        values[0, 3], status[3] = np.nan, 2
        new.write_block("train", range(64), values, status)
        new.finish()
    assert FeatureCache(path).skipped == [("train", "train/00003.png", 2)]
    assert verify(path).ok


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.full(150, 3)}, "label 3 of 'train/00000.png'"),
        ({"labels": np.full(150, -1)}, "label -1 of"),
        ({"ids": ["same"] * 150}, "'same' is a duplicate"),
        ({"ids": ["", *make_splits()[0].ids[1:]]}, "id in train '' cannot be stored"),
        ({"ids": ["a\0b", *make_splits()[0].ids[1:]]}, "without NUL"),
        ({"ids": ["x" * 4097, *make_splits()[0].ids[1:]]}, "1 to 4096 bytes"),
        ({"ids": ["caf\udce9.png", *make_splits()[0].ids[1:]]}, "not valid Unicode: rename"),
        ({"weights": np.full(150, -1.0)}, "weight -1.0 of 'train/00000.png'"),
        ({"weights": np.full(150, np.nan)}, "give finite numbers"),
        ({"name": "../x"}, r"split name '\.\./x'"),
        ({"name": "layout"}, "split name 'layout'"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused_before_anything_is_written(path, change, said):
    with pytest.raises(UserError, match=said):
        begin(path, splits=changed(make_splits(), **change))
    assert list(path.parent.iterdir()) == []


def test_empty_split_and_no_classes_are_refused(path):
    empty = SplitRows("test", [], np.zeros(0, int), np.zeros((0, 32), np.uint8))
    with pytest.raises(UserError, match="split test has no samples"):
        begin(path, splits=[make_split("train", 3), empty])
    with pytest.raises(UserError, match="1 to 16 splits"):
        begin(path, classes=[])
    with pytest.raises(UserError, match="1 to 16 splits"):
        begin(path, splits=[make_split(f"s{i}", 1) for i in range(17)])


def test_sixteen_splits_of_long_names_fit(path):
    names = [f"s{i:02d}".ljust(32, "x") for i in range(16)]
    rows = dict.fromkeys(names, 3)
    with begin(path, splits=make_splits(rows, weights=True)) as new:
        fill(new)
        new.finish()
    assert FeatureCache(path).splits == rows
    assert verify(path).ok


# --- two at once


def test_second_writer_is_told_who_writes(path):
    with begin(path), pytest.raises(StorageError) as caught:
        begin(path)
    assert re.search(rf"being written by process {os.getpid()} on \S+ since 2", str(caught.value))
    begin(path).close()  # free again


def test_writer_dropped_without_close_lets_go(path):
    begin(path)
    gc.collect()
    begin(path).close()


def run_holder(path: Path) -> subprocess.Popen[str]:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from cache_helpers import *\n"
        "w = open_writer(Path(sys.argv[1]), make_meta(), CLASSES, make_splits())\n"
        "fill(w, stop_after=2); print('held', flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_another_process_is_named_and_its_death_frees_the_cache(path):
    with run_holder(path) as holder:
        with pytest.raises(StorageError, match=f"process {holder.pid} on"):
            begin(path)
        with pytest.raises(StorageError, match=f"process {holder.pid} on"):
            begin(path, force=True)
        holder.send_signal(signal.SIGKILL)
    with begin(path) as again:
        assert again.num_resumed == {"train": 128, "test": 0}


def test_readers_of_a_finished_cache_are_not_blocked(path):
    copy_cache(path)
    with begin(path, force=True):
        FeatureCache(path).check()
        assert verify(path).ok


def test_forked_child_that_outlives_its_parent_does_not_keep_the_lock(path):
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from cache_helpers import *\n"
        "w = open_writer(Path(sys.argv[1]), make_meta(), CLASSES, make_splits())\n"
        "pid = os.fork()\n"
        "if not pid: time.sleep(60)\n"
        "print(pid, flush=True); os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        orphan = int(parent.stdout.readline())
        parent.wait()
        try:
            begin(path).close()
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_garbage_in_the_lock_file_does_not_block(path):
    path.with_name("x.h5.lock").write_bytes(b"\xff{" * 100)
    begin(path).close()


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_lock_file_that_is_none_is_refused(path, tmp_path, kind):
    victim, lock = tmp_path / "victim", path.with_name("x.h5.lock")
    victim.write_text("mine")
    lock.symlink_to(victim) if kind == "link" else os.mkfifo(lock)
    with pytest.raises(StorageError, match=r"x\.h5\.lock is not an ordinary file: remove it"):
        begin(path)
    assert victim.read_text() == "mine"


def test_another_file_under_the_locks_name_keeps_its_bytes(path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.with_name("x.h5.lock").hardlink_to(victim)
    begin(path).close()
    assert victim.read_text() == "mine"


def test_a_file_system_without_locks_is_named_and_can_be_used(path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("featcache.cache.lock.fcntl.lockf", refuse)
    with pytest.raises(StorageError, match=r"no locks.*and set FEATCACHE_NO_LOCK=1$") as caught:
        begin(path)
    assert "room" not in str(caught.value)
    monkeypatch.setenv("FEATCACHE_NO_LOCK", "1")
    with begin(path), pytest.raises(StorageError, match="being written"):  # in this process
        begin(path)


# --- rows of an older cache


def test_update_computes_only_the_new_images_and_equals_a_full_run(path, tmp_path):
    synthetic_cache(path, {"train": 150, "test": 70})
    grown = {"train": 200, "test": 70}
    meta = make_meta(fingerprint="ee" * 32)
    with begin(path, meta=meta, splits=make_splits(grown), reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 150, "test": 70}
        assert new.pending("train") == [range(128, 192), range(192, 200)]
        assert new.pending("test") == []
        mask, kept = new.reused_rows("train", range(128, 192))
        assert mask.tolist() == [True] * 22 + [False] * 42
        assert (new.is_reused("train", range(128, 192)) == mask).all()
        assert (kept[:, :22] == expected("train", range(128, 150))).all()
        assert not kept[:, 22:].any()
        fill(new)
        new.finish()
    whole = tmp_path / "whole.h5"
    with begin(whole, meta=meta, splits=make_splits(grown)) as full:
        fill(full)
        full.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_update_follows_content_when_images_move_and_go(path):
    synthetic_cache(path, num_views=2)
    train, test = make_splits()
    # Reversed, the first ten removed, and one moved over from test.
    ids = [*train.ids[:9:-1], "train/moved.png"]
    content = np.concatenate([train.content[:9:-1], test.content[5:6]])
    moved = SplitRows("train", ids, np.zeros(141, int), content)
    with begin(path, meta=make_meta(num_views=2), splits=[moved], reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 141}
        assert new.pending("train") == []
        new.finish()
    X = FeatureCache(path).split("train").views
    assert (X[:, :140] == expected("train", range(150), 2)[:, :9:-1]).all()
    assert (X[:, 140] == expected("test", range(5, 6), 2)[:, 0]).all()


def test_update_never_keeps_skipped_or_damaged_rows(path):
    splits = make_splits({"train": 150})
    with begin(path, splits=splits) as new:
        for rows in new.pending("train"):
            status = np.zeros(len(rows), np.uint8)
            status[1] = 3
            new.write_block("train", rows, expected("train", rows), status)
        new.finish()
    flip(path, features_offset(path, row=70))
    with begin(path, splits=splits, reuse=FeatureCache(path)) as new:
        assert new.num_reused == {"train": 63 + 21}
        assert not new.is_reused("train", range(64))[1]
        assert not new.is_reused("train", range(64, 128)).any()


def test_update_refuses_rows_made_with_other_settings(path):
    copy_cache(path)
    with pytest.raises(CacheError, match=r"different settings.*backbone\.weights: cached 'random'"):
        begin(path, meta=make_meta(weights="imagenet"), reuse=FeatureCache(path))
    assert not part_path(path).exists()
    begin(path, force=True).close()  # the lock is free


def test_killed_update_goes_on_and_a_changed_one_keeps_its_rows(path):
    copy_cache(path)
    one = make_splits({"train": 300, "test": 70})
    meta = make_meta(fingerprint="11" * 32)
    with begin(path, meta=meta, splits=one, reuse=FeatureCache(path)) as new:
        fill(new, stop_after=2)  # rows 128 to 255
    with begin(path, meta=meta, splits=one, reuse=FeatureCache(path)) as new:
        assert new.num_resumed == {"train": 256, "test": 70}
        assert new.num_reused == {"train": 0, "test": 0}
    # The dataset grows once more before the update was finished.
    two = make_splits({"train": 310, "test": 70})
    meta = make_meta(fingerprint="22" * 32)
    with begin(path, meta=meta, splits=two, reuse=FeatureCache(path)) as new:
        assert new.num_resumed == {"train": 0, "test": 0}
        assert new.num_reused == {"train": 256, "test": 70}
        fill(new)
        new.finish()
    assert_train(path, 310)


# --- repair


def test_repair_computes_only_damaged_blocks(path):
    whole = copy_cache(path).read_bytes()
    flip(path, features_offset(path, row=70))
    flip(path, features_offset(path, "test", row=65))
    report = verify(path)
    assert report.damaged == {"train": [range(64, 128)], "test": [range(64, 70)]}
    assert report.repairable
    damaged = path.read_bytes()
    with prepare_repair(path) as repair:
        assert repair.pending("train") == [range(64, 128)]
        assert repair.pending("test") == [range(64, 70)]
        assert path.read_bytes() == damaged
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


def test_killed_repair_goes_on(path):
    whole = copy_cache(path).read_bytes()
    flip(path, features_offset(path, row=70))
    flip(path, features_offset(path, "test", row=65))
    with prepare_repair(path) as repair:
        fill(repair, stop_after=1)
    with prepare_repair(path) as repair:
        assert repair.pending("train") == []
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["train/crc32", "train/state", "digest", "structure"])
def test_repair_makes_marks_digest_and_hdf5_structure_new(path, name):
    whole = copy_cache(path).read_bytes()
    extents = FeatureCache(path).file.layout.extents
    flip(path, 100 if name == "structure" else extents[name].offset)
    report = verify(path)
    assert not report.ok
    with prepare_repair(path) as repair:
        fill(repair)
        repair.finish()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["train/labels", "test/ids", "class_names", "meta_json"])
def test_repair_refuses_when_more_than_features_is_damaged(path, name):
    copy_cache(path)
    flip(path, FeatureCache(path).file.layout.extents[name].offset)
    assert not verify(path).repairable
    with pytest.raises(CacheError, match=f"{name} are damaged.*--force"):
        prepare_repair(path)


# --- the disk


def fail_with(code: int):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


CODES = [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EDQUOT, errno.EIO]


@pytest.mark.parametrize("code", [*CODES, errno.ESTALE])
@pytest.mark.parametrize("call", ["reserve", "write_at", "sync", "sync_folder"])
def test_every_failing_call_is_one_line_and_the_run_goes_on_after(path, code, call, monkeypatch):
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


def test_full_disk_is_found_in_advance_then_the_run_goes_on(small_disk, monkeypatch):
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


def test_lock_file_says_who_for_people_too(path):
    with begin(path):
        who = json.loads(path.with_name("x.h5.lock").read_text())
        assert who["pid"] == os.getpid()
        assert who["since"][:4] == time.strftime("%Y")

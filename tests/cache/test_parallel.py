"""Several processes write one cache: the same bytes as one process, whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rank_runs
from cache_helpers import CLASSES, flip_bit, make_meta
from conftest import TESTS
from featcache.cache import fileio, lock, open_writer, part_path, verify, writer
from featcache.cache.lock import HeldError, Lock, join
from featcache.cache.parallel import (
    MERGING,
    ClaimedWriter,
    Job,
    Plan,
    Share,
    claims,
    copy_shards,
    join_writers,
    merge_shards,
    open_shard,
    plan,
    remove_shards,
    shards,
    shared_disk,
)
from featcache.cache.storage import CacheFile
from featcache.errors import CacheError, StorageError
from rank_runs import META, ROWS, SPLITS, fork, start, wait, work

PAGE = 4096
values = rank_runs.values
WRITES = ("direct", "shards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return rank_runs.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "x.h5"


def names(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


def fill_shard(path: Path, share: Share, meta=META, stop_after: int = 99) -> None:
    """What one rank's shard gets, up to a number of blocks."""
    one = open_shard(Job(path, meta, CLASSES, SPLITS, share))
    assert one is not None
    with one:
        for split, blocks in share.blocks(ROWS).items():
            first = blocks.start * 64
            for rows in one.pending(split):
                if not (stop_after := stop_after - 1) + 1:
                    return
                features = rank_runs.values(split, range(first + rows.start, first + rows.stop))
                one.write_block(split, rows, features, np.zeros(len(rows), np.uint8))
        one.finish()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 25])  # of 20 blocks
def test_the_file_is_that_of_one_process(path, whole, write, size):
    assert wait(start(write, path, size)) == [0] * size
    assert path.read_bytes() == whole
    assert names(path) == {"x.h5", "x.h5.lock"}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "num_kills", [8, pytest.param(200, marks=(pytest.mark.slow, pytest.mark.timeout(600)))]
)
def test_ranks_killed_at_random_moments(tmp_path, write, num_kills):
    words = [sys.executable, TESTS / "rank_runs.py", write, num_kills, 5, tmp_path]
    done = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(f"{write}: {counts}")
    assert counts["kills"] >= num_kills
    assert counts["finished"] >= 1
    assert (counts["failed"], counts["wrong"]) == (0, 0), done.stderr


def test_two_workers_that_race_for_every_block_write_the_same(path, whole, monkeypatch):
    monkeypatch.setattr(Lock, "claim", lambda self, number: True)
    monkeypatch.setattr(ClaimedWriter, "_marks_one", lambda self, split, block: False)
    for _ in range(5):
        pids = [fork(lambda: work("direct", path, Share(0, 1))) for _ in range(2)]
        assert wait(pids) == [0, 0]
        assert path.read_bytes() == whole
        path.unlink()


@pytest.mark.parametrize("write", WRITES)
def test_a_rank_with_other_weights_is_refused_by_name(path, whole, write):
    other = make_meta(dim=rank_runs.DIM, weights="imagenet")
    assert work(write, path, Share(1, 3)) if write == "shards" else True
    mine = Plan(META, dict(ROWS), write, "rank 1 of 3")
    mine.agree(path)
    with pytest.raises(CacheError) as caught:
        work(write, path, Share(2, 3), meta=other)
    assert str(caught.value) == (
        f"{path} was begun by rank 1 of 3 with different settings: backbone.weights: cached "
        "'random', requested 'imagenet'; give every rank the same command, or, if that job is "
        f"over, finish it first, or remove {path}.plan and its unfinished files"
    )
    assert wait(start(write, path, 3)) == [0] * 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("write", WRITES)
def test_an_unfinished_file_of_other_settings_is_refused_before_a_plan_is_made(path, write):
    open_writer(path, make_meta(dim=rank_runs.DIM, weights="imagenet"), CLASSES, SPLITS).close()
    with pytest.raises(CacheError) as caught:
        work(write, path, Share(0, 2))
    assert str(caught.value) == (
        f"{path}.part was begun with different settings: backbone.weights: cached 'imagenet', "
        "requested 'random'; run the earlier command to finish it, or remove it"
    )
    assert names(path) == {"x.h5.part", "x.h5.lock"}


def test_a_rank_that_hangs_costs_a_lease_and_no_row(path, whole, monkeypatch, capfd):
    monkeypatch.setattr(claims, "LEASE_S", 0.4)
    calls = []

    def stop_at_the_third(split: str, rows: range) -> np.ndarray:
        calls.append(rows)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return values(split, rows)

    with monkeypatch.context() as patched:
        patched.setattr(rank_runs, "values", stop_at_the_third)
        hung = fork(lambda: work("direct", path, Share(1, 3)))
    assert os.WIFSTOPPED(os.waitpid(hung, os.WUNTRACED)[1])
    others = [fork(lambda i=i: work("direct", path, Share(i, 3))) for i in (0, 2)]
    assert wait(others) == [1, 1]
    said = capfd.readouterr().err
    assert "block train/8: nothing written for 0 s, computed here too" in said
    assert "every block is written, but another rank has not ended for 0 s: end it, then" in said
    assert verify(part_path(path)).problems == [
        "unfinished: 20 of 20 blocks are written; rerun the same extract-features command to resume"
    ]
    os.kill(hung, signal.SIGCONT)  # it goes on, and finishes
    assert wait([hung]) == [0]
    assert path.read_bytes() == whole


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(number: int, function):
    """The function, which at its call of that number kills its process; -1: after the first."""
    calls = []

    def call(*args, **more):
        calls.append(1)
        if len(calls) == number:
            die()
        result = function(*args, **more)
        if number < 0:
            die()
        return result

    return call


STEPS = [
    (plan, "create_atomically", 1),
    (plan, "create_atomically", -1),
    (claims, "create_part", 1),
    ("featcache.cache.create", "write_at", 3),
    (claims, "create_part", -1),
    (claims.ClaimedWriter, "_clear_wrong_marks", -1),
    (Lock, "share", -1),
    (writer, "write_at", 2),  # features, but neither checksum nor mark
    (writer, "write_at", 4),
    (claims.ClaimedWriter, "leave", 1),
    (writer.CacheWriter, "finish", 1),
    (writer, "sha256_of", -1),
    (writer, "FeatureCache", 1),
    (writer, "sync_folder", 1),  # after the rename
    (rank_runs, "remove_shards", 1),
]


@pytest.mark.parametrize(("where", "name", "number"), STEPS)
def test_the_leader_may_die_at_any_step(path, whole, where, name, number):
    home = sys.modules[where] if isinstance(where, str) else where

    def leader() -> None:
        setattr(home, name, dying(number, getattr(home, name)))
        work("direct", path, Share(0, 3))

    assert wait([fork(leader)]) == [-signal.SIGKILL]
    assert wait([fork(lambda i=i: work("direct", path, Share(i, 3))) for i in (1, 2)]) == [0, 0]
    assert path.read_bytes() == whole
    assert {name for name in names(path) if not name.endswith(".tmp")} == {"x.h5", "x.h5.lock"}


def test_a_shard_alone_leaves_the_rest_to_others(path, whole):
    assert wait([fork(lambda: work("direct", path, Share(1, 3), helps=False))]) == [0]
    assert verify(part_path(path)).num_blocks_done == 7
    with pytest.raises(StorageError, match="being written by process"), join_alone(path):
        open_writer(path, META, CLASSES, SPLITS)
    assert wait(start("direct", path, 1)) == [0]
    assert path.read_bytes() == whole


def test_a_run_that_is_no_rank_keeps_ranks_out(path, monkeypatch):
    monkeypatch.setattr(lock, "UNKNOWN_S", 0.1)

    def hold() -> None:
        with open_writer(path, META, CLASSES, SPLITS):
            time.sleep(60)

    plain = fork(hold)
    while not part_path(path).exists():
        time.sleep(0.01)
    for write in WRITES:
        with pytest.raises(HeldError, match=rf"being written by process {plain} on "):
            work(write, path, Share(1, 2))
        plan.plan_path(path).unlink()
    os.kill(plain, signal.SIGKILL)
    wait([plain])


def join_alone(path: Path) -> ClaimedWriter:
    one = join_writers(Job(path, META, CLASSES, SPLITS, Share(0, 2)), helps=False)
    assert one is not None
    return one


@pytest.mark.parametrize("size", [2, 3, 20, 30])
def test_shares_are_all_blocks_once(size):
    found = [Share(i, size).blocks(ROWS) for i in range(size)]
    blocks = [(split, b) for share in found for split, run in share.items() for b in run]
    assert blocks == [("train", b) for b in range(15)] + [("test", b) for b in range(5)]
    counts = [sum(map(len, share.values())) for share in found]
    assert max(counts) - min(counts) <= 1


def begin_job(path: Path, *shares: Share, meta=META) -> None:
    """The plan and some finished shards of a job."""
    Plan(meta, dict(ROWS), "shards", "rank 0").agree(path)
    for share in shares:
        fill_shard(path, share, meta)


def test_merge_names_the_shards_that_are_missing_then_merges(path, whole):
    begin_job(path, Share(0, 4), Share(3, 4))
    fill_shard(path, Share(1, 4), stop_after=2)
    with pytest.raises(CacheError) as caught:
        merge_shards(path)
    assert str(caught.value) == (
        f"{path}: of 4 shards, 1 are missing or unfinished (2): run these ranks again (--shard 2/4)"
    )
    fill_shard(path, Share(2, 4))
    with pytest.raises(CacheError, match=r"of 4 shards, 1 are missing or unfinished \(1\)"):
        merge_shards(path)  # shard 1 is there, but lacks blocks
    fill_shard(path, Share(1, 4))
    merge_shards(path)
    assert path.read_bytes() == whole
    assert names(path) == {"x.h5", "x.h5.lock"}


def test_an_interrupted_merge_is_resumed(path, whole, monkeypatch):
    begin_job(path, *(Share(i, 3) for i in range(3)))
    written = []

    def stop(self, *block) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(block)
        write_block(self, *block)

    write_block = writer.CacheWriter.write_block
    with monkeypatch.context() as patched:
        patched.setattr(writer.CacheWriter, "write_block", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_shards(path)
    assert verify(part_path(path)).num_blocks_done == 9
    merge_shards(path)
    assert path.read_bytes() == whole


def test_another_number_of_ranks_keeps_what_is_there(path, whole, monkeypatch):
    begin_job(path, Share(0, 2))
    fill_shard(path, Share(1, 2), stop_after=4)
    computed = []
    monkeypatch.setattr(
        rank_runs, "values", lambda *block: computed.append(block) or values(*block)
    )
    for index in range(5):
        rank_runs.work_on_shard(path, META, Share(index, 5))
    assert len(computed) == 20 - 10 - 4
    assert path.read_bytes() == whole


def test_one_process_takes_what_ranks_left(path, whole):
    begin_job(path, Share(0, 2))
    with open_writer(path, META, CLASSES, SPLITS) as one:
        copy_shards(one)
        assert len(one.pending("train")) + len(one.pending("test")) == 10
        for split in ROWS:
            for rows in one.pending(split):
                good = np.zeros(len(rows), np.uint8)
                one.write_block(split, rows, values(split, rows), good)
        one.finish()
    remove_shards(path)
    assert path.read_bytes() == whole
    assert names(path) == {"x.h5", "x.h5.lock"}


def test_a_rank_that_comes_during_the_merge_has_nothing_to_do(path):
    begin_job(path, Share(0, 2), Share(1, 2))
    place = path.with_name("x.h5.lock")

    def hold() -> None:
        lock = Lock(place, "rank 0 of 2")  # alone, so it locks all others out
        time.sleep(60)
        lock.release()

    merger = fork(hold)
    while not place.exists() or not place.read_bytes():
        time.sleep(0.01)
    assert work("shards", path, Share(1, 2)) == MERGING
    with pytest.raises(HeldError, match=r"being written by process \d+ \(rank 0 of 2\) on "):
        join(path, "rank 0 of 3", 0.2)
    os.kill(merger, signal.SIGKILL)
    wait([merger])
    assert work("shards", path, Share(1, 2)) is None
    assert verify(path).ok


def test_damage_in_a_shard_is_found(path):
    begin_job(path, Share(0, 2), Share(1, 2))
    shard = shards.shard_path(path, Share(1, 2))
    flip_bit(shard, CacheFile(shard).layout.features("test").end - 5)
    with pytest.raises(CacheError, match=r"-of-00002: block 4 of test fails its checksum: remove"):
        merge_shards(path)
    flip_bit(shard, CacheFile(shard).layout.extents["test/content"].offset)
    with pytest.raises(CacheError, match="shard-00001-of-00002 is damaged in test/content: remove"):
        merge_shards(path)


def test_a_shard_made_with_other_weights_is_named(path):
    other = make_meta(dim=rank_runs.DIM, weights="imagenet")
    begin_job(path, Share(0, 2))
    fill_shard(path, Share(1, 2), other)
    with pytest.raises(
        CacheError, match=r"shard-00001-of-00002 was made with different settings: "
    ):
        merge_shards(path)


def test_skipped_rows_half_precision_and_views_survive_a_merge(tmp_path):
    meta = make_meta(dim=4, dtype="float16", num_views=2)
    rows = {"train": 150, "test": 70}
    splits = rank_runs.make_splits(rows, columns=True)

    def write(one, split, rows, first) -> None:
        status = np.zeros(len(rows), np.uint8)
        status[3] = 2
        place = range(first + rows.start, first + rows.stop)
        features = rank_runs.expected(split, place, num_views=2, dim=4)
        one.write_block(split, rows, features, status)

    plain, path = tmp_path / "plain.h5", tmp_path / "x.h5"
    with open_writer(plain, meta, CLASSES, splits) as one:
        for split in rows:
            for block in one.pending(split):
                write(one, split, block, 0)
        one.finish()
    Plan(meta, rows, "shards", "rank 0").agree(path)
    for share in (Share(0, 2), Share(1, 2)):
        with open_shard(Job(path, meta, CLASSES, splits, share)) as one:
            for split, blocks in share.blocks(rows).items():
                for block in one.pending(split):
                    write(one, split, block, blocks.start * 64)
            one.finish()
    merge_shards(path)
    assert path.read_bytes() == plain.read_bytes()


def test_merge_without_a_job_says_what_is_missing(path):
    with pytest.raises(CacheError) as caught:
        merge_shards(path)
    assert str(caught.value) == (
        f"no x.h5.plan beside {path}: give the cache's name, without .shard-…"
    )
    begin_job(path)
    with pytest.raises(CacheError, match=r"^no shards beside "):
        merge_shards(path)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"digest": 1}'])
def test_a_damaged_plan_is_refused(path, text):
    begin_job(path)
    plan_file = path.with_name("x.h5.plan")
    saved = plan_file.read_text()
    plan_file.write_bytes(text)
    with pytest.raises(CacheError, match=r"x\.h5\.plan is not a plan of ranks: "):
        Plan.read(path)
    plan_file.write_text(saved.replace('"train": 900', '"train": 901'))
    with pytest.raises(CacheError, match="its digest is wrong"):
        Plan.read(path)


def test_a_plan_that_does_not_fit_its_shards_is_refused(path):
    Plan(META, {"train": 900, "test": 290}, "shards", "rank 0").agree(path)
    for share in (Share(0, 2), Share(1, 2)):
        fill_shard(path, share)
    path.with_name("x.h5.shard-00000-of-00000").write_bytes(b"")
    with pytest.raises(
        CacheError, match=r"x\.h5\.plan states other numbers of rows than the shards"
    ):
        merge_shards(path)
    for num_rows in ({"train": 0}, {"train": 2**40}, {"../x": 5}):
        with pytest.raises(ValueError, match=r"^split '.*' of .* rows$"):
            Plan(META, num_rows, "shards", "rank 0")


def test_foreign_files_beside_the_cache_stay(path):
    begin_job(path, Share(0, 2))
    mine = {"x.h5.shard-notes", "x.h5.plans", "y.x.h5.plan", "x.h5.shard-00000-of-00002.txt"}
    for name in mine:
        path.with_name(name).write_text("mine")
    for killed in ("part", "shard-00001-of-00002.part"):  # writers, as they began a file
        path.with_name(f".x.h5.{killed}.0123456789abcdef.tmp").mkdir()
    remove_shards(path)
    assert names(path) == mine


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/me/local xfs rw 0 0
s3fs /bucket\040one fuse.s3fs rw 0 0
lustre /scratch lustre rw 0 0
tmpfs /scratch tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/data", None),
        ("/home/you/cache", "nfs4"),
        ("/home/me/local/cache", None),
        ("/homework", None),
        ("/bucket one/cache", "fuse.s3fs"),
        ("/scratch/x", None),  # mounted over
    ],
)
def test_disks_of_several_machines_are_known(tmp_path, folder, kind):
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    assert shared_disk(Path(folder), table) == kind
    assert shared_disk(Path(folder), tmp_path / "no such file") is None


class NfsClient:
    """Reads whole pages from the server when it first writes to them, and writes them back whole.

    That is what a network file system's client does with files that it has mapped or read.
    """

    def __init__(self, server: bytearray) -> None:
        self.server, self.pages = server, {}

    def write(self, offset: int, data: bytes) -> None:
        for at in range(offset, offset + len(data)):
            page = at // PAGE
            if page not in self.pages:
                self.pages[page] = bytearray(self.server[page * PAGE : (page + 1) * PAGE])
            self.pages[page][at % PAGE] = data[at - offset]

    def flush(self) -> None:
        for page, data in self.pages.items():
            self.server[page * PAGE : page * PAGE + len(data)] = data
        self.pages.clear()


def recorded(monkeypatch, run) -> list[tuple[int, bytes]]:
    """The writes of blocks by a rank, in order."""
    writes = []

    def write_at(fd, data, offset) -> None:
        writes.append((offset, memoryview(data).cast("B").tobytes()))
        fileio.write_at(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_at", write_at)
        run()
    return writes


def on_clients(before: list[bytes], logs: list[list[tuple[int, bytes]]], choose) -> list[bytes]:
    """What a server holds after each client has written its log to its file, interleaved.

    The same object twice in `before` is one file on the server that two clients write.
    """
    servers: dict[int, bytearray] = {id(data): bytearray(data) for data in before}
    clients = [NfsClient(servers[id(data)]) for data in before]
    left = [list(log) for log in logs]
    while any(left):
        place = choose.choice([i for i, log in enumerate(left) if log])
        clients[place].write(*left[place].pop(0))
        if choose.random() < 0.02:
            clients[place].flush()
    for client in clients:
        client.flush()
    return [bytes(servers[id(data)]) for data in before]


def test_on_a_network_disk_writing_in_place_loses_data_and_shards_do_not(path, whole, monkeypatch):
    choose, part = random.Random(1), part_path(path)

    def half(index: int) -> None:
        rank = join_writers(Job(path, META, CLASSES, SPLITS, Share(index, 2)), helps=False)
        with rank:
            for split in ROWS:
                for rows in rank.take(split, others=False):
                    rank.write_block(
                        split, rows, values(split, rows), np.zeros(len(rows), np.uint8)
                    )

    with join_alone(path):
        fresh = part.read_bytes()
    logs = []
    for index in range(2):
        part.write_bytes(fresh)
        logs.append(recorded(monkeypatch, lambda i=index: half(i)))
    part.write_bytes(on_clients([fresh, fresh], logs, choose)[0])
    kept = sum(CacheFile(part).good_blocks(split).sum() for split in ROWS)
    assert kept < 20, "blocks of one client were undone by the other"
    part.unlink()

    begin_job(path)
    files = [part_path(shards.shard_path(path, Share(i, 2))) for i in range(2)]
    for index in range(2):
        fill_shard(path, Share(index, 2), stop_after=0)
    empty, logs = [file.read_bytes() for file in files], []
    for index in range(2):
        logs.append(recorded(monkeypatch, lambda i=index: fill_shard(path, Share(i, 2))))
    after = on_clients(empty, logs, choose)
    assert after == [shards.shard_path(path, Share(i, 2)).read_bytes() for i in range(2)]
    merge_shards(path)
    assert path.read_bytes() == whole

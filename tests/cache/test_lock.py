"""Two writers at once: the second is refused by name, and a dead one blocks nobody."""

from __future__ import annotations

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

import pytest

from cache_helpers import begin, copy_cache
from conftest import TESTS
from featcache.cache import FeatureCache, verify
from featcache.errors import StorageError


def test_second_writer_learns_who_writes(path):
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
def test_a_lock_file_that_is_not_a_plain_file_is_refused(path, tmp_path, kind):
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
    def refuse(fd, how, *place):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("featcache.cache.lock.fcntl.lockf", refuse)
    with pytest.raises(StorageError, match=r"no locks.*and set FEATCACHE_NO_LOCK=1$") as caught:
        begin(path)
    assert "room" not in str(caught.value)
    monkeypatch.setenv("FEATCACHE_NO_LOCK", "1")
    with begin(path), pytest.raises(StorageError, match="being written"):  # in this process
        begin(path)


def test_lock_file_says_who_for_people_too(path):
    with begin(path):
        who = json.loads(path.with_name("x.h5.lock").read_text())
        assert who["pid"] == os.getpid()
        assert who["since"][:4] == time.strftime("%Y")

"""What belongs to the whole process and has to be put back."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from featcache.errors import StorageError
from featcache.runtime import (
    check_writable,
    interrupts_held,
    remove_temporaries,
    replacing,
    storage_errors,
    torch_threads_kept,
    write_atomically,
)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    before, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_goes_before_the_error_that_it_looks_like() -> None:
    def work() -> None:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("cannot convert")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_errors_and_other_threads_are_left_alone() -> None:
    passed: list[int] = []

    def work() -> None:
        with interrupts_held():
            passed.append(1)
            raise ValueError("mine")

    def elsewhere() -> None:
        with pytest.raises(ValueError, match="mine"):
            work()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    elsewhere()
    assert passed == [1, 1]


def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    check_writable(path, 1000)
    assert os.listdir(path.parent) == []
    with pytest.raises(StorageError, match="No space left"):
        check_writable(path, 2**60)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        check_writable(tmp_path / "file" / "model.safetensors")


def test_only_a_full_disk_asks_for_room(tmp_path: Path) -> None:
    for code, advice in ((errno.ENOSPC, "; make room or choose"), (errno.EROFS, "; choose")):
        with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
            raise OSError(code, os.strerror(code))
        assert f"{os.strerror(code)}{advice} another place with --output" in str(caught.value)


def test_threads_that_write_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path, failed = tmp_path / "x.json", []

    def write(text: bytes) -> None:
        for _ in range(20):
            try:
                write_atomically(path, text * 10_000)
            except StorageError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert os.listdir(tmp_path) == ["x.json"]
    assert len(set(path.read_bytes())) == 1
    assert path.stat().st_size == 10_000


def test_drafts_lie_where_nobody_else_can_plant_a_link(tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        with replacing(tmp_path / "x.json") as draft:
            draft.write_text("{}")
            folders.append(draft.parent)
            assert draft.parent.stat().st_mode & 0o777 == 0o700
            assert draft.parent.parent == tmp_path
    assert folders[0] != folders[1]
    with contextlib.suppress(KeyError), replacing(tmp_path / "x.json") as draft:
        draft.write_text("half")
        raise KeyError
    assert (tmp_path / "x.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["x.json"]


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path: Path) -> None:
    path, victim = tmp_path / "x.json", tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    (tmp_path / ".x.json.1.tmp").symlink_to(victim)
    old, young = tmp_path / ".x.json.2.tmp", tmp_path / ".x.json.3.tmp"
    for left in (old, young):
        left.mkdir()
        (left / ".tmpAbCdEf").write_bytes(b"half")
        os.utime(left, (0, 0))
    os.utime(old / ".tmpAbCdEf", (0, 0))
    write_atomically(path, b"{}")
    assert (young / ".tmpAbCdEf").exists()
    assert not old.exists()
    remove_temporaries(path)
    assert sorted(os.listdir(tmp_path)) == ["victim", "x.json"]
    assert os.listdir(victim) == ["kept"]


def test_torchs_threads_are_put_back() -> None:
    before = torch.get_num_threads()

    def work() -> None:
        with torch_threads_kept():
            torch.set_num_threads(before + 1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()
    assert torch.get_num_threads() == before

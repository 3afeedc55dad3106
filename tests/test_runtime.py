"""What belongs to the whole process and has to be put back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from featcache.errors import StorageError
from featcache.runtime import check_writable, interrupts_held, torch_threads_kept


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


def test_torchs_threads_are_put_back() -> None:
    before = torch.get_num_threads()

    def work() -> None:
        with torch_threads_kept():
            torch.set_num_threads(before + 1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()
    assert torch.get_num_threads() == before


def test_overlapping_users_leave_torchs_threads_as_the_first_found_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = torch_threads_kept(), torch_threads_kept()
        first.__enter__()
        torch.set_num_threads(1)
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

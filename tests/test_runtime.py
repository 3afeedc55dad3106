"""What belongs to the whole process and has to be put back."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import math
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from featcache import display, runtime
from featcache.display import Facts, progress, say
from featcache.errors import StorageError
from featcache.files import (
    check_writable,
    remove_temporaries,
    replacing,
    storage_errors,
    write_atomically,
)
from featcache.runtime import (
    cpu_quota,
    interrupts_first,
    interrupts_held,
    num_cores,
    torch_threads_kept,
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


def test_an_interrupt_that_became_another_error_is_one_again() -> None:
    def work(*, interrupt: bool) -> None:
        with interrupts_first():
            try:
                if interrupt:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
            except KeyboardInterrupt as error:
                raise TypeError("expected a message argument") from error
            raise ValueError("mine")

    with pytest.raises(KeyboardInterrupt):
        work(interrupt=True)
    with pytest.raises(ValueError, match="mine"):
        work(interrupt=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    longer = tmp_path / ".x.json.json.0123456789abcdef.tmp"
    longer.mkdir()
    write_atomically(path, b"{}")
    assert (young / ".tmpAbCdEf").exists()
    assert not old.exists()
    remove_temporaries(path)
    assert sorted(os.listdir(tmp_path)) == [longer.name, "victim", "x.json"]
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


def test_a_line_that_nobody_can_read_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("föx\x1b[31m")
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        say("lost")
        monkeypatch.setattr(sys, "stderr", None)
        say("lost too, and not on stdout")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert capsys.readouterr() == ("", "föx\\x1b[31m\n")


def test_a_bars_title_moves_no_cursor() -> None:
    with progress(1, "a\x1b[2J", disable=False, file=io.StringIO()) as bar:
        assert bar.desc == r"a\x1b[2J"


def test_a_late_bar_appears_after_its_delay_and_counts_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    bar = progress(10, "fit", late=True, disable=False, file=shown, unit=" steps")
    bar.update(3)
    assert shown.getvalue() == ""
    monkeypatch.setattr(display, "LATE_BAR_S", 0.0)
    with bar:
        bar.update(4)
        assert "fit:  70%" in shown.getvalue()
        assert "7/10" in shown.getvalue()


def test_the_cpu_quota_of_every_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, inner = tmp_path / "cgroup", tmp_path / "fs" / "pod" / "box"
    group.write_text("1:cpu:/old\n0::/pod/box\n")
    inner.mkdir(parents=True)

    def quota() -> float:
        return cpu_quota(group, tmp_path / "fs")

    assert quota() == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    assert quota() == math.inf
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert quota() == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert quota() == 0.5
    (tmp_path / "cpu.max").write_text("1 100000\n")  # outside of the control groups
    assert quota() == 0.5
    assert cpu_quota(tmp_path / "gone", tmp_path / "fs") == math.inf
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for granted, cores in ((math.inf, 64), (1.5, 2), (0.5, 1), (100.0, 64)):
        monkeypatch.setattr(runtime, "cpu_quota", lambda granted=granted: granted)
        assert num_cores() == cores


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


def test_free_memory_is_known():
    assert runtime.available_memory() > 1 << 26


class Pet(Facts):
    def _facts(self):
        return {"name": "a\x1b[2J<b>", "legs": 4}


def test_facts_are_one_line_and_a_table_and_a_strangers_words_stay_words():
    assert repr(Pet()) == "<Pet name: a?[2J<b>; legs: 4>"
    html = Pet()._repr_html_()
    assert html.startswith("<table><caption>Pet</caption><tr><th")
    assert ">a?[2J&lt;b&gt;</td></tr>" in html
    assert len(repr(type("Long", (Pet,), {"_facts": lambda _: {"x": "y" * 10_000}})())) < 200


def test_a_notebook_with_widgets_gets_its_own_bar(monkeypatch):
    made = []
    module = types.ModuleType("tqdm.notebook")
    module.tqdm = lambda **options: made.append(options)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", module)
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with progress(1, file=io.StringIO()) as bar:
        assert type(bar).__module__ == "tqdm.std"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ipywidgets")
    progress(3, "train")
    assert made == [{"total": 3, "desc": "train", "disable": False, "unit": "img"}]

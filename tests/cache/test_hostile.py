"""Files from strangers are refused in one line, in bounded time and memory, running nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_helpers import copy_cache
from conftest import TESTS
from featcache.cache import (
    FeatureCache,
    FeatureDataset,
    cross_check,
    info,
    prepare_repair,
    read_meta,
    verify,
)
from featcache.config import VerifyConfig
from featcache.errors import CacheError, FeatcacheError, UserError
from featcache.extract import check, check_lines
from hostile.cache_files import NAMED_BY_VERIFY, REFUSED

READERS = (FeatureCache, FeatureDataset, prepare_repair)


def try_all(path: Path) -> None:
    """Every way in refuses the file with one printable line; `verify` reports instead."""
    for reader in READERS:
        with pytest.raises(UserError) as caught:
            reader(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    for reader in (read_meta, info):
        with contextlib.suppress(FeatcacheError):  # labels are not their business
            reader(path)
    try:
        report = verify(path, cross_check=False)
    except FeatcacheError:
        return
    assert not report.ok
    assert report.problems
    str(report.to_dict()).encode()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_file_is_refused(name, tmp_path):
    path = tmp_path / "x.h5"
    REFUSED[name](path)
    try_all(path)
    assert not path.with_name("x.h5.part").exists()


@pytest.mark.parametrize("name", NAMED_BY_VERIFY)
def test_verify_names_what_readers_need_not_care_about(name, tmp_path):
    path = tmp_path / "x.h5"
    NAMED_BY_VERIFY[name](path)
    report = verify(path)
    assert not report.ok
    cache = FeatureCache(path)
    cache.check()
    if name in ("garbage_header", "redirected_header"):
        assert "other HDF5 tools see something different" in report.problems[0]
        good = FeatureCache(copy_cache(tmp_path / "good.h5"))
        assert (cache.split("train").X == good.split("train").X).all()


def test_all_of_them_in_one_bounded_process(tmp_path):
    """Under 1 GiB of address space, 60 s for all: nothing allocates or loops by what is claimed."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        f"sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'cache')!r}]\n"
        "from pathlib import Path\n"
        "from hostile.cache_files import REFUSED\n"
        "from test_hostile import try_all\n"
        "for i, make in enumerate(REFUSED.values()):\n"
        "    path = Path(sys.argv[1], f'{i}.h5'); make(path); try_all(path)\n"
        "print(i + 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout.strip() == str(len(REFUSED)), done.stderr


def test_hdf5_library_that_hangs_is_given_up(tmp_path, monkeypatch):
    path = copy_cache(tmp_path / "x.h5")
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(cross_check, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(cross_check.sys, "executable", str(sleeper))
    report = verify(path)
    assert report.ok
    assert report.not_checked == ["whether other HDF5 tools see the same (no answer in 0.2 s)"]


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("echo 'h5py cannot be loaded: no' >&2; exit 3", "h5py cannot be loaded: no"),
        ("kill -KILL $$", "status -9"),
    ],
)
def test_a_library_that_cannot_be_asked_is_no_damage(tmp_path, monkeypatch, script, what):
    path = copy_cache(tmp_path / "x.h5")
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(cross_check.sys, "executable", str(stub))
    report = check(VerifyConfig(cache=path))
    assert report["exit_code"] == 0
    assert check_lines(report)[1:] == [
        f"not checked: whether other HDF5 tools see the same ({what})"
    ]


def test_a_library_that_computes_for_ever_is_stopped(tmp_path, monkeypatch):
    path = copy_cache(tmp_path / "x.h5")
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nkill -XCPU $$\n")
    stub.chmod(0o755)
    monkeypatch.setattr(cross_check.sys, "executable", str(stub))
    assert "needs more than 30 s of CPU time for it" in verify(path).problems[0]


def test_hdf5_library_that_crashes_is_reported(tmp_path, monkeypatch):
    path = copy_cache(tmp_path / "x.h5")
    crasher = tmp_path / "python"
    crasher.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crasher.chmod(0o755)
    monkeypatch.setattr(cross_check.sys, "executable", str(crasher))
    assert "cannot read it: status -11" in verify(path).problems[0]


def test_a_cache_named_part_is_never_taken_for_finished(tmp_path):
    path = copy_cache(tmp_path / "x.h5").rename(tmp_path / "x.h5.part")
    with pytest.raises(CacheError, match="unfinished"):
        FeatureCache(path)
    assert not verify(path).finished


def test_missing_cache_names_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"no cache .*gone\.h5: give a file written by"):
        FeatureCache(tmp_path / "gone.h5")
    copy_cache(tmp_path / "x.h5").rename(tmp_path / "x.h5.part")
    with pytest.raises(UserError, match="extraction is unfinished"):
        FeatureCache(tmp_path / "x.h5")

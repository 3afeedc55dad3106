"""The benchmark of many files: its files, its arithmetic, and one small run."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from conftest import REPO


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "scripts")
    import bench_index

    monkeypatch.setattr(bench_index, "KINDS", 20)
    monkeypatch.setattr(bench_index, "CLASSES", 2)
    return bench_index


def test_files_are_links_of_one_class_each(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "images.part" / "left").mkdir(parents=True)  # by an interrupted run
    script.link_files(tmp_path / "images", 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "kinds"]
    classes: dict[int, set[str]] = {}
    for path in (tmp_path / "images").rglob("*.png"):
        classes.setdefault(os.stat(path).st_ino, set()).add(str(path.parent))
    assert len(classes) == 20
    assert all(len(folders) == 1 for folders in classes.values())
    assert len(list((tmp_path / "images" / "test").rglob("*.png"))) == 6


def test_growth_is_by_file(script: ModuleType) -> None:
    found = {100: {"listing": (1.0, 2.0, 50.0)}, 1000: {"listing": (9.0, 30.0, 80.0)}}
    assert script.growth(found) == {"listing": 1.5}
    assert script._table(found)[2:] == [
        "| listing | 1.0 s (2.0), 50 MB | 9.0 s (30.0), 80 MB | 1.50 |"
    ]


@pytest.mark.slow
def test_a_small_run(script: ModuleType, tmp_path: Path) -> None:
    config = script.BenchConfig(nums=(40, 80), folder=tmp_path / "bench")
    report = script.bench(config)
    assert set(report["steps"]) == {"40", "80"}
    assert "hit check, whole command" in report["growth"]
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["bench-index.json"]


@pytest.mark.slow
def test_kept_files_serve_the_next_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = script.BenchConfig(nums=(40,), folder=tmp_path, keep=True)
    script.bench(config)
    assert sorted(path.name for path in (tmp_path / "files-40").iterdir()) == ["images", "kinds"]
    monkeypatch.setattr(script, "link_files", lambda *_: pytest.fail("made again"))
    (tmp_path / "files-40" / "cache").mkdir()  # of a run that was interrupted
    assert set(script.bench(config)["steps"]) == {"40"}

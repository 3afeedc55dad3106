"""The benchmark of scale, at a size that takes no time."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from conftest import REPO


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "scripts")  # as python scripts/bench_scale.py does
        yield importlib.import_module("bench_scale")


def test_every_step_is_timed_and_nothing_is_left(script: ModuleType, tmp_path: Path) -> None:
    report = script.bench(script.ScaleConfig(num_rows=1000, folder=tmp_path))
    names = ["make rows", "index", "layout", "write, finish", "verify", "open", "write shards"]
    assert list(report["steps"]) == [*names, "merge"]
    assert all(found["peak_mb"] > 10 for found in report["steps"].values())
    # Labels, ids of 25 bytes, hashes and statuses; then marks, pages and the layout record.
    assert 66 * 1000 < report["file_bytes"] - 16 * 4 * 1000 < 66 * 1000 + 150_000
    assert script.summary_lines(report)[-1].startswith("file: ")
    assert [file.name for file in tmp_path.iterdir()] == ["bench-scale.json"]
    assert json.loads((tmp_path / "bench-scale.json").read_text())["settings"]["dim"] == 16

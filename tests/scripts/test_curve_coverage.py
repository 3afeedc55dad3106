"""Coverage of extrapolated learning curves: known curves, what is measured once, the table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cache_helpers import copy_cache
from conftest import REPO


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPO / "scripts" / "curve_coverage.py"
    spec = importlib.util.spec_from_file_location("curve_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["curve_coverage"] = module
    spec.loader.exec_module(module)
    return module


def test_curves_that_are_power_laws_are_covered(script: ModuleType) -> None:
    sizes = [40, 80, 160, 320, 640, 1280]
    right = 1 - 0.05 - 2.0 * np.array(sizes) ** -0.6
    correct = np.random.default_rng(0).random((12, 6, 400)) < right[None, :, None]
    scores = script.Scores(num_train=sizes, correct=correct)
    found = script.coverage(scores, place=5, draws=3, num_repeats=60)
    assert found["coverage"] >= 0.8
    assert abs(found["bias"]) < 0.02
    # Heads that stop learning beyond what was fitted are not.
    stuck = correct.copy()
    stuck[:, 5] = np.random.default_rng(1).random((12, 400)) < 0.3
    assert script.coverage(script.Scores(num_train=sizes, correct=stuck), 5, 3, 60)["coverage"] == 0


def test_what_was_measured_is_taken_from_the_folder(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = copy_cache(tmp_path / "c.h5")
    calls = []

    def fit_all(cache: Path, config: object) -> dict:
        calls.append(cache)
        return {"num_train": [4, 8, 16, 32, 64], "correct": [["0101" * 20] * 5] * 4}

    monkeypatch.setattr(script, "fit_all", fit_all)
    config = script.CoverageConfig(
        caches=(cache,), sizes=(2, 4, 8, 16, 32), num_repeats=3, folder=tmp_path / "out"
    )
    script.main(config)
    script.main(config)
    assert len(calls) == 1
    rows = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert [(row["fitted"], row["target"], row["draws"]) for row in rows] == [
        ("2, 4, 8", 32, 1), ("2, 4, 8", 32, 3),
    ]  # fmt: skip
    assert capsys.readouterr().out.count("| 2, 4, 8 | 32 |") == 4

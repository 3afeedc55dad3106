"""A real extraction, killed at random moments, loses nothing and is never wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TESTS
from data_helpers import make_folder

SCRIPT = TESTS / "extract_kills.py"


@pytest.mark.parametrize("num_kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_lose_nothing(tmp_path: Path, num_kills: int) -> None:
    folder = make_folder(tmp_path / "pets", train=100, test=30)
    words = [SCRIPT, folder, tmp_path, num_kills, num_kills]
    out = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    counts = json.loads(out.stdout)
    assert counts["kills"] == num_kills
    assert counts["kills_with_progress"] >= num_kills // 3, "kills came too early to try anything"
    assert (counts["lost_blocks"], counts["wrong"]) == (0, 0)

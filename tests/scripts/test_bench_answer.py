"""The table of cached heads against fine-tuning: its split by group, its rows, its words."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conftest import REPO
from data_helpers import make_pets


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPO / "scripts" / "bench_answer.py"
    spec = importlib.util.spec_from_file_location("bench_answer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_answer"] = module
    spec.loader.exec_module(module)
    return module


def test_no_group_is_on_both_sides(script: ModuleType, tmp_path: Path) -> None:
    groups = tmp_path / "signs" / "groups.csv"
    groups.parent.mkdir()
    rows = [f"{label}/{pupil}.png,{label},{pupil}" for label in "ab" for pupil in range(20)]
    groups.write_text("\n".join(["path,label,group", *rows]) + "\n")
    manifest = script.split_by_group(groups, tmp_path / "out", seed=0)
    with manifest.open(newline="") as file:
        lines = list(csv.DictReader(file))
    sides = {"train": set(), "test": set()}
    for line in lines:
        sides[line["split"]].add(Path(line["path"]).stem)
    assert not sides["train"] & sides["test"]
    assert len(sides["train"] | sides["test"]) == 20
    assert sum(line["split"] == "test" for line in lines) == 10  # the first that reach 24 %
    assert script.split_by_group(groups, tmp_path / "out", seed=0).read_text() == (
        manifest.read_text()
    )


@pytest.mark.slow
def test_every_mode_has_a_row(script: ModuleType, tmp_path: Path) -> None:
    folder = make_pets(tmp_path / "pets")
    config = script.AnswerConfig(
        datasets=(str(folder),), weights="random", folder=tmp_path / "answer"
    )
    script.main(config)
    [result] = json.loads((tmp_path / "answer" / "answer.json").read_text())
    modes = [row["mode"] for row in result["rows"]]
    assert modes == [*script.CACHED, script.BEST, *script.TUNED]
    best = result["rows"][4]
    assert best["chosen"] in script.CACHED
    assert best["held_out_top1"] == max(row["held_out_top1"] for row in result["rows"][:4])
    assert best["seconds"] == pytest.approx(sum(row["seconds"] for row in result["rows"][:4]))
    assert sum(row["p_value"] is None for row in result["rows"]) == 1
    text = (tmp_path / "answer" / "answer.md").read_text()
    assert text.count("\n| ") == 10  # a header of two lines and eight modes

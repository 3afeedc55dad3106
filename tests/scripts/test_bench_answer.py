"""The table of cached heads against fine-tuning: its split by group, its rows, its words."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from conftest import REPO
from data_helpers import make_pets
from featcache.config import ExtractConfig
from featcache.data import load_dataset
from featcache.results import Predictions
from run_helpers import head_report


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "scripts")
    import bench_answer

    return bench_answer


def test_no_group_is_on_both_sides(script: ModuleType, tmp_path: Path) -> None:
    signs = make_pets(tmp_path / "signs") / "train"
    rows = [f"{p.parent.name}/{p.name},{p.parent.name},{p.stem}" for p in signs.glob("*/*.png")]
    (signs / "groups.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    settings = script.dataset_settings(str(signs), seed=0)
    splits = load_dataset(ExtractConfig(**settings)).splits
    sides = {side: set(splits[side].groups) for side in ("train", "test")}
    assert len(sides["train"]) + len(sides["test"]) == 11
    assert not sides["train"] & sides["test"]
    assert len(splits["test"]) / len(rows) == pytest.approx(script.TEST_SHARE, abs=0.05)


def report_of(folder: Path, name: str, right: int, held_out: float | None) -> str:
    """The report of a run that is right on the first `right` of 100 test images."""
    predicted = [0] * right + [1] * (100 - right)
    ids = [str(i) for i in range(100)]
    test = Predictions(ids=ids, labels=[0] * 100, predicted=predicted, confidence=[0.9] * 100)
    more = {"val_top1": held_out, "num_train": 1400, "num_test": 100}
    report = head_report(test=test, test_top1=right / 100, more=more)
    report.save(folder / f"{name}.json")
    return str(folder / f"{name}.json")


def test_the_gap_closed_is_that_of_the_head_which_held_out_rows_chose(
    script: ModuleType, tmp_path: Path
) -> None:
    runs = [
        ("cached", script.LAST, 60, 0.6, 2.0),
        ("cached", script.STAGES, 69, 0.8, 4.0),
        ("cached", "head, adapted BatchNorm", 75, 0.9, 3.0),
        ("cached", script.ADAPTED, 75, 0.7, 6.0),
        ("notebook", "fine-tune, lr 1e-4", 70, None, 30.0),
        ("good", "fine-tune, good recipe", 80, None, 50.0),
    ]
    rows = [
        script.scored(
            {
                "kind": kind,
                "mode": mode,
                "report": report_of(tmp_path, str(number), right, held_out),
                "seconds": seconds,
                "cpu_seconds": seconds,
            }
        )
        for number, (kind, mode, right, held_out, seconds) in enumerate(runs)
    ]
    result = script.judged(rows)
    modes = [mode for _, mode, *_ in runs]
    assert [row["mode"] for row in result["rows"]] == [*modes[:4], script.BEST, *modes[4:]]
    best, lower = result["rows"][4:6]
    assert best["chosen"] == script.STAGES  # the other rows are not among the choices
    assert best["closed"] == pytest.approx(9 / 20)
    assert best["cpu_seconds"] == 10.0  # choosing takes both
    assert best["p_value"] is None
    assert lower["p_value"] == 1.0  # one image differs
    assert best["p_value_full"] == pytest.approx(2 / 2**11)  # eleven, all one way
    assert result["rows"][-1]["p_value_full"] is None
    lines = script.table({"dataset": "photos/pets", **result}).splitlines()
    assert lines[0] == "**pets** (1,400 train and 100 test images)"
    assert lines[-1] == (
        "The best cached head closes 45% of the gap to 'fine-tune, good recipe' "
        "in 20% of its processor time."
    )


@pytest.mark.slow
def test_every_mode_has_a_row_and_finished_rows_are_kept(
    script: ModuleType, tmp_path: Path
) -> None:
    folder = make_pets(tmp_path / "pets")
    config = script.AnswerConfig(
        datasets=(str(folder),), weights="random", folder=tmp_path / "answer"
    )
    script.main(config)
    answer, page = (tmp_path / "answer" / f"answer.{kind}" for kind in ("json", "md"))
    [result] = json.loads(answer.read_text())
    cached = list(script.MODES["cached"])
    tail = list(script.MODES["tail"])
    tuned = [mode for kind in script.FULL for mode in script.MODES[kind]]
    assert [row["mode"] for row in result["rows"]] == [*cached, script.BEST, *tail, *tuned]
    assert result["best_tuned"] in tuned
    assert page.read_text().count("\n| ") == 2 + len(result["rows"])
    before = page.read_text()
    assert before.splitlines()[-1].startswith(("The best cached head", "No fine-tune"))
    script.main(config)
    assert page.read_text() == before

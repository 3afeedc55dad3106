"""`featcache compare`: nested samples, budget, resuming, and the same samples for both modes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featcache.compare.run as run_module
from featcache.compare import compare, summary_lines
from featcache.compare.budget import Budget
from featcache.compare.cells import finetune_config
from featcache.compare.plan import make_plan, nested_rows
from featcache.config import CompareConfig, FinetuneConfig, TrainHeadConfig
from featcache.errors import UserError
from featcache.finetune import finetune
from featcache.heads import train_head
from featcache.report import RunReport

SIDE = 24
CLASSES = {"cat": (150, 110, 110), "dog": (110, 150, 110), "eel": (110, 110, 150)}


def draw(folder: Path, num: int, hue: tuple[int, int, int], seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        pixels = np.clip(np.array(hue) + rng.integers(-60, 61, (SIDE, SIDE, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 10 train and 6 test images each; a damaged one in each split."""
    root = tmp_path_factory.mktemp("pets")
    for seed, (name, hue) in enumerate(CLASSES.items()):
        draw(root / "train" / name, 10, hue, seed)
        draw(root / "test" / name, 6, hue, 100 + seed)
    for split in ("train", "test"):
        (root / split / "dog" / "99.png").write_bytes(b"not a picture")
    return root


def settings(pets: Path, tmp_path: Path, **changes: object) -> CompareConfig:
    values = {
        "dataset": str(pets),
        "cache_dir": tmp_path / "cache",
        "output": tmp_path / "out",
        "backbone": "shufflenet_v2_x0_5",
        "weights": "random",
        "image_px": SIDE,
        "sizes": "3,all",
        "num_seeds": 1,
        "epochs": 1,
        "min_steps": 2,
        "workers": 0,
        "on_error": "skip",
        "device": "cpu",
    }
    return CompareConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def done(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, dict]:
    config = settings(pets, tmp_path_factory.mktemp("done"))
    threads = torch.get_num_threads()
    report = compare(config)
    assert torch.get_num_threads() == threads  # or fine-tuning would be slowed down
    return config, report


def runs_of(config: CompareConfig) -> dict[str, RunReport]:
    assert config.output is not None
    return {f.stem: RunReport.load(f) for f in sorted((config.output / "runs").glob("*.json"))}


def test_both_modes_saw_the_same_images(done: tuple[CompareConfig, dict]) -> None:
    config, report = done
    runs = runs_of(config)
    assert sorted(runs) == [
        "cached-3-draw0", "cached-all-draw0", "finetune-3-draw0", "finetune-all-draw0",
    ]  # fmt: skip
    for size, num in (("3", 9), ("all", 30)):
        head, tune = runs[f"cached-{size}-draw0"], runs[f"finetune-{size}-draw0"]
        assert head.more["num_train"] == tune.more["num_train"] == num
        assert head.test.ids == tune.test.ids  # the damaged one is in neither
        assert len(head.test.ids) == 18
    assert report["num_test"] == 18
    assert [point["num_train"] for point in report["points"]] == [9, 30]


def test_report_is_saved_and_says_what_it_should(done: tuple[CompareConfig, dict]) -> None:
    config, report = done
    saved = json.loads((config.output / "compare.json").read_text())
    assert saved["points"] == report["points"]
    assert len(report["advice"]) == 3
    assert report["left_out"] == []
    assert re.match(r"Extraction runs at \d+ images per second, measured", report["notes"][0])
    assert report["notes"][1].startswith("Sizes with one draw")
    lines = summary_lines(report)
    assert lines[0].startswith("train images")
    assert lines[-1] == f"next: featcache report {config.output}"
    assert not (config.output / "work").exists()


def test_a_cell_is_what_the_commands_do(done: tuple[CompareConfig, dict], tmp_path: Path) -> None:
    """All images: the same predictions as train-head and finetune give."""
    config, report = done
    runs = runs_of(config)
    head = TrainHeadConfig(
        cache=Path(report["extraction"]["cache"]), output=tmp_path / "head.safetensors"
    )
    train_head(head)
    alone = RunReport.load(tmp_path / "head.json")
    assert alone.test == runs["cached-all-draw0"].test
    tuning = finetune_config(config, 30, config.seed)
    finetune(dataclasses.replace(tuning, output=tmp_path / "model.safetensors"))
    alone = RunReport.load(tmp_path / "model.json")
    assert alone.test == runs["finetune-all-draw0"].test


def test_the_same_again_makes_no_run(
    done: tuple[CompareConfig, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, report = done
    monkeypatch.setattr(run_module, "do_run", None)
    again = compare(config)
    assert again["points"] == report["points"]
    assert again["spent_seconds"] == pytest.approx(report["spent_seconds"])


def copied(done: tuple[CompareConfig, dict], tmp_path: Path) -> CompareConfig:
    config, _ = done
    shutil.copytree(config.output, tmp_path / "out")
    return dataclasses.replace(config, output=tmp_path / "out")


def made(monkeypatch: pytest.MonkeyPatch, config: CompareConfig) -> list[str]:
    """Names of the runs that a start makes; fine-tunes are only pretended."""
    names: list[str] = []
    real = run_module.do_run

    def record(bench: object, spec: object) -> RunReport:
        names.append(spec.name)
        return real(bench, spec)

    monkeypatch.setattr(run_module, "do_run", record)
    compare(config)
    return names


def test_an_interrupted_comparison_goes_on(
    done: tuple[CompareConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copied(done, tmp_path)
    (config.output / "compare.json").unlink()
    (config.output / "runs" / "cached-3-draw0.json").unlink()
    (config.output / "runs" / "finetune-all-draw0.json").write_text('{"half": ')
    assert made(monkeypatch, config) == ["cached-3-draw0", "finetune-all-draw0"]


def test_other_settings_are_other_runs(
    done: tuple[CompareConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(copied(done, tmp_path), solver="ridge")
    assert made(monkeypatch, config) == ["cached-3-draw0", "cached-all-draw0"]


def test_no_time_leaves_out_all_but_a_first_run_of_each_mode(pets: Path, tmp_path: Path) -> None:
    report = compare(settings(pets, tmp_path, budget=1e-6, num_seeds=2))
    assert [Path(name).stem for name in report["runs"]] == ["cached-3-draw0", "finetune-3-draw0"]
    assert len(report["left_out"]) == 6
    note = report["notes"][-1]
    assert note.startswith("Left out for lack of time: cached head, all (30 images), draw 1 and 5")
    assert "--budget" in note


def test_sizes_are_nested_stratified_and_seeded() -> None:
    ids = [f"{i:03d}" for i in range(60)]
    labels = np.arange(60) % 3
    sizes = [set(nested_rows(ids, labels, n, seed=1)) for n in (2, 5, 12, None)]
    assert [len(rows) for rows in sizes] == [6, 15, 36, 60]
    assert all(small < large for small, large in pairwise(sizes))
    assert [int((labels[list(sizes[1])] == c).sum()) for c in range(3)] == [5, 5, 5]
    assert set(nested_rows(ids, labels, 5, seed=2)) != sizes[1]
    # The same images whatever the order of the dataset.
    turned = nested_rows(ids[::-1], labels[::-1], 5, seed=1)
    assert {ids[::-1][row] for row in turned} == {ids[row] for row in sizes[1]}


def test_a_class_with_few_images_gives_all_it_has() -> None:
    rows = nested_rows(list("abcdef"), np.array([0, 0, 0, 0, 0, 1]), 3, seed=0)
    assert len(rows) == 4
    assert 5 in rows


def test_all_sizes_come_before_second_draws(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path, sizes="2,5,10,500", num_seeds=2)
    labels = np.repeat([0, 1], 10)
    plan = make_plan(config, [str(i) for i in range(20)], labels, {"cached": {}, "finetune": {}})
    # Ten and five hundred per class are both all there are.
    sizes = ["2", "2", "5", "5", "all", "all"]
    assert [spec.size for spec in plan] == sizes * 2
    assert [spec.draw for spec in plan] == [0] * 6 + [1] * 6
    assert len({spec.key for spec in plan}) == 12


def test_small_sets_get_more_epochs(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path, epochs=3, min_steps=60)
    epochs = [finetune_config(config, num, 1).epochs for num in (10, 64, 100, 6400)]
    assert epochs == [60, 30, 15, 3]
    assert finetune_config(config, None, 1).epochs == 3
    assert isinstance(finetune_config(config, 10, 1), FinetuneConfig)


def fake(mode: str, num_train: int, epochs: int, training: float, spent: float) -> RunReport:
    cell = {"mode": mode, "spent_seconds": spent, "trial_seconds": training}
    return RunReport(
        command="finetune", trainable_params=1, test_top1=0.5, test_interval=(0.4, 0.6),
        seconds_total=spent, epochs=[{"seconds": training / epochs}] * epochs, scored_on="",
        chosen_on="", config={}, provenance={}, environment={},
        more={"num_train": num_train, "cell": cell},
    )  # fmt: skip


def test_budget_estimates_from_the_largest_run(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path)
    spec = make_plan(config, ["a", "b"], np.array([0, 1]), {"finetune": {}})[0]
    budget = Budget(100.0)
    assert budget.allows(budget.estimate("finetune", 10**9))  # nothing is known yet
    budget.add(spec, fake("finetune", 50, 2, 10.0, 14.0))
    # 100 images in 10 s and 4 s that do not grow.
    assert budget.estimate("finetune", 600) == pytest.approx(64.0)
    assert budget.allows(64.0)
    assert not budget.allows(87.0)
    assert budget.estimate("cached", 600) is None
    assert budget.spent == 14.0


@pytest.mark.parametrize("sizes", ["", "5,,all", "0,5", "five", "5 20", "1e3", "5,-1"])
def test_sizes_that_make_no_sense(sizes: str) -> None:
    with pytest.raises(UserError, match=r"sizes .* for example 5,20,50,all"):
        CompareConfig(dataset="digits", sizes=sizes)


def test_sizes_are_sorted_and_taken_once() -> None:
    config = CompareConfig(dataset="digits", sizes="all, 50,5,5")
    assert config.wanted_sizes() == (5, 50, None)

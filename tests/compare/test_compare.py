"""`featcache compare`: nested samples, budget, resuming, and the same samples for both modes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import SIDE, make_pets
from featcache import cli
from featcache.cache import FeatureCache
from featcache.compare import compare, comparison, extraction, summary_lines, training
from featcache.compare.budget import Budget, FinishedRun, Pace, finetune_pace
from featcache.compare.extraction import Extraction, _remembered
from featcache.compare.planned_runs import nested_rows, plan_runs
from featcache.compare.training import finetune_config, shared_tail
from featcache.config import CompareConfig, FinetuneConfig, ReportConfig, TrainHeadConfig
from featcache.data import datasets, load_dataset
from featcache.errors import StorageError, UserError
from featcache.finetune import finetune
from featcache.heads import train_head
from featcache.results import RunReport


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 10 train and 6 test images each; a damaged one in each split."""
    root = tmp_path_factory.mktemp("pets")
    make_pets(root, train=10, test=6)
    for split in ("train", "test"):
        (root / split / "dog" / "99.png").write_bytes(b"not an image")
    return root


def settings(pets: Path, tmp_path: Path, **changes: object) -> CompareConfig:
    values = {
        "dataset": str(pets),
        "cache_dir": tmp_path / "cache",
        "output": tmp_path / "out",
        "backbone": "shufflenet_v2_x0_5",
        "weights": "random",
        "image_px": SIDE,
        "layers": "last",
        "batchnorm": "frozen",
        "tail": "none",
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


def test_by_default_the_tail_is_the_last_stage(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(pets, tmp_path, tail="auto")
    dataset = load_dataset(config)
    frozen = Extraction(
        cache="", cache_digest="", seconds_per_image=1e-3, num_images=48, spent_seconds=0, how=""
    )
    tail = shared_tail(config, dataset, frozen, tmp_path)
    assert tail is not None
    assert tail.stage == "stage4"
    assert FeatureCache(tail.activations.cache).meta.backbone.stage_input is not None
    assert shared_tail(settings(pets, tmp_path), dataset, frozen, tmp_path) is None

    slow = dataclasses.replace(frozen, seconds_per_image=1.6)  # 48 images twice: 2.6 minutes
    assert shared_tail(config, dataset, slow, tmp_path) is None
    said = "leaving out the tail: caching the input of its stage would take 154 s of --budget 10"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(training, "MAX_TAIL_BYTES", 1000)
    assert shared_tail(config, dataset, frozen, tmp_path) is None
    assert "GB; --tail stage4 does it all the same" in capsys.readouterr().err

    with pytest.raises(UserError, match="--tail: no stage 'stage9'"):
        shared_tail(settings(pets, tmp_path, tail="stage9"), dataset, frozen, tmp_path)


@pytest.mark.slow
def test_the_tail_is_a_third_way(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path, tail="stage4", layers="stages")
    report = compare(config)
    runs = runs_of(config)
    assert sorted(runs) == [
        f"{mode}-{size}-draw0" for mode in ("cached", "finetune", "tail") for size in ("3", "all")
    ]
    tail, whole = runs["tail-all-draw0"], runs["finetune-all-draw0"]
    assert tail.more["mode"] == "tail from stage4, all stages"
    assert tail.test.ids == whole.test.ids
    assert tail.trainable_params < whole.trainable_params
    assert [run.more["num_train"] for run in (tail, runs["tail-3-draw0"])] == [30, 9]
    cell, once = tail.more["cell"], report["activations"]["seconds_per_image"]
    assert cell["cost_seconds"] - cell["trial_seconds"] == pytest.approx(once * 30)
    point = report["points"][-1]
    assert point["tail"]["top1"] == tail.test_top1
    assert point["p_value"] is not None
    text = "\n".join(summary_lines(report))
    assert "tail, cached activations" in text
    low, high = point["tail"]["interval"]
    assert (
        f"the tail of the network alone, trained from cached activations, has {tail.test_top1:.3f} "
        f"[{low:.3f}, {high:.3f}] against {whole.test_top1:.3f} for fine-tuning"
    ) in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert compare(config)["points"] == report["points"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").iterdir()}


def test_a_first_tail_is_expected_to_take_no_longer_than_all_layers() -> None:
    budget = Budget(60.0, num_test=10)
    assert budget.estimate("tail", 100, 2) is None
    budget.add("finetune", Pace(passes=200, per_pass=0.1))
    assert budget.estimate("tail", 100, 2) == pytest.approx(20.0)
    budget.add("tail", Pace(passes=200, per_pass=0.01))
    assert budget.estimate("tail", 100, 2) == pytest.approx(2.0)


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
    assert len({run.more["run"] for run in runs.values()}) == 4
    assert report["num_test"] == 18
    assert [point["num_train"] for point in report["points"]] == [9, 30]


def test_pictures_that_change_after_extraction_are_not_trained_on(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(pets, tmp_path / "pets")

    def overwrite() -> None:
        for file in (copy / "train").rglob("0*.png"):
            shutil.copy(copy / "train" / "cat" / "00.png", tmp_path / "one.png")
            file.write_bytes((tmp_path / "one.png").read_bytes())

    monkeypatch.setattr(comparison, "load_optimizers", overwrite)
    with pytest.raises(UserError, match=r"\.png changed during the run: run the same command"):
        compare(settings(copy, tmp_path))
    assert not list((tmp_path / "out" / "runs").glob("finetune-*.json"))


def test_report_is_saved_and_says_what_it_should(done: tuple[CompareConfig, dict]) -> None:
    config, report = done
    saved = json.loads((config.output / "compare.json").read_text())
    assert saved["points"] == report["points"]
    assert len(report["advice"]) == 3
    assert report["left_out"] == []
    assert re.match(r"Extraction runs at \d+ images per second, measured", report["notes"][0])
    assert report["notes"][1].startswith("Sizes with one seed")
    lines = summary_lines(report)
    assert lines[0].startswith("train images")
    words = shlex.split(lines[-1].removeprefix("next: featcache report "))
    page = cli.parse("report", ReportConfig, words)
    # With pictures, and nothing typed that is so anyway.
    assert page == ReportConfig(
        runs=(config.output,), dataset=config.dataset, cache_dir=config.cache_dir
    )
    assert "--data-root" not in words
    assert not (config.output / "work").exists()


def test_a_cell_is_what_the_commands_do(done: tuple[CompareConfig, dict], tmp_path: Path) -> None:
    """All images: the same predictions as train-head and finetune give."""
    config, report = done
    runs = runs_of(config)
    head = TrainHeadConfig(
        cache=Path(report["extractions"]["frozen"]["cache"]), output=tmp_path / "head.safetensors"
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
    monkeypatch.setattr(comparison, "train_and_save", None)
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
    real = comparison.train_and_save

    def record(setup: object, planned: object) -> FinishedRun:
        names.append(planned.name)
        return real(setup, planned)

    monkeypatch.setattr(comparison, "train_and_save", record)
    compare(config)
    return names


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(
    done: tuple[CompareConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copied(done, tmp_path)
    (config.output / "compare.json").unlink()
    (config.output / "runs" / "cached-3-draw0.json").unlink()
    (config.output / "runs" / "finetune-all-draw0.json").write_text('{"half": ')
    damaged = config.output / "runs" / "finetune-3-draw0.json"
    values = json.loads(damaged.read_text())
    damaged.write_text(json.dumps({**values, "epochs": []}))
    assert made(monkeypatch, config) == [
        "finetune-all-draw0", "cached-3-draw0", "finetune-3-draw0",
    ]  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_settings_is_refused_by_name(
    done: tuple[CompareConfig, dict], tmp_path: Path, finished: bool
) -> None:
    config = copied(done, tmp_path)
    # A killed comparison has no compare.json yet, one of version 0.1.0 no settings.json.
    (config.output / ("settings.json" if finished else "compare.json")).unlink()
    with pytest.raises(UserError) as caught:
        compare(dataclasses.replace(config, solver="ridge", lr=0.01))
    assert str(caught.value) == (
        f"{config.output} holds a comparison with different settings (solver logistic there, ridge "
        "here, lr None there, 0.01 here): give another --output"
    )
    compare(dataclasses.replace(config, sizes="3", workers=1))  # goes on
    with pytest.raises(UserError, match=r"\(dataset_name pets\d there, digits here\)"):
        compare(dataclasses.replace(config, dataset="digits"))


def test_two_comparisons_in_one_folder(
    done: tuple[CompareConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copied(done, tmp_path)
    refused = []

    def second(*args: object) -> object:
        with pytest.raises(StorageError, match=r"compare\.json is being written by process") as e:
            compare(config)
        refused.append(e)
        return shared_caches(*args)

    shared_caches = comparison.shared_caches
    monkeypatch.setattr(comparison, "shared_caches", second)
    compare(config)
    assert len(refused) == 1


def test_strangers_in_the_comparisons_folder(
    done: tuple[CompareConfig, dict], tmp_path: Path
) -> None:
    config = dataclasses.replace(done[0], output=tmp_path)
    (tmp_path / "settings.json").write_text('{"editor": "mine"}')
    with pytest.raises(UserError, match=r"settings\.json exists and was not written by"):
        compare(config)


def test_a_device_as_extraction_json_is_passed_over(
    done: tuple[CompareConfig, dict], tmp_path: Path
) -> None:
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("zero.json", "pipe.json"):
        assert _remembered(tmp_path / name, "") is None


def test_what_extraction_takes_is_read_from_the_record_beside_the_cache(
    done: tuple[CompareConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own machine and settings alone; otherwise a sample is measured."""
    cache_dir = shutil.copytree(done[0].cache_dir, tmp_path / "cache")
    config = dataclasses.replace(done[0], cache_dir=cache_dir)
    [path] = cache_dir.glob("*.h5.json")
    record = json.loads(path.read_text())
    found = extraction.shared_caches(config, load_dataset(config), tmp_path)["frozen"]
    assert found.how == "as recorded on this machine when the cache was made"
    assert found.seconds_per_image == record["seconds_total"] / 50
    monkeypatch.setattr(extraction, "_time_sample", lambda *_: (10, 2.0))
    for changes in (
        {"environment": {**record["environment"], "num_cores": -1}},
        {"config": {**record["config"], "workers": 7}},
        {"seconds_total": None},
        {"config": None},
    ):
        (tmp_path / "extraction-frozen.json").unlink(missing_ok=True)
        path.write_text(json.dumps({**record, **changes}))
        found = extraction.shared_caches(config, load_dataset(config), tmp_path)["frozen"]
        assert found.seconds_per_image == 0.2
        assert found.how.startswith("measured on 10 images computed again, as no usable record")


@pytest.mark.slow
def test_no_time_leaves_out_all_but_a_first_run_of_each_mode(pets: Path, tmp_path: Path) -> None:
    report = compare(settings(pets, tmp_path, budget=1e-6, num_seeds=2))
    assert [Path(name).stem for name in report["runs"]] == [
        "cached-all-draw0", "cached-3-draw0", "finetune-3-draw0",
    ]  # fmt: skip
    assert len(report["left_out"]) == 5
    note = report["notes"][-1]
    assert note.startswith("Skipped for lack of time: fine-tune, all (30 images), seed 42 and 4")
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


def test_sizes_take_one_group_after_the_other() -> None:
    ids, labels = [f"{i:03d}" for i in range(60)], np.arange(60) % 3
    groups = [f"g{i // 6}" for i in range(60)]  # two images of each class
    small, large = (nested_rows(ids, labels, n, 1, groups) for n in (2, 5))
    assert set(small) < set(large)
    assert [len({groups[row] for row in rows}) for rows in (small, large)] == [1, 3]
    assert np.bincount(labels[large]).tolist() == [5, 5, 5]


def test_a_class_with_few_images_gives_all_it_has() -> None:
    rows = nested_rows(list("abcdef"), np.array([0, 0, 0, 0, 0, 1]), 3, seed=0)
    assert len(rows) == 4
    assert 5 in rows


def pretend(
    monkeypatch: pytest.MonkeyPatch, config: CompareConfig, seconds: dict[str, float]
) -> tuple[list[str], dict]:
    """Compare where fine-tunes take the given seconds and heads one, whatever was measured."""
    names: list[str] = []
    real = comparison.train_and_save

    def quick(setup: object, planned: object) -> FinishedRun:
        names.append(planned.name)
        return dataclasses.replace(real(setup, planned), spent_seconds=estimate(None, planned))

    def estimate(schedule: object, planned: object) -> float:
        return 1.0 if planned.mode == "cached" else seconds[planned.size]

    monkeypatch.setattr(comparison, "train_and_save", quick)
    monkeypatch.setattr(comparison.Schedule, "estimate", estimate)
    return names, compare(config)


@pytest.mark.slow
def test_the_largest_size_is_made_before_others_use_its_time_up(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(pets, tmp_path, sizes="2,3,all", num_seeds=2, budget=100.0)
    # 6,000 s: all images once, then both small sizes, but no second fine-tune with all.
    names, report = pretend(monkeypatch, config, {"2": 900.0, "3": 1000.0, "all": 2500.0})
    assert [name for name in names if name.startswith("finetune")] == [
        "finetune-all-draw0", "finetune-2-draw0", "finetune-3-draw0", "finetune-2-draw1",
    ]  # fmt: skip
    assert [point["verdict"] == "unmeasured" for point in report["points"]] == [False] * 3
    assert report["left_out"][0]["title"] == "fine-tune, all (30 images), seed 43"


@pytest.mark.slow
def test_what_does_not_fit_makes_room_for_the_largest_that_does(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(pets, tmp_path, sizes="2,3,all", budget=100.0)
    names, _ = pretend(monkeypatch, config, {"2": 900.0, "3": 1000.0, "all": 9000.0})
    assert [n for n in names if n.startswith("finetune")] == [
        "finetune-2-draw0", "finetune-3-draw0",
    ]  # fmt: skip


def test_all_sizes_come_before_second_draws(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path, sizes="2,5,10,500", num_seeds=2)
    labels = np.repeat([0, 1], 10)
    plan = plan_runs(config, [str(i) for i in range(20)], labels, {"cached": {}, "finetune": {}})
    # Ten and five hundred per class are both all there are.
    sizes = ["all", "all", "2", "2", "5", "5"]
    assert [planned.size for planned in plan] == sizes * 2
    assert [planned.draw for planned in plan] == [0] * 6 + [1] * 6
    assert len({planned.key for planned in plan}) == 12


def test_small_sets_get_more_epochs(pets: Path, tmp_path: Path) -> None:
    config = settings(pets, tmp_path, epochs=3, min_steps=60)
    epochs = [finetune_config(config, num, 1).epochs for num in (10, 64, 100, 6400)]
    assert epochs == [60, 30, 15, 3]
    assert finetune_config(config, None, 1).epochs == 3
    assert isinstance(finetune_config(config, 10, 1), FinetuneConfig)


def fake(num_train: int, epochs: list[float], spent: float, **more: object) -> RunReport:
    """A fine-tune scored on 100 images in 2 s, reading in 10 ms an image."""
    cell = {"mode": "finetune", "spent_seconds": spent}
    num_test = 100
    records = [{"seconds": seconds} for seconds in epochs]
    records[-1]["eval_seconds"] = 2.0
    read = 0.01 * (num_train + num_test)
    return RunReport(
        command="finetune", trainable_params=1, test_top1=0.5, test_interval=(0.4, 0.6),
        seconds_total=spent, epochs=records, scored_on="", chosen_on="", config={}, provenance={},
        environment={},
        more={"num_train": num_train, "num_test": num_test, "read_seconds": read, "cell": cell,
              **more},
    )  # fmt: skip


def test_budget_takes_a_run_apart() -> None:
    budget = Budget(100.0, num_test=100)
    assert budget.allows(budget.estimate("finetune", 10**9, 1))  # nothing is known yet
    # 0.1 s a pass; 1.5 s reading, 2 s scoring, 3 s that stay; the first epoch warmed up for 20 s.
    budget.add("finetune", finetune_pace(fake(50, [25.0, 5.0], spent=36.5), 36.5), 36.5)
    assert budget.spent == 36.5
    assert budget.estimate("finetune", 50, 2) == pytest.approx(16.5)
    # 400 images for 3 epochs: 120 s; 5 s reading, 2 s scoring, 3 s.
    assert budget.estimate("finetune", 400, 3) == pytest.approx(130.0)
    assert not budget.allows(130.0)
    assert budget.allows(63.5)
    assert budget.estimate("cached", 600, 1) is None


def test_a_slow_start_does_not_multiply_the_estimate() -> None:
    """10,000 passes after a small run most of whose epochs shared the machine: 10 s, not 50."""
    small = fake(50, [0.25, 0.05, 0.25, 0.25], spent=4.3)
    assert finetune_pace(small, 4.3).seconds(2000, 5, 100) == pytest.approx(10.0 + 23.0)


def test_the_linear_probe_passes_over_every_train_image() -> None:
    without, with_probe = (
        finetune_pace(fake(50, [5.0], spent=10.0, probe=probe), 10.0) for probe in ({}, {"C": 1.0})
    )
    assert with_probe.per_train - without.per_train == pytest.approx(2.0 / 100)
    assert without.seconds(50, 1, 100) == with_probe.seconds(50, 1, 100) == pytest.approx(10.0)


def test_the_run_nearest_in_length_tells() -> None:
    budget = Budget(100.0, num_test=100)
    budget.add("finetune", finetune_pace(fake(50, [5.0], spent=8.5), 8.5))
    budget.add(
        "finetune", finetune_pace(fake(1000, [50.0], spent=63.0), 63.0)
    )  # larger batches are twice as fast
    assert budget.estimate("finetune", 60, 1) == pytest.approx(6.0 + 0.6 + 1 + 2, abs=0.1)
    assert budget.estimate("finetune", 900, 1) == pytest.approx(45 + 9 + 1 + 2, abs=0.1)


@pytest.mark.parametrize("sizes", ["", "5,,all", "0,5", "five", "5 20", "1e3", "5,-1"])
def test_sizes_that_make_no_sense(sizes: str) -> None:
    with pytest.raises(UserError, match=r"sizes .* for example 5,20,50,all"):
        CompareConfig(dataset="digits", sizes=sizes)


def test_sizes_are_sorted_and_taken_once() -> None:
    config = CompareConfig(dataset="digits", sizes="all, 50,5,5")
    assert config.wanted_sizes() == (5, 50, None)


@pytest.fixture(scope="module")
def everything(
    pets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompareConfig, dict, Path]:
    """The default choice of features, and a second test set."""
    tmp_path = tmp_path_factory.mktemp("everything")
    elsewhere = shutil.copytree(pets / "test", tmp_path / "elsewhere")
    shutil.copy(pets / "train" / "dog" / "00.png", elsewhere / "dog" / "known.png")
    shutil.rmtree(elsewhere / "eel")
    config = settings(
        pets,
        tmp_path,
        layers="auto",
        batchnorm="auto",
        sizes="all",
        solver="ridge",
        test_shifted=elsewhere,
    )
    return config, compare(config), elsewhere


def test_held_out_train_images_choose_the_network(
    everything: tuple[CompareConfig, dict, Path],
) -> None:
    config, report, _ = everything
    run = runs_of(config)["cached-all-draw0"]
    alternatives = run.more["alternatives"]
    assert len(alternatives) == 2
    assert run.more["features"] in [each["features"] for each in alternatives]
    assert run.more["val_top1"] == max(each["val_top1"] for each in alternatives)
    assert "adapted BatchNorm" in alternatives[1]["features"]
    [point] = report["points"]
    assert point["cached"]["features"] == {run.more["features"]: 1}
    held_out = {each["features"]: each["val_top1"] for each in alternatives}
    assert point["cached"]["held_out"] == held_out
    assert run.more["features"] in next(line for line in report["advice"] if "held-out" in line)


def test_both_extractions_and_fits_count(everything: tuple[CompareConfig, dict, Path]) -> None:
    config, report, _ = everything
    assert list(report["extractions"]) == ["frozen", "adapt"]
    per_image = sum(each["seconds_per_image"] for each in report["extractions"].values())
    run = runs_of(config)["cached-all-draw0"]
    fits = sum(each["fit_seconds"] for each in run.more["alternatives"])
    [point] = report["points"]
    assert point["cached"]["trial_seconds"] == pytest.approx(fits)
    assert point["cached"]["cost_seconds"] == pytest.approx(fits + 30 * per_image)
    assert report["spent_seconds"] >= sum(
        each["spent_seconds"] for each in report["extractions"].values()
    )


def test_both_modes_are_scored_on_the_second_test_set(
    everything: tuple[CompareConfig, dict, Path],
) -> None:
    config, report, _ = everything
    assert report["shifted"]["num_images"] == 13  # two classes, the damaged image left out
    assert report["shifted"]["dataset"] == "elsewhere"
    runs = runs_of(config)
    [point] = report["points"]
    for mode in ("cached", "finetune"):
        found = runs[f"{mode}-all-draw0"].more["shifted"]
        right = np.array(found["labels"]) == np.array(found["predicted"])
        assert point[mode]["shifted_top1"] == found["test_top1"] == right.mean()
        home = runs[f"{mode}-all-draw0"].test
        known = dict(
            zip((name.removeprefix("test/") for name in home.ids), home.predicted, strict=True)
        )
        names = sorted(p for p in known if not p.startswith("eel"))
        # The same images get the same answers, whichever test set they are in.
        ids = sorted([*names, "dog/known.png"])
        answers = dict(zip(ids, found["predicted"], strict=True))
        assert [answers[name] for name in names] == [known[name] for name in names]
    assert any("second, shifted test set (13 images)" in line for line in report["advice"])
    assert "1 images of the second test set are train images too: remove" in " ".join(
        report["notes"]
    )
    assert "cached head, shifted" in "\n".join(summary_lines(report))


def test_the_second_test_set_is_not_another_run_of_the_first(
    everything: tuple[CompareConfig, dict, Path], tmp_path: Path
) -> None:
    config, _, _ = everything
    shutil.copytree(config.output, tmp_path / "out")
    beyond = shutil.copytree(config.test_shifted, tmp_path / "beyond")
    other = dataclasses.replace(config, output=tmp_path / "out", test_shifted=beyond)
    with pytest.raises(UserError, match=r"test_shifted elsewhere there, beyond here"):
        compare(other)


def test_a_second_test_set_that_does_not_fit(pets: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            compare(settings(pets, tmp_path, test_shifted=folder))
        return str(caught.value)

    missing = tmp_path / "missing"
    assert refused(missing) == (
        f"--test-shifted: there is no folder {missing}: give a folder of class folders"
    )
    assert refused(pets) == (
        f"--test-shifted: {pets} has the folders test, train, not class folders: give one of them, "
        f"for example {pets / 'test'}"
    )
    other = tmp_path / "other"
    shutil.copytree(pets / "test" / "dog", other / "Dog")
    assert refused(other) == (
        f"--test-shifted: {other} has class folders that are not among the classes of train: "
        "'Dog' ('Dog' and 'dog' (they differ only in case or spaces)); rename or remove them"
    )


def test_the_images_are_looked_up_once(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    listed: list[object] = []
    load_folder = datasets.load_folder
    monkeypatch.setattr(
        datasets, "load_folder", lambda *args: (listed.append(args), load_folder(*args))[1]
    )
    monkeypatch.setattr(comparison, "_compare", lambda setup, start: setup)
    config = settings(root, tmp_path, batchnorm="auto", tail="stage4")
    setup = compare(config)
    assert list(setup.extractions) == ["frozen", "adapt"]
    assert setup.tail is not None
    assert len(listed) == 1
    assert capsys.readouterr().err.count("ignored files of other kinds") == 1


def test_a_second_network_that_takes_too_long_is_left_out(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(pets, tmp_path, batchnorm="auto", budget=1e-6)
    found = extraction.shared_caches(config, load_dataset(config), tmp_path)
    assert list(found) == ["frozen"]
    assert "leaving out adapted BatchNorm statistics: their features would take" in (
        capsys.readouterr().err
    )


def test_a_network_without_batchnorm_is_not_adapted(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(pets, tmp_path, batchnorm="auto", backbone="squeezenet1_1")
    assert list(extraction.shared_caches(config, load_dataset(config), tmp_path)) == ["frozen"]
    assert "squeezenet1_1 has no BatchNorm layers" in capsys.readouterr().err
    adapted = dataclasses.replace(config, batchnorm="adapt")
    with pytest.raises(UserError, match="squeezenet1_1 has no BatchNorm layers"):
        extraction.shared_caches(adapted, load_dataset(config), tmp_path)

"""The benchmark script: what it compares, prints and writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from conftest import REPO
from data_helpers import make_pets
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import train_head
from featcache.results import Predictions, Row, RunReport, benchmark_rows
from featcache.results.advice import advice
from featcache.results.metrics import wilson_interval


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", REPO / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, int]:
    """One whole run on a few pictures: where its files are, its JSON, its exit code."""
    where = tmp_path_factory.mktemp("benchmark")
    pets = make_pets(where / "pets")
    words = f"{pets} --weights bundled --image-px 32 --epochs 2 --batch-size 8 --workers 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        code = script.main(words.split())
    folder = where / "cache" / "benchmark-pets"
    return folder, json.loads((folder / "benchmark.json").read_text()), code


class TestRun:
    def test_modes(self, script: ModuleType, ran: tuple[Path, dict, int]) -> None:
        _, result, code = ran
        assert code == 0
        assert [row["mode"] for row in result["rows"]] == [
            script.LOOP,
            script.CACHED,
            script.DEFAULT_HEAD,
            script.STAGES_HEAD,
            "full fine-tune (lr 0.001)",
            "full fine-tune (lr 0.0001)",
            script.GOOD_TUNE,
            script.TAIL,
        ]
        wanted = {
            "mode", "trainable_params", "test_top1", "seconds_total", "seconds_per_epoch",
            "images_per_s",
        }  # fmt: skip
        assert all(wanted <= row.keys() for row in result["rows"])
        params = [row["trainable_params"] for row in result["rows"]]
        assert params.pop(3) in (1539, 3 * 1921)
        assert params == [1539] * 3 + [11178051] * 3 + [8_393_728 + 3 * 1921]
        # train-head's default has no epochs, the good recipe has five, or four for this tail.
        assert [len(row["epochs"]) for row in result["rows"]] == [2, 2, 0, 0, 2, 2, 5, 4]
        assert [len(row["points"]) for row in result["rows"]] == [2, 2, 1, 1, 2, 2, 5, 4]

    def test_rows_refer_to_their_runs_by_id(self, ran: tuple[Path, dict, int]) -> None:
        folder, result, _ = ran
        stems = ["head-in-loop", "cached-head", "default-head", "finetune-0.001",
                 "finetune-0.0001", "finetune-good", "finetune-tail"]  # fmt: skip
        ids = [json.loads((folder / f"{stem}.json").read_text())["run"] for stem in stems]
        runs = [row["run"] for row in result["rows"]]
        best = json.loads((folder / "stages-head.json").read_text())
        assert runs.pop(3) == best["run"]
        assert len(best["alternatives"]) == 2
        assert runs == ids
        assert len(set(ids)) == 7
        assert all(re.fullmatch("[0-9a-f]{16}", run) for run in ids)

    def test_the_default_head_is_what_train_head_fits(
        self, ran: tuple[Path, dict, int], tmp_path: Path
    ) -> None:
        folder, result, _ = ran
        cache, output = folder / "features.h5", tmp_path / "head.safetensors"
        report = train_head(TrainHeadConfig(cache=cache, output=output))
        assert result["rows"][2]["test_top1"] == report["test_top1"]
        kept = json.loads((folder / "default-head.json").read_text())
        assert kept["chosen"] == report["chosen"]

    def test_cached_and_uncached_are_the_same_head(self, ran: tuple[Path, dict, int]) -> None:
        _, result, _ = ran
        loop, cached = result["rows"][:2]
        assert loop["test_top1"] == cached["test_top1"]
        assert loop["balanced_top1"] == cached["balanced_top1"]
        assert [e["train_loss"] for e in loop["epochs"]] == pytest.approx(
            [e["train_loss"] for e in cached["epochs"]], rel=1e-4
        )
        assert result["same_predictions"] == 12

    def test_extraction_is_in_the_total_and_shown_apart(self, ran: tuple[Path, dict, int]) -> None:
        loop, cached, default = ran[1]["rows"][:3]
        assert loop["extract_seconds"] == 0
        assert default["extract_seconds"] == cached["extract_seconds"]
        assert 0 < cached["extract_seconds"] < cached["seconds_total"]
        assert cached["points"][0][0] > cached["extract_seconds"]
        assert cached["later_seconds"] == pytest.approx(
            cached["seconds_total"] - cached["extract_seconds"]
        )

    def test_what_follows(self, ran: tuple[Path, dict, int]) -> None:
        _, result, _ = ran
        assert len(result["advice"]) == 3
        by_mode = {row["mode"]: row for row in result["rows"]}
        assert set(result["speedup"]) == {
            m for m, r in by_mode.items() if r["approach"] != "cached"
        }
        for kind, mode in result["best"].items():
            tops = [row["test_top1"] for row in result["rows"] if row["approach"] == kind]
            assert by_mode[mode]["test_top1"] == max(tops)
        assert set(result["p_values"]) == by_mode.keys() - {result["best"]["cached"]}
        assert result["baseline_top1"] == pytest.approx(1 / 3)
        assert set(result["break_even"]) == {"epochs", "trials"}
        assert "torch" in result["environment"]
        assert "were trained at 64 px and are used at 32 px" in result["notes"][-1]

    def test_files(self, ran: tuple[Path, dict, int]) -> None:
        folder, result, _ = ran
        page = (folder / "benchmark.md").read_text()
        assert "| mode | trainable parameters |" in page
        assert "](benchmark.png)" in page
        assert result["advice"][0] in page
        with Image.open(folder / "benchmark.png") as picture:
            assert picture.size == (1600, 1000)
        assert (folder / "features.h5").exists()


@pytest.mark.slow
def test_digits_advice_compares_the_head_that_train_head_fits(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads are real; a fine-tune with two mistakes, as measured, is made up."""

    def only_heads(settings: object) -> RunReport:
        if isinstance(settings, TrainHeadConfig):
            return real(settings)
        head = RunReport.load(tmp_path / "out" / "cached-head.json")
        test = head.test
        predicted = [(y + (i < 2)) % 10 for i, y in enumerate(test.labels)]
        num = len(predicted)
        return dataclasses.replace(
            head, command="finetune", test_top1=1 - 2 / num,
            test_interval=wilson_interval(num - 2, num), seconds_total=45.0,
            test=Predictions(
                ids=test.ids, labels=test.labels, predicted=predicted, confidence=test.confidence
            ),
        )  # fmt: skip

    real = script.run_training
    config = script.BenchmarkConfig(output=tmp_path / "out", cache_dir=tmp_path / "cache")
    modes = [m for m in script.plan_modes(config) if m[1] != "loop"]
    monkeypatch.setattr(script, "plan_modes", lambda _: modes)
    monkeypatch.setattr(script, "run_training", only_heads)
    ran = script.run_modes(config)
    heads = {mode: run.test_top1 for mode, kind, run, _ in ran if kind == "cached"}
    assert heads[script.CACHED] == pytest.approx(0.822, abs=0.005)
    assert heads[script.DEFAULT_HEAD] == pytest.approx(0.981, abs=0.005)
    rows = benchmark_rows(ran)
    said = advice(rows, script.p_values(ran))
    assert heads[script.STAGES_HEAD] == pytest.approx(0.997, abs=0.005)
    assert said[1].startswith(
        f"No clear winner on accuracy: {script.STAGES_HEAD} has {heads[script.STAGES_HEAD]:.3f} "
        "against 0.994 for full fine-tune"
    )
    assert said[2].startswith("Pick the cached head here: it takes less time")


class TestOutput:
    def result(self, script: ModuleType) -> dict:
        return {
            "same_predictions": 499,
            "break_even": {"epochs": 2, "trials": 1},
            "advice": ["Faster: x."],
        }

    def row(self, **changes: object) -> Row:
        values = {
            "mode": "m", "approach": "loop", "trainable_params": 1, "test_top1": 0.5,
            "test_interval": (0.4, 0.6), "num_test": 500, "seconds_total": 20.0,
            "seconds_per_epoch": 5.0, "eval_seconds_per_epoch": 1.0, "images_per_s": 1.0,
            "num_epochs": 3,
        }  # fmt: skip
        return Row(**{**values, **changes})

    def cached(self) -> Row:
        return self.row(
            approach="cached", seconds_total=14.0, extract_seconds=11.0, seconds_per_epoch=0.4,
            eval_seconds_per_epoch=0.1,
        )  # fmt: skip

    def test_break_even_counts_everything_that_an_epoch_costs(self, script: ModuleType) -> None:
        # In the loop: 2 s once and 6 s an epoch; cached: 12.5 s once and 0.5 s an epoch.
        # After one epoch 13 > 8, after two 13.5 < 14. A second run costs 3 s instead of 20.
        assert script.break_even([self.row(), self.cached()]) == {"epochs": 2, "trials": 1}

    def test_reading(self, script: ModuleType) -> None:
        lines = script.reading(self.result(script), [self.row(), self.cached()])
        assert lines == [
            "The cache pays for itself after 2 epochs of one run, or after 1 run of 3 epochs.",
            "Cached and uncached heads give the same answer on 499 of 500 test images.",
            "",
            "Faster: x.",
        ]

    def test_reading_when_it_never_pays(self, script: ModuleType) -> None:
        result = self.result(script) | {"break_even": {"epochs": None, "trials": None}}
        assert "does not pay" in script.reading(result, [self.row(), self.cached()])[0]


class TestSettings:
    def test_defaults(self, script: ModuleType) -> None:
        config = script.BenchmarkConfig()
        assert (config.dataset, config.chosen_weights, config.flips) == ("digits", "bundled", False)
        assert config.folder == Path("cache/benchmark-digits")
        assert config.finetune_config().lr == config.notebook_head().lr == 1e-3
        other = script.BenchmarkConfig(dataset="some/Where")
        assert (other.chosen_weights, other.flips) == ("imagenet", True)
        assert other.extract_config().views == "flip"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["digit"], "no dataset 'digit'; did you mean digits"),
            (["--epochs", "0"], "--epochs 0 is out of range"),
            (["--lr", "-1"], "--lr -1.0 is out of range"),
            (["--lerning-rate", "1"], "--lerning-rate"),
        ],
    )
    def test_mistakes_end_in_one_line(
        self,
        script: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        words: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert script.main(words) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert line.startswith("benchmark: ")
        assert message in line

    def test_a_bad_value_is_refused_when_built(self, script: ModuleType) -> None:
        with pytest.raises(UserError, match="image_px 1 is out of range"):
            script.BenchmarkConfig(image_px=1)

    def test_an_interrupt_ends_with_130(
        self,
        script: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        def interrupted(config: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(script, "warm_up", interrupted)
        with pytest.raises(SystemExit) as stop:
            script.main([])
        assert stop.value.code == 130
        assert capfd.readouterr().err.startswith("benchmark: interrupted")

"""Training the tail from cached activations is training it in the loop, less the frozen passes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import featcache.finetune.training as run_module
from data_helpers import SIDE, make_pets
from featcache.backbone import build_classifier
from featcache.cache import CacheWriter, FeatureCache
from featcache.config import (
    ExtractConfig,
    FinetuneConfig,
    InfoConfig,
    TrainHeadConfig,
    VerifyConfig,
)
from featcache.data import ImageSplit, load_dataset
from featcache.errors import UserError
from featcache.extract import check, extract, inspect, inspect_lines, summary_lines
from featcache.finetune import finetune, finetune_report
from featcache.finetune import summary_lines as finetune_lines
from featcache.finetune.activations import extraction_config
from featcache.finetune.trainable import resolve_recipe
from featcache.heads import train_head
from featcache.predict import Classifier
from featcache.results import RunReport, benchmark_rows
from featcache.tensor_files import model_card, read_tensor_file, write_model


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 33 train images (one more than a batch) and 12 test images."""
    return make_pets(tmp_path_factory.mktemp("pets"))


def settings(dataset: Path, where: Path, **changes: object) -> FinetuneConfig:
    values = {
        "dataset": str(dataset),
        "cache_dir": where / "cache",
        "weights": "bundled",
        "image_px": SIDE,
        "resize": "squash",
        "epochs": 2,
        "lr": 1e-3,
        "bn_eval": True,
        "workers": 1,
        "device": "cpu",
        "output": where / "model.safetensors",
    }
    return FinetuneConfig(**{**values, **changes})


def tensors_of(report: dict) -> dict[str, torch.Tensor]:
    return read_tensor_file(Path(report["model"])).tensors()


@pytest.fixture(scope="module")
def tail(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneConfig, dict]:
    """One run from layer4 of ResNet18, shared by tests that only look."""
    config = settings(pets, tmp_path_factory.mktemp("tail"), from_stage="layer4")
    return config, finetune(config)


def interrupt_second_epoch(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a run, and press Ctrl-C as its second epoch begins."""
    train_epoch = run_module.train_epoch

    def stop_at_second(*args: object) -> object:
        if args[-1] == 1:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train_epoch", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)


class TestEqualsTheLoop:
    @pytest.mark.parametrize(
        ("from_stage", "changes"),
        [
            ("layer4", {"unfreeze": "layer4", "optimizer": "sgd"}),
            (
                "stage4",
                {
                    "unfreeze": "stage4,conv5",
                    "recipe": "good",
                    "backbone_lr": 3e-4,
                    "backbone": "shufflenet_v2_x0_5",
                    "weights": "random",
                },
            ),
            pytest.param(
                "layer3",
                {
                    "unfreeze": "layer3,layer4",
                    "bn_eval": False,
                    "batch_size": 11,
                    "flip": False,
                    "optimizer": "sgd",
                },
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_weights_after_several_steps(
        self, pets: Path, tmp_path: Path, from_stage: str, changes: dict
    ) -> None:
        in_loop = settings(pets, tmp_path, **changes)
        again = {"unfreeze": None, "output": tmp_path / "tail.safetensors", "dtype": "float32"}
        cached = dataclasses.replace(in_loop, from_stage=from_stage, **again)
        one, two = finetune(in_loop), finetune(cached)
        before = build_classifier(in_loop, 3, in_loop.seed).state_dict()
        loop, ours = tensors_of(one), tensors_of(two)
        assert loop.keys() == ours.keys()
        moved = [name for name in ours if not torch.equal(ours[name], before[name])]
        assert {name for name in loop if not torch.equal(loop[name], before[name])} == {*moved}
        assert all(name.startswith((*changes["unfreeze"].split(","), "fc")) for name in moved)
        # Adam's steps are as long for the smallest gradients, which are mostly rounding.
        limit = 3e-4 if changes.get("optimizer") == "sgd" else 2e-2
        far = {}
        for name in moved:
            step = (loop[name] - before[name]).float()
            far[name] = float((ours[name] - loop[name]).float().norm() / step.norm())
        assert {name: error for name, error in far.items() if error > limit} == {}
        assert one["trainable_params"] == two["trainable_params"]
        losses = [[e["train_loss"] for e in report["epochs"]] for report in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)

    def test_float16_moves_the_loss_little(
        self, pets: Path, tmp_path: Path, tail: tuple[FinetuneConfig, dict]
    ) -> None:
        exact = dataclasses.replace(tail[0], dtype="float32", output=tmp_path / "m.safetensors")
        losses = [[e["train_loss"] for e in r["epochs"]] for r in (tail[1], finetune(exact))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert losses[0] != losses[1]


def read_pixels(split: ImageSplit, row: int) -> torch.Tensor:
    """An image's pixels as float32 [3, H, W]."""
    with split.decoded(split.read(row)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def cache(tail: tuple[FinetuneConfig, dict]) -> Path:
    return Path(tail[1]["activations"]["cache"])


class TestCache:
    def test_the_rows_are_the_stages_input(
        self, tail: tuple[FinetuneConfig, dict], cache: Path
    ) -> None:
        config, _ = tail
        network = build_classifier(config, 3, config.seed).eval()
        train = FeatureCache(cache).split("train")
        assert (train.num_views, train.dim, train.X.dtype) == (2, 256 * 2 * 2, "float16")
        images = load_dataset(config).splits["train"]
        pixels = torch.stack([read_pixels(images, row) for row in range(3)])
        prep = FeatureCache(cache).meta.backbone.preprocessing
        mean, std = (torch.tensor(v)[:, None, None] for v in (prep.mean, prep.std))
        for view, shown in enumerate((pixels, pixels.flip(3))):
            x = (shown / 255 - mean) / std
            with torch.inference_mode():
                x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
                maps = network.layer3(network.layer2(network.layer1(x)))
            got = torch.from_numpy(train.take([0, 1, 2], view).astype("float32"))
            assert torch.allclose(got, maps.flatten(1), rtol=2e-3, atol=1e-3)

    def test_what_info_and_verify_say(self, cache: Path) -> None:
        text = "\n".join(inspect_lines(inspect(InfoConfig(cache=cache))))
        assert (
            "rows       the input of layer4 (256 × 2 × 2, float16) of 2 views of every image, "
            "for finetune --from-stage"
        ) in text
        assert check(VerifyConfig(cache=cache))["ok"]

    def test_repair(self, tail: tuple[FinetuneConfig, dict], cache: Path, tmp_path: Path) -> None:
        damaged = Path(shutil.copy(cache, tmp_path / "damaged.h5"))
        extent = FeatureCache(cache).file.layout.extents["train/features"]
        with damaged.open("r+b") as file:
            file.seek(extent.offset + 10)
            file.write(b"\x11\x22")
        config = VerifyConfig(cache=damaged, repair=True, dataset=tail[0].dataset)
        assert check(config)["num_repaired"] == 33
        assert damaged.read_bytes() == cache.read_bytes()

    def test_heads_refuse_it(self, cache: Path) -> None:
        with pytest.raises(UserError) as caught:
            train_head(TrainHeadConfig(cache=cache))
        assert str(caught.value) == (
            f"{cache} holds the input of layer4, not features: type featcache finetune DATASET "
            "--from-stage layer4 to train on it, or extract-features without --from-stage for a "
            "cache that heads can use"
        )

    def test_extract_features_makes_the_same(
        self, tail: tuple[FinetuneConfig, dict], cache: Path
    ) -> None:
        report = extract(extraction_config(tail[0], flip=True))
        assert (report["hit"], report["cache"]) == (True, str(cache))
        lines = summary_lines(report)
        assert "input of layer4, 24 px" in lines[0]
        assert lines[-1] == "next: finetune with the same settings and --from-stage layer4"

    def test_its_size_is_said_before_it_is_written(
        self, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        extract(extraction_config(settings(pets, tmp_path, from_stage="layer3"), flip=False))
        assert "caching the input of layer3 (128 × 3 × 3, float16) of every image, 0.1 MB: " in (
            capsys.readouterr().err
        )

    def test_no_room(self, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = settings(pets, tmp_path, from_stage="layer4")
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
            with pytest.raises(UserError, match=r"no room for .*\.part: it needs \d+ bytes, 1000"):
                finetune(config)
        assert not [*config.cache_dir.glob("*.h5"), *config.cache_dir.glob("*.part")]

    def test_a_row_that_is_too_long(self, tmp_path: Path, pets: Path) -> None:
        config = settings(pets, tmp_path, image_px=520, from_stage="layer2")
        with pytest.raises(
            UserError,
            match=r"^--from-stage layer2: its input is 1,081,600 numbers an image, a cache "
            r"holds 1,048,576: give a later stage or a smaller --image-px$",
        ):
            extract(extraction_config(config, flip=False))


@pytest.fixture(scope="module")
def wide(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneConfig, dict]:
    """One run from layer4 with a head on all stages."""
    where = tmp_path_factory.mktemp("wide")
    config = settings(pets, where, from_stage="layer4", layers="stages", lr=None)
    return config, finetune(config)


class TestAllStages:
    def test_report(self, wide: tuple[FinetuneConfig, dict]) -> None:
        _, report = wide
        assert report["mode"] == "tail from layer4, all stages"
        assert report["trainable_params"] == 8_393_728 + 3 * 1921
        assert report["activations"]["num_columns"] == 2 * (64 + 128 + 256)
        assert report["recipe"]["all_stages"]
        assert (report["recipe"]["lr"], report["recipe"]["backbone_lr"]) == (2e-4, 2e-4)
        assert report["provenance"]["backbone"]["feature_dim"] == 1920

    def test_rows_go_on_with_the_columns_of_the_stages_before(
        self, wide: tuple[FinetuneConfig, dict]
    ) -> None:
        config, report = wide
        cache = FeatureCache(report["activations"]["cache"])
        rows = cache.split("train")
        assert rows.dim == 256 * 2 * 2 + 896
        other = extraction_config(config, flip=True)
        stages = extract(dataclasses.replace(other, from_stage=None))
        columns = FeatureCache(stages["cache"]).split("train")
        early = columns.take(np.arange(33), np.ones(33, np.int64))[:, :896]
        ours = rows.take(np.arange(33), np.ones(33, np.int64))[:, -896:]
        assert np.allclose(ours.astype(float), early.astype(float), rtol=2e-3, atol=1e-4)
        text = "\n".join(inspect_lines(inspect(InfoConfig(cache=cache.path))))
        assert (
            "rows       the input of layer4 (256 × 2 × 2, float16) and 896 columns of the stages "
            "before of 2 views of every image, for finetune --from-stage"
        ) in text

    def test_repair(self, wide: tuple[FinetuneConfig, dict], tmp_path: Path) -> None:
        config, report = wide
        cache = Path(report["activations"]["cache"])
        damaged = Path(shutil.copy(cache, tmp_path / "damaged.h5"))
        extent = FeatureCache(cache).file.layout.extents["train/features"]
        with damaged.open("r+b") as file:
            file.seek(extent.offset + 10)
            file.write(b"\x11\x22")
        repair = VerifyConfig(cache=damaged, repair=True, dataset=config.dataset)
        assert check(repair)["num_repaired"] == 33
        assert damaged.read_bytes() == cache.read_bytes()

    def test_the_model_predicts_what_was_scored(self, wide: tuple[FinetuneConfig, dict]) -> None:
        config, _ = wide
        saved = RunReport.load(config.output.with_suffix(".json"))
        classifier = Classifier.load(config.output)
        assert classifier.trained.describe() == f"fine-tuned resnet18, {SIDE} px squash"
        images = [Path(config.dataset) / name for name in saved.test.ids]
        found = classifier.predict(images)
        names = [classifier.class_names[number] for number in saved.test.predicted]
        assert [prediction.label for prediction in found] == names
        confidence = [prediction.probability for prediction in found]
        assert confidence == pytest.approx(saved.test.confidence, abs=5e-3)
        assert classifier.features(images).shape == (12, 1920)

    def test_the_model_serves_as_weights(
        self, wide: tuple[FinetuneConfig, dict], pets: Path, tmp_path: Path
    ) -> None:
        config, _ = wide
        names = {"dataset": str(pets), "weights": str(config.output), "cache_dir": tmp_path}
        report = extract(ExtractConfig(**names, layers="stages", device="cpu"))
        rows = FeatureCache(report["cache"]).split("test")
        images = [pets / name for name in rows.ids]
        features = Classifier.load(config.output).features(images)
        assert np.allclose(np.asarray(rows.X, np.float32), features, rtol=2e-3, atol=1e-4)

    def test_a_model_of_another_width_is_damaged(
        self, wide: tuple[FinetuneConfig, dict], tmp_path: Path
    ) -> None:
        card, stated = model_card(read_tensor_file(wide[0].output)), tensors_of(wide[1])
        assert card.stages is not None
        fewer = card.stages.of_layers(["layer4", "last"])
        path = tmp_path / "model.safetensors"
        write_model(path, stated, dataclasses.replace(card, stages=fewer))
        with pytest.raises(UserError, match="is a damaged model, its tensors are not those of a"):
            Classifier.load(path)

    def test_interrupted_it_ends_the_same(
        self,
        wide: tuple[FinetuneConfig, dict],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = dataclasses.replace(wide[0], output=tmp_path / "m.safetensors")
        interrupt_second_epoch(config, monkeypatch)
        report = finetune(config)
        assert report["num_resumed_epochs"] == 1
        ours, whole = tensors_of(report), tensors_of(wide[1])
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
        assert finetune(wide[0])["hit"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"from_stage": None}, r"layers=.stages. needs from_stage and recipe=.good.:"),
            ({"recipe": "notebook"}, r"layers=.stages. needs from_stage and recipe=.good.:"),
            ({"init_head": Path("head.safetensors")}, "leave init_head out"),
        ],
    )
    def test_what_it_needs(
        self, pets: Path, tmp_path: Path, changes: dict[str, object], message: str
    ) -> None:
        values = {"from_stage": "layer4", "layers": "stages", **changes}
        with pytest.raises(UserError, match=message):
            settings(pets, tmp_path, **values)


class TestRun:
    def test_report(self, tail: tuple[FinetuneConfig, dict], cache: Path) -> None:
        _, report = tail
        assert report["mode"] == "tail from layer4"
        assert report["trainable_params"] == 8_393_728 + 3 * 513
        said = report["activations"]
        assert (said["stage"], said["shape"], said["num_views"]) == ("layer4", [256, 2, 2], 2)
        assert (said["hit"], said["num_bytes"]) == (False, cache.stat().st_size)
        assert report["provenance"]["cache"] == cache.name
        assert report["seconds_total"] > said["extract_seconds"] > 0
        assert report["recipe"]["from_stage"] == "layer4"
        text = "\n".join(finetune_lines(report))
        assert "8,395,267 trainable parameters (tail from layer4)" in text
        assert f"{said['extract_seconds']:.1f} s of it once for the activations" in text

    def test_the_extraction_counts_in_later_runs_too(
        self, tail: tuple[FinetuneConfig, dict], tmp_path: Path
    ) -> None:
        config = dataclasses.replace(tail[0], seed=1, output=tmp_path / "other.safetensors")
        run = finetune_report(config)
        said = run.more["activations"]
        assert said["hit"]
        assert said["extract_seconds"] == tail[1]["activations"]["extract_seconds"]
        row = benchmark_rows([("tail", "finetune", run, 0.0)])[0]
        assert row.extract_seconds == said["extract_seconds"]
        spent = sum(e["seconds"] + e["eval_seconds"] for e in run.epochs)
        assert row.later_seconds == pytest.approx(run.seconds_total - row.extract_seconds)
        assert row.later_seconds > spent

    def test_the_model_is_a_fine_tuned_one(self, tail: tuple[FinetuneConfig, dict]) -> None:
        config, _ = tail
        card = model_card(read_tensor_file(config.output))
        assert card.class_names == ["cat", "dog", "eel"]
        saved = RunReport.load(config.output.with_suffix(".json"))
        images = [Path(config.dataset) / name for name in saved.test.ids]
        found = Classifier.load(config.output).predict(images)
        names = [card.class_names[number] for number in saved.test.predicted]
        assert [prediction.label for prediction in found] == names
        confidence = [prediction.probability for prediction in found]
        assert confidence == pytest.approx(saved.test.confidence, abs=5e-3)

    def test_a_finished_run_is_a_hit(self, tail: tuple[FinetuneConfig, dict]) -> None:
        again = finetune(tail[0])
        assert again["hit"]
        assert again["test_top1"] == tail[1]["test_top1"]

    def test_interrupted_anywhere_it_ends_the_same(
        self,
        tail: tuple[FinetuneConfig, dict],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = dataclasses.replace(
            tail[0], cache_dir=tmp_path / "cache", output=tmp_path / "m.safetensors"
        )
        write = CacheWriter.write_block

        def stop_at_test(writer: CacheWriter, split: str, *block: object) -> None:
            if split == "test":
                raise KeyboardInterrupt
            write(writer, split, *block)

        with monkeypatch.context() as patched:
            patched.setattr(CacheWriter, "write_block", stop_at_test)
            with pytest.raises(KeyboardInterrupt):
                finetune(config)
        assert len(list(config.cache_dir.glob("*.h5.part"))) == 1
        interrupt_second_epoch(config, monkeypatch)
        report = finetune(config)
        assert report["num_resumed_epochs"] == 1
        ours, whole = tensors_of(report), tensors_of(tail[1])
        assert all(torch.equal(ours[name], whole[name]) for name in whole)

    @pytest.mark.slow
    def test_pictures_that_cannot_be_read(self, pets: Path, tmp_path: Path) -> None:
        root = shutil.copytree(pets, tmp_path / "damaged")
        (root / "train" / "cat" / "05.png").write_bytes(b"no picture")
        config = settings(root, tmp_path, from_stage="layer4", epochs=1, dtype="float32")
        with pytest.raises(UserError, match=r"train/cat/05\.png in split train: "):
            finetune(config)
        skipping = dataclasses.replace(config, on_error="skip")
        report = finetune(skipping)
        assert (report["num_train"], report["num_skipped"]) == (32, {"train": 1, "test": 0})
        loop = dataclasses.replace(
            skipping, from_stage=None, unfreeze="layer4", output=tmp_path / "loop.safetensors"
        )
        loss = finetune(loop)["epochs"][0]["train_loss"]
        assert report["epochs"][0]["train_loss"] == pytest.approx(loss, rel=1e-3)

    def test_early_stopping_holds_out_cached_rows(self, pets: Path, tmp_path: Path) -> None:
        report = finetune(settings(pets, tmp_path, from_stage="layer4", patience=1, holdout=0.3))
        assert report["num_train"] == 33 - 10
        assert report["chosen_on"] == "a held-out part of train (10 images) chose the epoch"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"from_stage": "layer5"}, "--from-stage: no stage 'layer5'; did you mean layer"),
            (
                {"from_stage": "layer1"},
                "--from-stage layer1 is the first stage, which trains the whole network: give one "
                "of layer2, layer3, layer4, or leave --from-stage out",
            ),
        ],
    )
    def test_stages_that_are_not_there(
        self, pets: Path, tmp_path: Path, changes: dict, message: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            finetune(settings(pets, tmp_path, **changes))
        assert message in str(caught.value)

    def test_the_recipe_unless_one_is_given(self) -> None:
        recipe = resolve_recipe(FinetuneConfig(dataset="digits", from_stage="layer4"))
        wanted = {
            "epochs": 8, "lr": 1e-3, "backbone_lr": 2e-4, "optimizer": "adamw", "bn_eval": True,
            "schedule": "cosine", "weight_decay": 0.05, "probe": True, "unfreeze": (),
        }  # fmt: skip
        assert {name: getattr(recipe, name) for name in wanted} == wanted
        faster = FinetuneConfig(dataset="digits", from_stage="layer4", lr=5e-3)
        assert resolve_recipe(faster).backbone_lr == pytest.approx(1e-3)
        plain = FinetuneConfig(dataset="digits", from_stage="layer4", recipe="notebook")
        assert (resolve_recipe(plain).epochs, resolve_recipe(plain).probe) == (3, False)
        assert "from_stage" not in resolve_recipe(FinetuneConfig(dataset="digits")).to_dict()

    @pytest.mark.parametrize("other", [{"freeze_backbone": True}, {"unfreeze": "layer4"}])
    def test_contradictions(self, other: dict) -> None:
        with pytest.raises(UserError, match=r"^from_stage says what trains: leave freeze_backbone"):
            FinetuneConfig(dataset="digits", from_stage="layer4", **other)
        with pytest.raises(UserError, match=r"^layers layer3: with from_stage, which caches"):
            ExtractConfig(dataset="digits", from_stage="layer4", layers="layer3")

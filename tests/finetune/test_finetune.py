"""Fine-tuning: what trains and what stays, resuming to the bit, choosing without the test split."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache.finetune.samples
import featcache.finetune.setup as preparation
import featcache.finetune.training as run_module
from data_helpers import SIDE, make_folder, make_pets
from featcache.backbone import build_classifier
from featcache.config import FinetuneConfig, Preprocessing
from featcache.data import decode_split, load_dataset
from featcache.errors import FeatcacheError, StorageError, UserError
from featcache.finetune import finetune, finetune_report, summary_lines
from featcache.finetune.checkpoint import checkpoint_path
from featcache.finetune.loop import _with_lone_merged
from featcache.finetune.samples import Images, hold_out
from featcache.finetune.trainable import TrainableModel, rate_factor, resolve_recipe
from featcache.random_order import epoch_order, flip_mask
from featcache.results import RunReport
from featcache.runtime import torch_threads_kept
from featcache.tensor_files import model_card, read_tensor_file


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 33 train images (one more than a batch) and 12 test images."""
    return make_pets(tmp_path_factory.mktemp("pets"))


def settings(dataset: Path, tmp_path: Path, **changes: object) -> FinetuneConfig:
    values = {
        "dataset": str(dataset),
        "cache_dir": tmp_path / "cache",
        "backbone": "shufflenet_v2_x0_5",  # small and quick, with BatchNorm
        "weights": "random",
        "image_px": SIDE,
        "resize": "squash",
        "epochs": 2,
        "workers": 0,
        "output": tmp_path / "model.safetensors",
    }
    return FinetuneConfig(**{**values, **changes})


def weights_of(report: dict) -> dict[str, torch.Tensor]:
    return read_tensor_file(Path(report["model"])).tensors()


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def full(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneConfig, dict]:
    """One whole run of the notebook's recipe, three epochs, shared by tests that only look."""
    config = settings(pets, tmp_path_factory.mktemp("full"), epochs=3, backbone="resnet18")
    return config, finetune(config)


class TestReport:
    def test_fields(self, full: tuple[FinetuneConfig, dict]) -> None:
        _, report = full
        assert report["command"] == "finetune"
        assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2, 3]
        assert {"train_loss", "test_top1", "seconds", "eval_seconds"} <= report["epochs"][0].keys()
        assert report["test_top1"] == report["epochs"][-1]["test_top1"]
        low, high = report["test_interval"]
        assert 0 <= low <= report["test_top1"] <= high <= 1
        assert report["seconds_total"] > sum(epoch["seconds"] for epoch in report["epochs"])
        assert report["scored_on"] == "test split (12 images)"
        assert report["chosen_on"] == "nothing: no setting was chosen by a score"
        assert report["recipe"]["optimizer"] == "adam"
        assert report["num_train"] == 33
        assert report["without_leaks"] is None
        assert json.loads(json.dumps(report)) == report

    def test_the_defaults_are_the_notebooks(self) -> None:
        recipe = resolve_recipe(FinetuneConfig(dataset="digits"))
        wanted = {
            "epochs": 3, "lr": 1e-3, "backbone_lr": 1e-3, "batch_size": 32, "optimizer": "adam",
            "weight_decay": 0.0, "schedule": "constant", "flip": True, "bn_eval": False,
            "probe": False, "patience": None, "seed": 42,
        }  # fmt: skip
        assert {name: getattr(recipe, name) for name in wanted} == wanted

    def test_the_file_has_the_predictions(self, full: tuple[FinetuneConfig, dict]) -> None:
        config, report = full
        saved = RunReport.load(config.output.with_suffix(".json"))
        assert saved.to_json() == report
        assert saved.class_names == ["cat", "dog", "eel"]
        assert saved.test.ids[0] == "test/cat/00.png"
        right = sum(saved.test.correct())
        assert right / 12 == report["test_top1"]
        assert all(1 / 3 <= c <= 1 for c in saved.test.confidence)

    def test_the_score_without_leaked_images_is_given_too(self, tmp_path: Path) -> None:
        pets = make_pets(tmp_path / "pets", train=3, test=2)
        for name in ("cat", "dog"):
            shutil.copy(pets / "train" / name / "00.png", pets / "test" / name / "seen.png")
        report = finetune(settings(pets, tmp_path, epochs=1))
        found = report["without_leaks"]
        assert (report["num_test"], found["num_leaked"], found["num_test"]) == (8, 2, 6)
        assert any("without the 2 test images" in line for line in summary_lines(report))

    def test_the_model_file_says_what_it_is(self, full: tuple[FinetuneConfig, dict]) -> None:
        config, report = full
        card = model_card(read_tensor_file(config.output))
        assert card.backbone == "resnet18"
        assert card.class_names == ["cat", "dog", "eel"]
        assert card.preprocessing.image_px == SIDE
        assert card.provenance["backbone"]["weights"] == "random"
        assert card.scores["test_top1"] == report["test_top1"]
        model = build_classifier(config, 3, 0)
        model.load_state_dict(weights_of(report), strict=True)

    def test_it_learns(self, full: tuple[FinetuneConfig, dict]) -> None:
        losses = [epoch["train_loss"] for epoch in full[1]["epochs"]]
        assert losses[-1] < losses[0]

    def test_no_checkpoint_is_left(self, full: tuple[FinetuneConfig, dict]) -> None:
        assert not checkpoint_path(full[0].output).exists()

    def test_summary(self, full: tuple[FinetuneConfig, dict]) -> None:
        text = "\n".join(summary_lines(full[1]))
        assert "11,178,051 trainable parameters" in text  # 11,176,512 and 3 * 513
        assert str(full[0].output) in text


class TestWhatTrains:
    @pytest.mark.parametrize(
        ("changes", "count"),
        [
            ({}, 11_181_642),
            ({"freeze_backbone": True}, 5_130),
            # layer4 has 8,393,728 parameters.
            ({"unfreeze": "layer4"}, 8_393_728 + 5_130),
            ({"unfreeze": "layer4.1, layer3"}, 4_720_640 + 2_099_712 + 5_130),
        ],
    )
    def test_parameter_counts_for_ten_classes(self, changes: dict, count: int) -> None:
        config = FinetuneConfig(dataset="digits", weights="random", **changes)
        assert (
            TrainableModel(build_classifier(config, 10, 0), resolve_recipe(config)).trainable_params
            == count
        )

    def test_a_frozen_backbone_does_not_move(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, freeze_backbone=True)
        before = build_classifier(config, 3, config.seed).state_dict()
        after = weights_of(finetune(config))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"fc.weight", "fc.bias"}

    def test_only_what_is_unfrozen_moves_batchnorm_included(
        self, pets: Path, tmp_path: Path
    ) -> None:
        config = settings(pets, tmp_path, backbone="resnet18", unfreeze="layer4", epochs=1)
        before = build_classifier(config, 3, config.seed).state_dict()
        after = weights_of(finetune(config))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[0] for name in moved} == {"layer4", "fc"}
        assert "layer4.0.bn1.running_mean" in moved

    def test_bn_eval_keeps_statistics_but_trains_scales(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, backbone="resnet18", bn_eval=True, epochs=1)
        before = build_classifier(config, 3, config.seed).state_dict()
        after = weights_of(finetune(config))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert "bn1.weight" in moved
        assert not {name for name in moved if "running" in name or "tracked" in name}

    def test_the_wrong_module_is_answered_with_the_choices(
        self, pets: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=r"--unfreeze: no module 'layr4'; did you mean layer4"):
            finetune(settings(pets, tmp_path, backbone="resnet18", unfreeze="layr4"))

    def test_rates_by_group(self) -> None:
        config = FinetuneConfig(
            dataset="digits", weights="random", recipe="good", lr=0.01, backbone_lr=0.002
        )
        groups = TrainableModel(
            build_classifier(config, 10, 0), resolve_recipe(config)
        ).make_optimizer()
        seen = {
            (g["base_lr"], g["weight_decay"] > 0, sum(p.numel() for p in g["params"]))
            for g in groups.param_groups
        }
        norms = 4_800 * 2  # BatchNorm scales and shifts of a ResNet18
        assert seen == {
            (0.002, True, 11_176_512 - norms),
            (0.002, False, norms),
            (0.01, True, 5_120),
            (0.01, False, 10),
        }

    def test_good_keeps_its_ratio_of_rates(self) -> None:
        config = FinetuneConfig(dataset="digits", recipe="good")
        ratio = resolve_recipe(config).backbone_lr / resolve_recipe(config).lr
        recipe = resolve_recipe(dataclasses.replace(config, lr=0.5))
        assert recipe.backbone_lr / recipe.lr == pytest.approx(ratio)
        assert resolve_recipe(dataclasses.replace(config, backbone_lr=0.7)).backbone_lr == 0.7


class TestPlainLoop:
    """What speeds training up changes no update: the same epoch as torch's own loop."""

    @pytest.mark.parametrize("bn_eval", [False, True])
    def test_an_epoch_ends_with_the_weights_of_the_plain_loop(
        self, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bn_eval: bool
    ) -> None:
        monkeypatch.setattr(preparation, "build_classifier", smooth_classifier)
        config = settings(
            pets,
            tmp_path,
            backbone="resnet18",
            image_px=64,  # BatchNorm over the 11 values of smaller maps is ill-conditioned
            batch_size=11,
            epochs=1,
            optimizer="sgd",
            bn_eval=bn_eval,
            device="cpu",
        )
        report = finetune(config)
        with torch_threads_kept():
            torch.set_num_threads(1)  # on two, the plain loop itself rounds to 1e-3
            model, losses = plain_epoch(config)
        assert report["epochs"][0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        found, expected = weights_of(report), model.state_dict()
        start = build_classifier(config, 3, config.seed).state_dict()
        for name, tensor in expected.items():
            moved = (tensor - start[name]).abs().max()
            off = (tensor - found[name]).abs().max()
            assert off <= 1e-3 * moved + 1e-7, (name, float(off), float(moved))


def smooth_classifier(*args: object) -> torch.nn.Module:
    """A network without kinks: next to one, rounding decides which gradient there is."""
    model = build_classifier(*args)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.ReLU):
            model.set_submodule(name, torch.nn.SiLU())
        elif isinstance(module, torch.nn.MaxPool2d):
            model.set_submodule(name, torch.nn.AvgPool2d(3, stride=2, padding=1))
    return model


def plain_epoch(config: FinetuneConfig) -> tuple[torch.nn.Module, list[float]]:
    """One epoch as it is usually written, in the order and with the mirroring of ours."""
    split = load_dataset(config).splits["train"]
    prep = Preprocessing(image_px=config.image_px, resize="squash", resize_px=config.image_px)
    decoded = decode_split(split, prep, workers=0)
    assert decoded is not None
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (prep.mean, prep.std))
    images = (torch.from_numpy(decoded.pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    flips = torch.from_numpy(flip_mask(len(split), config.seed, 0))
    images[flips] = images[flips].flip(3)
    model = smooth_classifier(config, 3, config.seed).train()
    if config.bn_eval:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=False)
    losses = []
    order = torch.from_numpy(epoch_order(len(split), config.seed, 0))
    for rows in order.split(config.batch_size):
        loss = torch.nn.functional.cross_entropy(
            model(images[rows].contiguous()), torch.tensor(split.labels)[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


class TestOptimizer:
    @pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
    def test_it_updates_channels_last_weights_without_a_copy(self, name: str) -> None:
        config = FinetuneConfig(dataset="digits", weights="random", optimizer=name, lr=0.01)
        network = torch.nn.Sequential()
        network.conv = torch.nn.Conv2d(4, 6, 3)
        network.fc = torch.nn.Linear(6, 3)
        network.to(memory_format=torch.channels_last)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
        plain = copy.deepcopy(network)
        trainable = TrainableModel(network, resolve_recipe(config))
        decay = {"weight_decay": 0.0} if name == "adamw" else {}
        options = {"momentum": 0.9} if name == "sgd" else decay
        ours, theirs = trainable.make_optimizer(), kind(plain.parameters(), lr=0.01, **options)
        for _ in range(3):
            for model, optimizer in ((network, ours), (plain, theirs)):
                optimizer.zero_grad()
                maps = model.conv(torch.arange(400.0).cos().view(1, 4, 10, 10))
                model.fc(maps.mean((2, 3))).square().sum().backward()
                with torch.profiler.profile() as profile:
                    optimizer.step()
                calls = {event.key for event in profile.key_averages()}
                assert "aten::clone" not in calls or model is plain
        for found, expected in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert found.stride() == expected.stride()


class TestSchedule:
    def test_constant(self) -> None:
        recipe = resolve_recipe(FinetuneConfig(dataset="digits"))
        assert {rate_factor(recipe, step, 9) for step in range(9)} == {1.0}

    def test_cosine_rises_over_a_tenth_then_falls(self) -> None:
        recipe = resolve_recipe(FinetuneConfig(dataset="digits", schedule="cosine"))
        factors = [rate_factor(recipe, step, 100) for step in range(100)]
        assert factors[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1.0])
        assert factors[55] == pytest.approx(0.5)  # half-way between step 10 and the end
        assert np.diff(factors[10:]).max() < 0
        assert 0 < factors[-1] < 0.001


class TestSameAgain:
    def test_two_runs_with_one_seed_agree(
        self, full: tuple[FinetuneConfig, dict], tmp_path: Path
    ) -> None:
        config, report = full
        again = finetune(dataclasses.replace(config, output=tmp_path / "again.safetensors"))
        assert_same(weights_of(report), weights_of(again))

    def test_another_seed_differs(self, full: tuple[FinetuneConfig, dict], tmp_path: Path) -> None:
        config, report = full
        other = finetune(dataclasses.replace(config, seed=1, output=tmp_path / "o.safetensors"))
        assert not torch.equal(weights_of(report)["fc.weight"], weights_of(other)["fc.weight"])

    def test_pixels_in_memory_or_decoded_anew(
        self,
        full: tuple[FinetuneConfig, dict],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config, report = full
        monkeypatch.setattr(featcache.finetune.samples, "DECODED_BYTES", 0)
        again = finetune(
            dataclasses.replace(config, workers=2, output=tmp_path / "again.safetensors")
        )
        assert_same(weights_of(report), weights_of(again))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Have the run stopped right before epoch `epochs`, counted from 0."""
    train_epoch = run_module.train_epoch

    def stop(*args: object) -> object:
        if args[-1] == epochs:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(run_module, "train_epoch", stop)


class TestHit:
    def test_a_finished_run_is_not_trained_again(
        self, full: tuple[FinetuneConfig, dict], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, report = full
        monkeypatch.setattr(run_module, "train_epoch", None)
        again = finetune(config)
        assert (report["hit"], again["hit"]) == (False, True)
        assert {**again, "hit": False} == report
        assert finetune_report(config).to_json() == again
        assert "already trained, nothing to do" in run_module.summary_lines(again)[0]

    @pytest.mark.parametrize("what", ["model", "report", "settings", "no_resume"])
    def test_anything_else_is_trained(
        self,
        full: tuple[FinetuneConfig, dict],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        what: str,
    ) -> None:
        for path in (full[0].output, full[0].output.with_suffix(".json")):
            shutil.copy(path, tmp_path)
        config = dataclasses.replace(full[0], output=tmp_path / full[0].output.name)
        if what == "model":
            data = config.output.read_bytes()
            config.output.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif what == "report":
            config.output.with_suffix(".json").write_text('{"command": "finetune"}')
        elif what == "settings":
            config = dataclasses.replace(config, score="end")
        else:
            config = dataclasses.replace(config, resume=False)
        interrupt_after(monkeypatch, 0)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)


class TestResume:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_an_interrupted_run_ends_with_the_same_bits(
        self,
        full: tuple[FinetuneConfig, dict],
        tmp_path: Path,
        epochs: int,
    ) -> None:
        config, report = full
        config = dataclasses.replace(config, output=tmp_path / "model.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, epochs)
            with pytest.raises(KeyboardInterrupt):
                finetune(config)
        assert not config.output.exists()
        assert checkpoint_path(config.output).exists()
        resumed = finetune(config)
        assert resumed["num_resumed_epochs"] == epochs
        assert [e["train_loss"] for e in resumed["epochs"]] == [
            e["train_loss"] for e in report["epochs"]
        ]
        assert_same(weights_of(report), weights_of(resumed))
        assert not checkpoint_path(config.output).exists()

    @pytest.mark.parametrize(
        "changes",
        [
            {"recipe": "good", "patience": 3, "holdout": 0.3, "epochs": 3},
            {"backbone": "mobilenet_v3_small", "image_px": 32, "optimizer": "sgd"},  # has dropout
            {"freeze_backbone": True},
        ],
        ids=["good, early stopping", "dropout, sgd", "frozen"],
    )
    def test_nothing_else_is_carried_between_epochs(
        self, pets: Path, tmp_path: Path, changes: dict
    ) -> None:
        config = settings(pets, tmp_path, **changes)
        whole = weights_of(finetune(config))
        config = dataclasses.replace(config, output=tmp_path / "other.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                finetune(config)
        resumed = finetune(config)
        assert resumed["num_resumed_epochs"] == 1
        assert_same(whole, weights_of(resumed))

    def test_a_checkpoint_of_other_settings_is_not_replaced(
        self, pets: Path, tmp_path: Path
    ) -> None:
        config = settings(pets, tmp_path, freeze_backbone=True)
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                finetune(config)
        checkpoint = checkpoint_path(config.output)
        before = checkpoint.read_bytes()
        for change, name in (
            ({"lr": 0.01}, r"plan\.lr was 0\.001, is 0\.01"),
            ({"seed": 7}, r"plan\.seed was 42, is 7"),
            ({"num_train": 30}, "dataset was [0-9a-f]{40}, is [0-9a-f]{40}"),
        ):
            with pytest.raises(
                UserError, match=f"was made with different settings.*{name}"
            ) as caught:
                finetune(dataclasses.replace(config, **change))
            assert str(checkpoint) in str(caught.value)
            assert checkpoint.read_bytes() == before
        report = finetune(dataclasses.replace(config, lr=0.01, resume=False))
        assert report["num_resumed_epochs"] == 0
        with pytest.raises(UserError, match=r"model\.safetensors was made with different settings"):
            finetune(config)

    def test_a_run_that_another_one_writes_is_refused(
        self, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = settings(pets, tmp_path, freeze_backbone=True)
        refused = []

        def second(*args: object) -> object:
            with pytest.raises(StorageError, match=r"model\.safetensors is being written by") as e:
                finetune(config)
            refused.append(str(e.value))
            return train_epoch(*args)

        train_epoch = run_module.train_epoch
        monkeypatch.setattr(run_module, "train_epoch", second)
        finetune(config)
        assert len(refused) == 2

    def test_what_is_read_and_what_strangers_wrote_is_not_replaced(
        self, full: tuple[FinetuneConfig, dict], pets: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / "model.safetensors"
        shutil.copy(full[0].output, model)
        config = settings(pets, tmp_path, weights=str(model))
        with pytest.raises(UserError, match=r"model\.safetensors is an input and would be"):
            finetune(config)
        model.rename(tmp_path / "w.safetensors")
        config = dataclasses.replace(config, weights="random")
        for name in ("model.safetensors", "model.json", "model.checkpoint.safetensors"):
            stranger = tmp_path / name
            stranger.write_text('{"mine": 1}')
            with pytest.raises(UserError, match=f"{name} exists and was not written by"):
                finetune(config)
            assert stranger.read_text() == '{"mine": 1}'
            stranger.unlink()
            stranger.symlink_to(tmp_path / "w.safetensors")
            with pytest.raises(UserError, match=f"{name} is a link.*give its target .*w.safetens"):
                finetune(config)
            stranger.unlink()

    def test_a_damaged_checkpoint_is_named(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, freeze_backbone=True)
        path = checkpoint_path(config.output)
        path.write_bytes(b"\x10" + bytes(100) + b"featcache-checkpoint-1")
        with pytest.raises(FeatcacheError, match=r"model\.checkpoint\.safetensors is damaged"):
            finetune(config)


class TestLoss:
    def test_training_stops_before_an_update_that_would_spoil_everything(
        self, pets: Path, tmp_path: Path
    ) -> None:
        config = settings(pets, tmp_path, lr=1e36, optimizer="sgd", batch_size=11)
        with pytest.raises(FeatcacheError, match=r"epoch 1, step 2.*--lr is 1e\+36: use a lower"):
            finetune(config)
        assert not config.output.exists()


class TestEarlyStopping:
    def test_keeps_the_best_epoch_on_held_out_images(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, patience=1, holdout=0.3, epochs=4, lr=3e-3)
        report = finetune(config)
        assert report["chosen_on"] == "a held-out part of train (10 images) chose the epoch"
        assert report["num_train"] == 23
        scores = [(e["val_top1"], -e["val_loss"]) for e in report["epochs"]]
        assert report["kept_epoch"] == 1 + scores.index(max(scores))
        assert len(scores) <= report["kept_epoch"] + 1
        assert report["test_top1"] == report["epochs"][report["kept_epoch"] - 1]["test_top1"]

    def test_the_test_split_chooses_nothing(self, pets: Path, tmp_path: Path) -> None:
        # The same train images beside test folders whose contents were swapped.
        other = shutil.copytree(pets, tmp_path / "other")
        (other / "test" / "cat").rename(other / "test" / "tmp")
        (other / "test" / "dog").rename(other / "test" / "cat")
        (other / "test" / "tmp").rename(other / "test" / "dog")
        reports = [
            finetune(
                settings(
                    root,
                    tmp_path,
                    patience=1,
                    epochs=2,
                    backbone="resnet18",
                    recipe="good",
                    holdout=0.3,
                    output=tmp_path / f"{n}.safetensors",
                )
            )
            for n, root in enumerate((pets, other))
        ]
        assert reports[0]["test_top1"] != reports[1]["test_top1"]
        assert_same(*(weights_of(report) for report in reports))

    def test_uses_a_val_split_where_there_is_one(self, pets: Path, tmp_path: Path) -> None:
        root = shutil.copytree(pets, tmp_path / "three")
        shutil.copytree(pets / "test", root / "val")
        report = finetune(settings(root, tmp_path, patience=2, freeze_backbone=True))
        assert report["chosen_on"] == "the dataset's val split (12 images) chose the epoch"
        assert report["num_train"] == 33

    def test_identical_images_are_held_out_together(self, pets: Path, tmp_path: Path) -> None:
        root = shutil.copytree(pets, tmp_path / "twice")
        for file in sorted((root / "train").rglob("*.png")):
            shutil.copy(file, file.with_name(f"{file.stem} (1).png"))
        config = settings(root, tmp_path, patience=1, holdout=0.3)
        split = load_dataset(config).splits["train"]
        prep = Preprocessing(image_px=SIDE, resize="squash", resize_px=SIDE)
        left, held, told = hold_out(Images(split, split, prep), None, config)
        seen = [{row.tobytes() for row in part.split.content} for part in (left, held)]
        assert not seen[0] & seen[1]
        assert len(left) + len(held) == 66
        assert told == f"a held-out part of train ({len(held)} images) chose the epoch"
        assert abs(len(held) - 20) <= 2

    def test_a_hold_out_of_nothing_is_refused(self, pets: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--holdout 0.01 of 33 train images leaves nothing"):
            finetune(settings(pets, tmp_path, patience=1, holdout=0.01))


class TestBadPictures:
    @pytest.fixture
    def damaged(self, pets: Path, tmp_path: Path) -> Path:
        root = shutil.copytree(pets, tmp_path / "damaged")
        (root / "train" / "dog" / "03.png").write_bytes(b"not an image")
        (root / "test" / "eel" / "02.png").write_bytes(b"")
        return root

    def test_fail_names_the_file(self, damaged: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"train/dog/03\.png"):
            finetune(settings(damaged, tmp_path))

    @pytest.mark.parametrize("decoded_bytes", [0, 10**9])
    def test_skip_leaves_them_out_and_counts(
        self, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded_bytes: int
    ) -> None:
        monkeypatch.setattr(featcache.finetune.samples, "DECODED_BYTES", decoded_bytes)
        config = settings(damaged, tmp_path, on_error="skip", freeze_backbone=True)
        report = finetune(config)
        assert report["num_skipped"] == {"train": 1, "test": 1}
        assert (report["num_train"], report["num_test"]) == (32, 11)
        saved = RunReport.load(config.output.with_suffix(".json"))
        assert "test/eel/02.png" not in saved.test.ids
        assert "2 unreadable images left out" in "\n".join(summary_lines(report))

    def test_all_bad_is_an_error(self, damaged: Path, tmp_path: Path) -> None:
        for path in (damaged / "test").rglob("*.png"):
            path.write_bytes(b"not an image")
        with pytest.raises(UserError, match="not one image of split test"):
            finetune(settings(damaged, tmp_path, on_error="skip"))


class TestBatches:
    def test_a_lone_last_image_joins_the_batch_before(self) -> None:
        batches = [tuple(np.arange(n) for _ in range(3)) for n in (4, 4, 1)]
        assert [len(rows) for _, _, rows in _with_lone_merged(iter(batches))] == [4, 5]
        assert [len(b[2]) for b in _with_lone_merged(iter(batches[:2]))] == [4, 4]
        assert [len(b[2]) for b in _with_lone_merged(iter(batches[2:]))] == [1]
        assert list(_with_lone_merged(iter([]))) == []

    def test_batchnorm_cannot_average_over_one(self, pets: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--batch-size 1 gives BatchNorm nothing"):
            finetune(settings(pets, tmp_path, batch_size=1))

    def test_a_size_that_the_network_does_not_take(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, backbone="squeezenet1_1", image_px=8)
        with pytest.raises(UserError, match="squeezenet1_1 does not take images of 8 px"):
            finetune(config)


class TestStart:
    def test_good_starts_from_a_linear_probe(self, pets: Path, tmp_path: Path) -> None:
        config = settings(pets, tmp_path, recipe="good", epochs=1, backbone="resnet18")
        report = finetune(config)
        assert report["probe"]["num_images"] == 33
        changes = {"recipe": "notebook", "bn_eval": True, "resume": False}
        cold = finetune(dataclasses.replace(config, **changes))
        assert report["epochs"][0]["train_loss"] < 0.5 * cold["epochs"][0]["train_loss"]

    def test_two_classes(self, pets: Path, tmp_path: Path) -> None:
        root = shutil.copytree(pets, tmp_path / "two")
        for split in ("train", "test"):
            shutil.rmtree(root / split / "eel")
        report = finetune(settings(root, tmp_path, recipe="good", epochs=1, backbone="resnet18"))
        # Nearly separable from the start: the two rows of weights have the right signs.
        assert report["epochs"][0]["train_loss"] < 0.5

    def test_another_file_is_no_head(
        self, full: tuple[FinetuneConfig, dict], pets: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="is not a head file: give one that train-head wrote"):
            finetune(settings(pets, tmp_path, init_head=full[0].output))
        with pytest.raises(UserError, match=r"none\.safetensors: there is no such file"):
            finetune(settings(pets, tmp_path, init_head=tmp_path / "none.safetensors"))


def test_mixed_precision_trains_and_scores(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that GPUs take, tried in bfloat16 on the CPU."""
    choose = preparation.choose_placement
    monkeypatch.setattr(
        preparation,
        "choose_placement",
        lambda *given: dataclasses.replace(choose(*given), amp=True),
    )
    config = settings(pets, tmp_path, backbone="resnet18", lr=1e-4)
    report = finetune(config)
    assert report["environment"]["amp"]
    assert report["epochs"][1]["train_loss"] < report["epochs"][0]["train_loss"]
    # Parameters stay in float32; only the passes are in half precision.
    assert {tensor.dtype for tensor in weights_of(report).values()} == {torch.float32, torch.int64}


def test_weights_count_whatever_their_scale_and_not_all_may_be_zero(tmp_path: Path) -> None:
    make_folder(tmp_path)
    train = [f"train/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(4)]
    test = [f"test/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(2)]

    def run(scale: float) -> dict[str, torch.Tensor]:
        own = [2.0**125 * scale * (1 + i % 2) for i in range(8)]  # 5.1e38 in all
        rows = [f"{p},{p.split('/')[1]},train,{w!r}" for p, w in zip(train, own, strict=True)]
        rows += [f"{path},{path.split('/')[1]},test,1" for path in test]
        (tmp_path / "m.csv").write_text("\n".join(["path,label,split,weight", *rows]))
        return weights_of(finetune(settings(tmp_path / "m.csv", tmp_path, epochs=1, resume=False)))

    assert_same(run(1.0), run(2.0**-125))
    with pytest.raises(UserError, match="the weights of train must be numbers from 0 on, not all"):
        run(0.0)

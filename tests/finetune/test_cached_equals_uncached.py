"""The cached path is the uncached path: heads and backbones that end with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_helpers import SIDE, make_pets
from featcache.config import ExtractConfig, FinetuneConfig, TrainHeadConfig
from featcache.errors import UserError
from featcache.extract import extract
from featcache.finetune import finetune
from featcache.heads import load_head, train_head
from featcache.results import RunReport
from featcache.tensor_files import read_tensor_file


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pets(tmp_path_factory.mktemp("pets"))


def shared(dataset: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "dataset": str(dataset),
        "cache_dir": tmp_path,
        "weights": "random",
        "image_px": SIDE,
        "workers": 1,
        "on_error": "skip",
    }


def both_heads(
    dataset: Path, tmp_path: Path, *, flip: bool, optimizer: str = "adam", decay: float = 0.0
) -> tuple[RunReport, RunReport, np.ndarray, np.ndarray]:
    """Reports and weights [C, D + 1] of the head in the loop and of the head on the cache."""
    loop, cached = tmp_path / "loop.safetensors", tmp_path / "cached.safetensors"
    recipe = {"weight_decay": decay, "epochs": 3, "batch_size": 8, "seed": 3}
    finetune(
        FinetuneConfig(
            **(shared(dataset, tmp_path) | recipe),
            freeze_backbone=True,
            flip=flip,
            optimizer=optimizer,
            output=loop,
        )
    )
    cache = tmp_path / "features.h5"
    extract(
        ExtractConfig(
            **shared(dataset, tmp_path), seed=3, views="flip" if flip else "none", output=cache
        )
    )
    train_head(
        TrainHeadConfig(cache=cache, solver=optimizer, standardize="off", output=cached, **recipe)
    )
    tensors, head = read_tensor_file(loop).tensors(), load_head(cached)
    in_loop = np.hstack([tensors["fc.weight"].numpy(), tensors["fc.bias"].numpy()[:, None]])
    reports = [RunReport.load(path.with_suffix(".json")) for path in (loop, cached)]
    return *reports, in_loop, np.hstack([head.weight, head.bias[:, None]])


class TestHeads:
    @pytest.mark.parametrize(
        ("flip", "optimizer", "decay"),
        [(False, "adam", 0.0), (True, "adam", 0.0), (True, "sgd", 0.01)],
    )
    def test_the_head_on_the_cache_is_the_head_in_the_loop(
        self, pets: Path, tmp_path: Path, flip: bool, optimizer: str, decay: float
    ) -> None:
        loop, cached, one, two = both_heads(
            pets, tmp_path, flip=flip, optimizer=optimizer, decay=decay
        )
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
        assert [e["train_loss"] for e in loop.epochs] == pytest.approx(
            [e["train_loss"] for e in cached.epochs], rel=1e-4
        )
        assert loop.trainable_params == cached.trainable_params == 3 * 513
        assert loop.test.ids == cached.test.ids
        assert loop.test.predicted == cached.test.predicted

    def test_also_where_pictures_are_skipped(self, pets: Path, tmp_path: Path) -> None:
        root = shutil.copytree(pets, tmp_path / "damaged")
        (root / "train" / "cat" / "05.png").write_bytes(b"no picture")
        loop, _, one, two = both_heads(root, tmp_path, flip=True)
        assert loop.more["num_train"] == 32
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)

    def test_also_where_samples_are_weighted(self, pets: Path, tmp_path: Path) -> None:
        lines = ["path,label,split,weight"]
        for number, path in enumerate(sorted(pets.rglob("*.png"))):
            split, label = path.parts[-3:-1]
            lines.append(f"{path.relative_to(pets)},{label},{split},{1 + number % 4}")
        manifest = pets / "list.csv"
        manifest.write_text("\n".join(lines))
        _, _, one, two = both_heads(manifest, tmp_path, flip=False)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def head(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("head")
    extract(ExtractConfig(**shared(pets, where), output=where / "features.h5"))
    train_head(TrainHeadConfig(cache=where / "features.h5", output=where / "head.safetensors"))
    return where / "head.safetensors"


class TestStartFromHead:
    def settings(self, pets: Path, tmp_path: Path, head: Path, **changes: object) -> FinetuneConfig:
        values = shared(pets, tmp_path) | {"epochs": 1, "init_head": head} | changes
        return FinetuneConfig(**values, output=tmp_path / "model.safetensors")

    def test_the_first_epoch_starts_where_the_head_ended(
        self, pets: Path, tmp_path: Path, head: Path
    ) -> None:
        # A rate of next to nothing leaves the head as it was.
        config = self.settings(pets, tmp_path, head, lr=1e-12, freeze_backbone=True)
        finetune(config)
        weight = read_tensor_file(config.output).tensors()["fc.weight"].numpy()
        assert weight == pytest.approx(load_head(head).weight, abs=1e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 9}, "features with weights_sha256"),
            ({"normalize": "half"}, "features with preprocessing.mean"),
            ({"backbone": "resnet34"}, "features with backbone 'resnet18'"),
        ],
    )
    def test_a_head_of_other_features_is_refused(
        self, pets: Path, tmp_path: Path, head: Path, changes: dict, message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            finetune(self.settings(pets, tmp_path, head, **changes))

    def test_a_head_of_other_classes_is_refused(
        self, pets: Path, tmp_path: Path, head: Path
    ) -> None:
        root = shutil.copytree(pets, tmp_path / "renamed")
        for split in ("train", "test"):
            (root / split / "eel").rename(root / split / "fox")
        with pytest.raises(UserError, match=r"is for \d+ classes .*eel.*the dataset has .*fox"):
            finetune(self.settings(root, tmp_path, head))


def test_a_fine_tuned_backbone_can_be_cached(pets: Path, tmp_path: Path) -> None:
    """A model file serves as --weights: features of it, and its own preprocessing with them."""
    model = tmp_path / "model.safetensors"
    finetune(
        FinetuneConfig(
            **shared(pets, tmp_path), normalize="half", epochs=1, output=model, resize="squash"
        )
    )
    values = shared(pets, tmp_path) | {"weights": str(model), "image_px": None}
    made = extract(ExtractConfig(**values, output=tmp_path / "features.h5"))
    prep = made["provenance"]["backbone"]["preprocessing"]
    assert (prep["image_px"], prep["resize"], prep["mean"][0]) == (SIDE, "squash", 0.5)

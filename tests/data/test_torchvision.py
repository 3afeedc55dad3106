"""torchvision's datasets: its own classes read small copies made here; nothing is downloaded."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_helpers import Load, config, encoded, make_tree, number_in, picture
from featcache import file_hashes as memo_module
from featcache.config import Preprocessing
from featcache.data import ImageDataset, index, iterate_pixels, load_dataset
from featcache.data.torchvision_sets import TORCHVISION_SETS, places_of
from featcache.errors import UserError


def sizes(dataset: ImageDataset) -> dict[str, int]:
    return {name: len(split) for name, split in dataset.splits.items()}


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(head + values.tobytes())


def make_fashion(root: Path) -> np.ndarray:
    """20 train and 10 test pictures of 28 x 28, each of one gray, its number."""
    for part, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
        raw = root / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return images


def test_an_array_dataset(tmp_path: Path, load: Load) -> None:
    make_fashion(tmp_path / "data")
    for name in ("fashionmnist", "Fashion-MNIST", "fashion_mnist", "FashionMNIST"):
        dataset = load(name)
    assert (dataset.name, dataset.kind) == ("fashionmnist", "torchvision")
    assert dataset.class_names[:2] == ["T-shirt/top", "Trouser"]
    train = dataset.splits["train"]
    assert train.ids == [f"train/{n:06d}" for n in range(20)]
    assert train.labels.tolist() == [n % 10 for n in range(20)]
    assert dataset.splits["test"].ids[9] == "test/000009"
    assert np.asarray(train.load(7))[3, 4].tolist() == [7, 7, 7]
    prep = Preprocessing(image_px=8, resize="squash", resize_px=8)
    for row, pixels in iterate_pixels(train, range(20), prep, workers=3):
        assert (pixels == row).all()


def test_the_first_ones_are_taken(tmp_path: Path, load: Load) -> None:
    make_fashion(tmp_path / "data")
    settings = config("fashionmnist", tmp_path, num_train=7, num_test=3, seed=9)
    dataset = load_dataset(settings)
    assert dataset.splits["train"].ids == [f"train/{n:06d}" for n in range(7)]
    assert dataset.splits["test"].labels.tolist() == [0, 1, 2]
    assert dataset.info(settings).seed == 0
    assert dataset.notes == ("the 7 train images have 7 of 10 classes: see --num-train",)
    with pytest.raises(UserError, match="--num-test 11: fashionmnist has 10 test images"):
        load("fashionmnist", num_test=11)
    with pytest.raises(UserError, match="of one class: give a larger number"):
        load("fashionmnist", num_train=1)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """In torchvision's own pickles, whose checksums are replaced by those of our small copy."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name: str, value: object) -> list[str]:
        data = pickle.dumps(value)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def batch(first: int) -> dict[str, object]:
        rows = [np.asarray(picture(first + n, 32)).transpose(2, 0, 1).ravel() for n in range(10)]
        return {"data": np.stack(rows), "labels": list(range(10))}

    train = [write(f"data_batch_{n}", batch(10 * n)) for n in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(500))])
    name, md5 = write("batches.meta", {"label_names": [f"class{n}" for n in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    dataset = load("cifar-10", num_train=30)
    assert sizes(dataset) == {"train": 30, "test": 10}
    assert dataset.class_names[3] == "class3"
    assert number_in(np.asarray(dataset.splits["train"].load(25))) == 35
    assert number_in(np.asarray(dataset.splits["test"].load(4))) == 504


def make_eurosat(root: Path) -> None:
    make_tree(root / "eurosat" / "2750", {"AnnualCrop": 10, "Forest": 20})


def test_eurosat_has_no_split_of_its_own(tmp_path: Path, load: Load) -> None:
    make_eurosat(tmp_path / "data")
    dataset = load("eurosat")
    assert sizes(dataset) == {"train": 24, "test": 6}
    assert dataset.splits["test"].labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert dataset.test_fraction == 0.2
    assert dataset.drawn
    for split in dataset.splits.values():
        for row, sample_id in enumerate(split.ids):
            assert number_in(np.asarray(split.load(row))) == int(sample_id[-6:])
    half = load("eurosat", test_fraction=0.5, num_train=6)
    assert sizes(half) == {"train": 6, "test": 15}
    assert np.bincount(half.splits["train"].labels).tolist() == [2, 4]  # stratified


def test_food101_by_its_lists(tmp_path: Path, load: Load) -> None:
    base = tmp_path / "data" / "food-101"
    make_tree(base / "images", {"apple_pie": 3, "baklava": 3})
    for file in (base / "images").rglob("*.png"):
        file.rename(file.with_suffix(".jpg"))
    (base / "meta").mkdir()
    lists = {"train": ["000", "002"], "test": ["001"]}
    for split, numbers in lists.items():
        names = {c: [f"{c}/{n}" for n in numbers] for c in ("baklava", "apple_pie")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
    dataset = load("food101")
    assert dataset.class_names == ["apple_pie", "baklava"]
    assert dataset.splits["train"].labels.tolist() == [1, 1, 0, 0]  # in the list's order
    numbers = [number_in(np.asarray(dataset.splits["train"].load(n))) for n in range(4)]
    assert numbers == [3, 5, 0, 2]
    said = "food101 has its own test split: leave out --test-fraction"
    with pytest.raises(UserError, match=said):
        load("food101", test_fraction=0.2)


def test_gtsrb_has_numbers_for_names(tmp_path: Path, load: Load) -> None:
    base = tmp_path / "data" / "gtsrb"
    for label in range(12):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        (folder / "0.ppm").write_bytes(encoded(picture(label), "PPM"))
    test = base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    (test / "0.ppm").write_bytes(encoded(picture(99), "PPM"))
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;11\n")
    dataset = load("gtsrb")
    assert dataset.class_names == [f"{label:02d}" for label in range(12)]
    assert dataset.splits["test"].labels.tolist() == [11]


def test_dtd_has_three_splits(tmp_path: Path, load: Load) -> None:
    base = tmp_path / "data" / "dtd" / "dtd"
    make_tree(base / "images", {"banded": 3, "dotted": 3})
    (base / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{number:03d}.png\n" for name in ("banded", "dotted")]
        (base / "labels" / f"{split}1.txt").write_text("".join(lines))
    dataset = load("dtd")
    assert list(dataset.splits) == ["train", "test", "val"]
    assert number_in(np.asarray(dataset.splits["val"].load(1))) == 4
    (base / "labels" / "test1.txt").write_text("banded/002.png\n")
    with pytest.raises(UserError, match="the splits of this dataset have different classes"):
        load("dtd")


def test_pets_and_their_list(tmp_path: Path, load: Load) -> None:
    base = tmp_path / "data" / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    names = [("Abyssinian", 1, 1), ("american_bulldog", 2, 2)]
    for split in ("trainval", "test"):
        lines = []
        for number, (name, label, species) in enumerate(names):
            image_id = f"{name}_{number + (5 if split == 'test' else 1)}"
            data = encoded(picture(label), "PNG")
            (base / "images" / f"{image_id}.jpg").write_bytes(data)
            lines.append(f"{image_id} {label} {species} 1\n")
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    dataset = load("Oxford-IIIT-Pet")
    assert dataset.class_names == ["Abyssinian", "American Bulldog"]
    assert dataset.splits["test"].labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", sorted(TORCHVISION_SETS))
def test_a_failed_download_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """Of every dataset: torchvision's class takes our arguments, and its failure is told."""
    import socket

    from torchvision import datasets

    def no_network(*_: object, **__: object) -> object:
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    spec = TORCHVISION_SETS[name]
    accepted = inspect.signature(getattr(datasets, spec.factory).__init__).parameters
    for arguments in spec.splits.values():
        assert {"root", *arguments, *spec.extra} <= accepted.keys() or "kwargs" in accepted
    with pytest.raises(UserError) as caught:
        load(name)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{name} is not (or not whole) in {tmp_path}/data/ and could not be dow")
    assert spec.places[0] in said
    assert said.endswith("digits works offline")
    assert "unexpected keyword" not in said


def test_nothing_goes_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], load: Load
) -> None:
    make_eurosat(tmp_path / "data")
    load("eurosat")
    assert capsys.readouterr().out == ""


def refuse(*_: object) -> ImageDataset:
    raise AssertionError("opened although it is in the index")


@pytest.mark.parametrize("name", ["fashionmnist", "eurosat"])
def test_a_dataset_seen_before_comes_from_the_index(
    name: str, tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    (make_fashion if name == "fashionmnist" else make_eurosat)(tmp_path / "data")
    settings = config(name, tmp_path, num_train=9)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    first = load_dataset(settings)
    assert first.notes[0] == (
        f"using torchvision's {name}, not the folder ./{name}: type ./{name} for the folder"
    )
    with monkeypatch.context() as patched:
        patched.setattr("featcache.data.datasets.load_torchvision", refuse)
        second = load_dataset(settings)
        assert second.fingerprint == first.fingerprint
        assert second.info(settings) == first.info(settings)
        assert second.class_names == first.class_names
        assert second.notes == first.notes
        (tmp_path / name).rmdir()
        assert load_dataset(settings).notes == first.notes[1:]
    whole = load(name, num_train=9, cache_dir=tmp_path / "other")
    for split, wanted in whole.splits.items():
        assert second.splits[split].ids == wanted.ids
        np.testing.assert_array_equal(second.splits[split].labels, wanted.labels)
        np.testing.assert_array_equal(second.splits[split].content, wanted.content)
        for row in (0, len(wanted) - 1):
            got = np.asarray(second.splits[split].load(row))
            np.testing.assert_array_equal(got, np.asarray(wanted.load(row)))


def test_an_index_entry_is_for_its_settings_and_files(
    tmp_path: Path, later: None, load: Load
) -> None:
    make_fashion(tmp_path / "data")
    seen = [load("fashionmnist").fingerprint]
    seen.append(load("fashionmnist", num_train=9).fingerprint)
    labels = tmp_path / "data" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(20, dtype=np.uint8) // 2)
    seen.append(load("fashionmnist").fingerprint)
    assert len(set(seen)) == 3


def test_a_changed_picture_in_a_linked_folder_is_seen(
    tmp_path: Path, later: None, load: Load
) -> None:
    make_eurosat(tmp_path / "data")
    (tmp_path / "data" / "eurosat" / "2750" / "Forest").rename(tmp_path / "forest")
    (tmp_path / "data" / "eurosat" / "2750" / "Forest").symlink_to(tmp_path / "forest")
    before = load("eurosat").fingerprint
    assert load("eurosat").fingerprint == before
    (tmp_path / "forest" / "003.png").write_bytes(encoded(picture(900)))
    assert load("eurosat").fingerprint != before


def test_files_that_change_after_the_index_was_read(
    tmp_path: Path, later: None, load: Load
) -> None:
    make_fashion(tmp_path / "data")
    load("fashionmnist")
    known = load("fashionmnist")
    labels = tmp_path / "data" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(20, dtype=np.uint8) // 2)
    with pytest.raises(UserError, match="changed during the run: run the same command again"):
        known.splits["train"].load(0)


def test_an_image_that_changes_after_the_index_was_read(
    tmp_path: Path, later: None, load: Load
) -> None:
    """The dataset was opened in time; one of its files is no longer the one in the index."""
    make_eurosat(tmp_path / "data")
    load("eurosat")
    known = load("eurosat").splits["train"]
    first = known.load(0)
    number = int(known.ids[1][-6:])
    file = sorted((tmp_path / "data" / "eurosat" / "2750").rglob("*.png"))[number]
    file.write_bytes(encoded(picture(4000)))
    assert known.load(0) == first
    with pytest.raises(UserError, match=rf"{file} changed during the run: run the same command"):
        known.load(1)


def test_an_index_entry_that_is_wrong_is_forgotten(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """The stamp says that no file changed, the contents say otherwise."""
    make_eurosat(tmp_path / "data")
    monkeypatch.setattr(index, "_stamp", lambda *_: (1,))
    known = load("eurosat")
    for number, file in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        file.write_bytes(encoded(picture(4000 + number)))
    again = load("eurosat")
    assert again.fingerprint == known.fingerprint
    with pytest.raises(UserError, match="changed during the run"):
        again.splits["train"].load(0)
    assert load("eurosat").fingerprint != known.fingerprint


@pytest.mark.parametrize("damage", ["splits", "labels", "class_names", "notes", "lengths", "type"])
def test_a_damaged_index_entry_is_a_miss(
    damage: str, tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fashion(tmp_path / "data")
    settings = config("fashionmnist", tmp_path)
    wanted = load_dataset(settings).fingerprint
    real = memo_module.Memo.get

    def damaged(self: object, key: str, stamp: tuple[int, ...]) -> object:
        value = real(self, key, stamp)
        if not isinstance(value, dict):
            return value
        if damage == "labels":
            value["splits"]["train"]["labels"] = "%%%"
        elif damage == "lengths":
            value["splits"]["train"]["labels"] = "AAAA"
        elif damage == "type":
            return [1, 2]
        else:
            del value[damage]
        return value

    monkeypatch.setattr(memo_module.Memo, "get", damaged)
    assert load_dataset(settings).fingerprint == wanted


def test_places_cover_what_the_datasets_read(tmp_path: Path) -> None:
    make_fashion(tmp_path / "data")
    make_eurosat(tmp_path / "data")
    for name in ("fashionmnist", "eurosat"):
        assert all(place.exists() for place in places_of(config(name, tmp_path), name))


LIGHT = """
import sys, time
from featcache import file_hashes
now = time.time
file_hashes.time.time = lambda: now() + 10
from pathlib import Path
from featcache.config import DataConfig
from featcache.data import load_dataset
top = Path(sys.argv[1])
config = DataConfig(dataset="fashionmnist", data_root=top / "data", cache_dir=top / "cache")
d = load_dataset(config)
print(d.fingerprint, "torch" in sys.modules or "torchvision" in sys.modules)
"""


def test_an_index_entry_needs_no_torch(tmp_path: Path) -> None:
    make_fashion(tmp_path / "data")
    results = [
        subprocess.run(
            [sys.executable, "-c", LIGHT, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert results[0][1] == "True"
    assert results[1] == [results[0][0], "False"]

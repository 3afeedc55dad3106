"""From a name to a dataset: names, subsets, fingerprints, and what must not be imported."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import REPO
from data_helpers import Load, Message, config, encoded, make_folder, make_tree, picture
from featcache.data import (
    ImageDataset,
    copies_lines,
    datasets,
    find_copies,
    load_dataset,
    sources,
)
from featcache.data import dataset as dataset_module
from featcache.data.dataset import short_name


def test_digits_are_scikit_learns(load: Load) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = load("digits")
    assert dataset.class_names == list("0123456789")
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 1438,
        "test": 359,
    }
    seen = []
    for split in dataset.splits.values():
        for row in (0, 100, len(split) - 1):
            number = int(split.ids[row].removeprefix("digits/"))
            seen.append(number)
            assert split.labels[row] == bunch.target[number]
            gray = np.asarray(split.load(row))[..., 1]
            np.testing.assert_array_equal(gray, np.rint(bunch.images[number] * 255 / 16))
    assert len(set(seen)) == 6
    share = np.bincount(dataset.splits["test"].labels) / np.bincount(bunch.target)
    assert (abs(share - 0.2) < 0.006).all()


def test_digits_where_their_table_has_moved(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    wanted = load("digits").fingerprint
    monkeypatch.setattr("featcache.data.datasets.importlib.util.find_spec", lambda _: None)
    assert load("digits").fingerprint == wanted


def test_digits_fingerprint_is_fixed(load: Load) -> None:
    """A change here makes every cache of digits stale: bump versions knowingly."""
    dataset = load("digits")
    assert dataset.fingerprint == FINGERPRINT


FINGERPRINT = "054de6d830cfb6a060116b315a36d1982fde728636c34d6a32a8ee8b1127c1d5"


@pytest.mark.parametrize("name", ["digits", "Digits", " DIGITS "])
def test_names_in_any_case(name: str, load: Load) -> None:
    assert load(name).kind == "digits"


def test_a_known_name_wins_over_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    make_folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert load("digits").kind == "digits"
    assert load("digits").notes == (
        "using scikit-learn's digits, not the folder ./digits: type ./digits for the folder",
    )
    assert load("Digits").notes == ()
    assert load("./digits").kind == "folder"
    assert load("./digits").notes == ()
    assert load("digits/").kind == "folder"


def test_a_folder_by_a_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    make_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert load("pets").name == "pets"
    monkeypatch.chdir(tmp_path / "pets")
    assert load(".").name == "pets"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/pets").name == "pets"


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message) -> None:
    monkeypatch.chdir(tmp_path)
    said = message("cifar11")
    assert said.startswith(
        "no folder or CSV file 'cifar11' is here, and no dataset 'cifar11'; did you mean cifar10, "
    )
    assert "svhn" in message("nothing-like-it")
    assert message("pics/absent").startswith("no folder or file 'pics/absent'")
    assert message("absent.csv").startswith("no folder or file 'absent.csv'")
    (tmp_path / "x.txt").write_text("x")
    assert "x.txt is a file but not a manifest: give a .csv file" in message("x.txt")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", "\n", "a\nb", "-", "😀"])
def test_odd_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    monkeypatch.chdir(tmp_path)
    message(name)


def test_subsets_are_stratified_and_seeded(tmp_path: Path, load: Load) -> None:
    root = tmp_path / "pets"
    make_tree(root / "train", {"cat": 30, "dog": 10})
    make_tree(root / "test", {"cat": 4, "dog": 4})
    make_tree(root / "val", {"cat": 4, "dog": 4})
    whole = load(root)
    part = load(root, num_train=20, num_test=2)
    train = part.splits["train"]
    assert np.bincount(train.labels).tolist() == [15, 5]
    assert np.bincount(part.splits["test"].labels).tolist() == [1, 1]
    assert len(part.splits["val"]) == 4  # in train's proportion
    assert train.ids == sorted(train.ids)
    rows = [whole.splits["train"].ids.index(sample_id) for sample_id in train.ids]
    np.testing.assert_array_equal(train.content, whole.splits["train"].content[rows])
    same = load(root, num_train=20, num_test=2)
    other = load(root, num_train=20, num_test=2, seed=1)
    assert same.fingerprint == part.fingerprint != other.fingerprint
    settings = config(root, tmp_path, num_train=20, num_test=2)
    info = part.info(settings)
    assert (info.num_train, info.num_test, info.seed) == (20, 2, 42)
    assert info.fingerprint == part.fingerprint


@pytest.mark.parametrize(("split", "there"), [("train", 8), ("test", 4)])
def test_more_than_there_is(
    pets: Path, split: str, there: int, message: Message, load: Load
) -> None:
    assert message(pets, **{f"num_{split}": 9}) == (
        f"--num-{split} 9: pets has {there} {split} images; give at most that, or leave "
        f"--num-{split} out"
    )
    assert len(load(pets, **{f"num_{split}": there}).splits[split]) == there


def test_a_sample_of_one_class_is_refused(pets: Path, message: Message) -> None:
    said = message(pets, num_train=1)
    assert said.startswith("the 1 train images of pets that --num-train keeps are all of one class")


def test_lost_classes_are_told(tmp_path: Path, load: Load) -> None:
    root = tmp_path / "pets"
    for split in ("train", "test"):
        make_tree(root / split, {"cat": 20, "dog": 20, "eel": 1})
    dataset = load(root, num_train=4)
    assert dataset.notes == ("the 4 train images have 2 of 3 classes: see --num-train",)


def test_one_long_path_that_widens_all_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load, message: Message
) -> None:
    root = make_folder(tmp_path / "pets", train=20)
    monkeypatch.setattr(datasets, "WIDE_BYTES", 2000)
    assert load(root).notes == ()
    (root / "train" / "cat" / ("a" * 200 + ".png")).write_bytes(encoded(picture(9)))
    assert message(root) == (
        "the paths of the train images would take 0 MB in the cache, because each takes the space "
        f"of the longest (214 bytes: train/cat/{'a' * 50}…): shorten that path, or remove the "
        "image"
    )


def test_what_cannot_be_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    def denied(path: object) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(datasets.os, "stat", denied)
    assert message("/secret/pets") == (
        "'/secret/pets' cannot be a dataset: Permission denied; make it readable, or give another "
        "one"
    )
    monkeypatch.undo()
    os.mkfifo(tmp_path / "list.csv")
    assert "list.csv is neither a folder nor a file" in message(tmp_path / "list.csv")


def fingerprint(root: Path, tmp_path: Path) -> str:
    return load_dataset(config(root, tmp_path)).fingerprint


def test_the_fingerprint_ignores_place_and_times(tmp_path: Path, pets: Path) -> None:
    before = fingerprint(pets, tmp_path)
    for path in pets.rglob("*.png"):
        os.utime(path, (1, 1))
    assert fingerprint(pets, tmp_path) == before
    shutil.copytree(pets, tmp_path / "else" / "copy")
    assert fingerprint(tmp_path / "else" / "copy", tmp_path) == before
    pets.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved", tmp_path) == before


def test_the_fingerprint_sees_every_change(tmp_path: Path, later: None, pets: Path) -> None:
    cat, dog = pets / "train" / "cat", pets / "train" / "dog"
    seen = [fingerprint(pets, tmp_path)]

    def note() -> None:
        seen.append(fingerprint(pets, tmp_path))

    (cat / "000.png").write_bytes(encoded(picture(500)))
    note()
    shutil.copy(cat / "000.png", cat / "100.png")
    note()
    (cat / "100.png").rename(dog / "100.png")  # relabeled
    note()
    (dog / "100.png").rename(dog / "101.png")
    note()
    (dog / "101.png").unlink()
    (cat / "000.png").write_bytes(b"")
    note()
    (cat / "000.png").unlink()
    note()
    for split in ("train", "test"):
        (pets / split / "dog").rename(pets / split / "hound")
    note()
    assert len(set(seen)) == len(seen) == 8


def test_the_fingerprint_sees_weights_and_bounds(tmp_path: Path) -> None:
    make_tree(tmp_path / "set", {"a": 2, "b": 2})

    def of(lines: list[str]) -> str:
        (tmp_path / "set" / "l.csv").write_text("\n".join(lines))
        return fingerprint(tmp_path / "set" / "l.csv", tmp_path)

    rows = [f"{c}/00{n}.png,{c},{'train' if n else 'test'}" for c in "ab" for n in range(2)]
    plain = of(["path,label,split", *rows])
    ones = of(["path,label,split,weight", *(row + ",1" for row in rows)])
    twos = of(["path,label,split,weight", *(row + ",2" for row in rows)])
    assert len({plain, ones, twos}) == 3


def test_ids_cannot_run_into_each_other(load: Load) -> None:
    dataset = load("digits", num_train=20, num_test=5)

    def renamed(ids: list[str]) -> str:
        train = dataset.splits["train"]
        other = dataset_module.ImageSplit(
            "train", ids + train.ids[2:], train.labels, train._source, positions=train._positions
        )
        splits = {**dataset.splits, "train": other}
        return dataclasses.replace(dataset, splits=splits).fingerprint

    assert renamed(["ab", "c"]) != renamed(["a", "bc"])


def test_hashes_are_remembered_between_runs(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch, pets: Path
) -> None:
    before = fingerprint(pets, tmp_path)
    read: list[str] = []
    real = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: read.append(path) or real(path))
    assert fingerprint(pets, tmp_path) == before
    assert read == []
    changed = pets / "test" / "dog" / "001.png"
    times = (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=times)
    assert fingerprint(pets, tmp_path) != before
    assert read == [str(changed)]


def test_contents_are_hashed_once_in_order(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "pets", train=40)
    split = load(root).splits["train"]
    content = split.content
    hashes = [hashlib.sha256((root / name).read_bytes()).digest() for name in split.ids]
    assert [row.tobytes() for row in content] == hashes
    assert split.content is content
    for array in (content, split.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


LIGHT = """
import sys
from pathlib import Path
from typing import Any
from featcache.config import DataConfig
from featcache.data import load_dataset
for name in sys.argv[2:]:
    top = Path(sys.argv[1])
    d = load_dataset(DataConfig(dataset=name, cache_dir=top, data_root=top))
    print(d.fingerprint)
heavy = {"torch", "torchvision", "sklearn", "scipy", "h5py", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_no_heavy_import_for_digits_folders_and_manifests(
    tmp_path: Path, load: Load, pets: Path
) -> None:
    (pets / "l.csv").write_text(
        "path,label,split\ntrain/cat/000.png,a,train\ntrain/dog/000.png,b,train\n"
        "test/cat/000.png,a,test\n"
    )
    names = ["digits", str(pets), str(pets / "l.csv")]
    result = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "cache"), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    wanted = [load(name).fingerprint for name in names]
    assert result.stdout.split() == wanted


def test_cifar10_sample_of_the_project(load: Load) -> None:
    root = REPO.parent / "shared" / "data" / "cifar10-2500"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    dataset: ImageDataset = load(root)
    assert len(dataset.splits["train"]) == 2000
    assert len(dataset.splits["test"]) == 500
    assert len(dataset.class_names) == 10
    assert all(split.load(0).size == (32, 32) for split in dataset.splits.values())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Pets", "pets"),
        ("my pets (2)", "my-pets-2"),
        ("../..", "dataset"),
        ("猫", "dataset"),
        ("a" * 200, "a" * 60),
        ("a.b_c-d", "a.b_c-d"),
    ],
)
def test_short_names_fit_a_file_name(text: str, name: str) -> None:
    assert short_name(text) == name


def copies_of(root: Path, tmp_path: Path, **settings: object) -> dict[str, Any]:
    return find_copies(load_dataset(config(root, tmp_path, **settings)).splits).report()


def test_copies_are_found_across_splits_and_labels(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", train=3, test=2)
    make_tree(root / "val", {"cat": 1, "dog": 1}, first=2000)
    assert copies_of(root, tmp_path) == {
        "num_copies": 0,
        "across_splits": [],
        "two_labels": {"num_images": 0, "examples": []},
    }
    shutil.copy(root / "train/cat/000.png", root / "train/cat/again.png")
    shutil.copy(root / "train/cat/001.png", root / "test/cat/seen.png")
    shutil.copy(root / "train/cat/002.png", root / "test/dog/seen.png")
    shutil.copy(root / "val/cat/000.png", root / "test/cat/val.png")
    found = copies_of(root, tmp_path)
    seen = [("test/cat/seen.png", "train/cat/001.png"), ("test/dog/seen.png", "train/cat/002.png")]
    assert found == {
        "num_copies": 4,
        "across_splits": [
            {"split": "test", "also_in": "train", "num_images": 2, "examples": seen},
            {
                "split": "test",
                "also_in": "val",
                "num_images": 1,
                "examples": [("test/cat/val.png", "val/cat/000.png")],
            },
        ],
        "two_labels": {"num_images": 1, "examples": seen[1:]},
    }
    assert copies_lines(found, {"train": 7, "test": 7, "val": 2}, divided=False) == [
        "test images that are also in train: 2 of 7 (such as test/cat/seen.png and "
        "train/cat/001.png); remove them from one split, or test scores are too high",
        "test images that are also in val: 1 of 7 (such as test/cat/val.png and "
        "val/cat/000.png); remove them from one split, or test scores are too high",
        "identical images with different labels: 1 (such as test/dog/seen.png and "
        "train/cat/002.png); correct the labels",
    ]


def test_copies_stay_on_one_side_of_a_share(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 20, "dog": 20})
    for file in sorted(root.rglob("*.png")):
        shutil.copy(file, file.with_name(f"{file.stem} (1).png"))
    dataset = load(root, test_fraction=0.25)
    assert np.bincount(dataset.splits["test"].labels).tolist() == [10, 10]
    found = find_copies(dataset.splits).report()
    assert (found["num_copies"], found["across_splits"]) == (40, [])
    assert copies_lines(found, {"train": 60, "test": 20}, divided=True) == [
        "copies of other images: 40 of 80; identical images were kept on one side of the split"
    ]


def test_groups_in_two_splits_are_counted_named_and_refused_if_asked(
    tmp_path: Path, load: Load, message: Message
) -> None:
    root = make_folder(tmp_path / "pets", train=4, test=2)
    pattern = r"(\d)\.png"  # 0 to 3 in train, 0 and 1 in test
    dataset = load(root, group_from=pattern)
    assert dataset.splits["test"].groups == ["0", "1", "0", "1"]
    said = (
        "groups of test that are also in train: 2 (0, 1); keep each in one split, or test scores "
        "are too high"
    )
    assert dataset.notes == (said,)
    assert message(root, group_from=pattern, strict=True) == f"{said} (or leave out --strict)"
    shutil.copy(root / "train/cat/001.png", root / "test/dog/seen.png")
    assert load(root).notes == ()
    assert message(root, strict=True) == (
        "test images that are also in train: 1 of 5 (such as test/dog/seen.png and "
        "train/cat/001.png); remove them from one split, or test scores are too high; identical "
        "images with different labels: 1 (such as test/dog/seen.png and train/cat/001.png); "
        "correct the labels (or leave out --strict)"
    )


def test_an_expression_that_finds_no_group_names_the_id(tmp_path: Path, message: Message) -> None:
    root = make_folder(tmp_path / "pets")
    assert message(root, group_from=r"(cat|eel)") == (
        "--group-from '(cat|eel)' finds no group in 4 of 8 ids, such as 'train/dog/000.png': "
        "change it so that its first (...) matches in each"
    )


def test_digits_take_groups_from_their_ids(load: Load) -> None:
    splits = load("digits", group_from=r"/(\d{3})", num_train=20, num_test=20).splits
    assert splits["test"].groups == [i[7:10] for i in splits["test"].ids]
    every = load("digits", group_from=r"/(\d{3})").splits
    assert not set(every["train"].groups or ()) & set(every["test"].groups or ())
    assert 300 < len(every["test"]) < 420

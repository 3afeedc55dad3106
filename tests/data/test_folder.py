"""Class-folder trees: what is found, and what is said about what is wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_helpers import Load, Message, config, encoded, make_folder, make_tree, number_in, picture
from featcache.config import DataConfig
from featcache.data import BadImage, listing, load_dataset, load_test_folder
from featcache.errors import UserError


def test_train_and_test(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "My Pets!", train=3, test=2)
    dataset = load(root)
    assert (dataset.name, dataset.kind) == ("my-pets", "folder")
    assert dataset.class_names == ["cat", "dog"]
    assert list(dataset.splits) == ["train", "test"]
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train.ids == [f"train/{c}/{n:03d}.png" for c in ("cat", "dog") for n in range(3)]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.ids[-1] == "test/dog/001.png"
    numbers = [number_in(np.asarray(s.load(i))) for s in (train, test) for i in range(len(s))]
    assert numbers == [0, 1, 2, 3, 4, 5, 1000, 1001, 1002, 1003]
    assert dataset.notes == ()
    info = dataset.info(config(root, tmp_path, seed=5))
    assert (info.seed, info.test_fraction, info.num_train) == (0, None, None)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_val_alone_serves_as_test(pets: Path, name: str, load: Load) -> None:
    (pets / "test").rename(pets / name)
    dataset = load(pets)
    assert list(dataset.splits) == ["train", "test"]
    assert dataset.splits["test"].name == "test"
    assert dataset.splits["test"].ids[0] == f"{name}/cat/000.png"


def test_all_three_splits(pets: Path, load: Load) -> None:
    make_tree(pets / "val", {"cat": 1, "dog": 2})
    dataset = load(pets)
    assert {name: len(s) for name, s in dataset.splits.items()} == {"train": 8, "test": 4, "val": 3}


def test_one_tree_with_a_share_for_testing(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 20, "dog": 10, "eel": 1})
    dataset = load(root, test_fraction=0.3, seed=3)
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert np.bincount(test.labels, minlength=3).tolist() == [6, 3, 0]
    assert not set(train.ids) & set(test.ids)
    assert train.ids == sorted(train.ids)
    assert train.ids[0].startswith("cat/")
    for split in (train, test):
        for row, sample_id in enumerate(split.ids):
            first = {"cat": 0, "dog": 20, "eel": 30}[sample_id[:3]]
            assert number_in(np.asarray(split.load(row))) == first + int(sample_id[4:7])
    again = load(root, test_fraction=0.3, seed=3)
    other = load(root, test_fraction=0.3, seed=4)
    assert again.splits["test"].ids == test.ids != other.splits["test"].ids
    info = dataset.info(config(root, tmp_path, test_fraction=0.3, seed=3))
    assert (info.seed, info.test_fraction) == (3, 0.3)


def test_a_class_called_train_in_a_tree_of_vehicles(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "vehicles", {"bus": 5, "train": 5})
    dataset = load(root, test_fraction=0.2)
    assert dataset.class_names == ["bus", "train"]


def test_nested_folders_hidden_files_and_other_files(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    make_tree(root / "train" / "cat", {"more": 1, ".hidden": 1, "__MACOSX": 1}, first=50)
    for name in (".DS_Store", "._000.png", "Thumbs.db", "notes.txt", "list.txt", "README"):
        (root / "train" / "cat" / name).write_bytes(b"x")
    (root / "train" / "labels.csv").write_text("x")
    (root / "train" / "cat" / "B.JPeG").write_bytes(encoded(picture(9), "JPEG"))
    (root / "extra").mkdir()
    dataset = load(root)
    assert dataset.splits["train"].ids == [
        "train/cat/000.png",
        "train/cat/B.JPeG",
        "train/cat/more/000.png",
        "train/dog/000.png",
    ]
    assert dataset.notes == (
        "ignored files of other kinds (.txt 2x, .csv 1x, .db 1x, ...)",
        "ignored folders beside train/: extra",
    )


def test_ids_are_sorted_where_class_names_are_in_another_order(tmp_path: Path, load: Load) -> None:
    """A space or a dash comes before the slash that ends a class's name."""
    names = {"cat": 2, "cat b": 1, "cat-a": 1, "cat/more": 1, "cats": 1}
    root = make_tree(tmp_path / "pets", names)
    (root / "cat" / "more-000.png").write_bytes(encoded(picture(9)))
    every = load(root, test_fraction=0.2)
    assert every.class_names == ["cat", "cat b", "cat-a", "cats"]
    found = {
        sample_id: every.class_names[label]
        for split in every.splits.values()
        for sample_id, label in zip(split.ids, split.labels, strict=True)
    }
    assert sorted(found) == [
        "cat b/000.png",
        "cat-a/000.png",
        "cat/000.png",
        "cat/001.png",
        "cat/more-000.png",
        "cat/more/000.png",
        "cats/000.png",
    ]
    assert all(sample_id.startswith(f"{name}/") for sample_id, name in found.items())
    assert all(split.ids == sorted(split.ids) for split in every.splits.values())


def test_links_are_followed(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    elsewhere = make_tree(tmp_path / "elsewhere", {"eel": 2}, first=70)
    (root / "train" / "eel").symlink_to(elsewhere / "eel")
    (root / "test" / "eel").mkdir()
    (root / "test" / "eel" / "x.png").symlink_to(elsewhere / "eel" / "001.png")
    (root / "test" / "eel" / "y.png").symlink_to(elsewhere / "absent.png")
    dataset = load(root)
    assert dataset.splits["train"].ids[-1] == "train/eel/001.png"
    assert number_in(np.asarray(dataset.splits["test"].load(2))) == 71
    with pytest.raises(BadImage, match="missing"):
        dataset.splits["test"].load(3)


def test_a_loop_of_links_is_refused(pets: Path, message: Message) -> None:
    (pets / "train" / "cat" / "again").symlink_to(pets / "train")
    assert "is a link to a folder that contains it: remove the link" in message(pets)


def test_a_link_to_itself_is_not_followed(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    (root / "train" / "cat" / "self.png").symlink_to(root / "train" / "cat" / "self.png")
    dataset = load(root)
    with pytest.raises(BadImage, match="unreadable"):
        dataset.splits["train"].load(1)


def test_folders_too_deep(pets: Path, message: Message) -> None:
    (pets / "train" / "cat").joinpath(*"d" * 40).mkdir(parents=True)
    assert "more than 32 folders deep" in message(pets)


def test_special_files_are_samples_that_cannot_be_read(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    os.mkfifo(root / "train" / "cat" / "pipe.jpg")
    split = load(root).splits["train"]
    assert split.content[1].tolist() == [0] * 31 + [5]
    with pytest.raises(BadImage, match="not a regular file"):
        split.load(1)


def test_an_empty_folder(tmp_path: Path, message: Message) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    assert message(root) == (f"{root} has no class folders: put images into {root}/<class>/")
    (root / "a.txt").write_text("x")
    assert "has no class folders (only files of other kinds (.txt 1x))" in message(root)


def test_folders_without_a_picture(tmp_path: Path, message: Message) -> None:
    root = tmp_path / "pets"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        (root / name / "x.mov").write_bytes(b"x")
    said = message(root, test_fraction=0.2)
    assert said.startswith(
        f"no image in the class folders of {root}, only files of other kinds (.mov 2x); "
        "image files end in .avif, .bmp, .gif,"
    )
    assert ".jpg" in said
    assert ".webp" in said


def test_pictures_outside_class_folders(tmp_path: Path, message: Message) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    for name in ("b.png", "a.png"):
        (root / name).write_bytes(encoded(picture(0)))
    assert message(root) == (
        f"{root} has images outside class folders (2, such as a.png): move them into "
        f"{root}/<class>/"
    )
    split = make_folder(tmp_path / "split")
    (split / "train" / "z.png").write_bytes(encoded(picture(0)))
    assert f"{split}/train has images outside class folders (1, such as z.png)" in message(split)


def test_one_class_only(tmp_path: Path, message: Message) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 3})
    said = message(root, test_fraction=0.2)
    assert said == f"{root} has only one class folder, 'cat': a classifier needs at least two"


def test_the_share_has_to_be_said(tmp_path: Path, message: Message) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 3, "dog": 3})
    assert message(root) == (
        f"{root} is one tree of 2 class folders without train/ and test/: say which fraction to "
        "set aside for testing, for example --test-fraction 0.2"
    )


def test_the_share_may_not_be_said_twice(pets: Path, message: Message) -> None:
    said = message(pets, test_fraction=0.2)
    assert said == f"{pets} has its own test/: leave out --test-fraction"


def test_half_a_split(pets: Path, message: Message) -> None:
    shutil.rmtree(pets / "test")
    assert message(pets) == (
        f"{pets} has train/ but neither test/ nor val/: add one, or give {pets}/train itself with "
        "--test-fraction 0.2"
    )
    (pets / "train").rename(pets / "test")
    assert message(pets) == (f"{pets} has test/ but no train/: add train/<class>/ folders")


def test_two_folders_for_one_split(pets: Path, message: Message) -> None:
    (pets / "val").mkdir()
    (pets / "valid").mkdir()
    assert message(pets) == f"{pets} has both val/ and valid/: keep one of them"


def test_classes_that_differ(pets: Path, message: Message) -> None:
    (pets / "test" / "dog").rename(pets / "test" / "dogs")
    make_tree(pets / "train", {"eel": 1})
    assert message(pets) == (
        f"the class folders of {pets}/train and test/ differ: only train/ has 'dog', 'eel'; only "
        "test/ has 'dogs'; make them the same"
    )


def test_an_empty_class_folder(pets: Path, message: Message, load: Load) -> None:
    (pets / "train" / "eel").mkdir()
    (pets / "test" / "eel").mkdir()
    assert message(pets) == (
        f"no image in class folder {pets}/train/eel: add some or remove the folder"
    )
    make_tree(pets / "train", {"eel": 1})
    assert load(pets).class_names == ["cat", "dog", "eel"]


def test_an_empty_class_folder_in_a_single_tree(tmp_path: Path, message: Message) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 5, "dog": 5})
    (root / "eel").mkdir()
    said = message(root, test_fraction=0.2)
    assert said == f"no image in class folder {root}/eel: add some or remove the folder"


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"new\nline.png", b"\x7f.png"])
def test_names_that_cannot_be_told(pets: Path, name: bytes, message: Message) -> None:
    try:
        with open(os.fsencode(pets / "train" / "cat") + b"/" + name, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    said = message(pets)
    assert f"the name {name!r} in {pets}/train/cat is not UTF-8, or has control" in said


def test_names_in_any_script(tmp_path: Path, load: Load) -> None:
    root = make_folder(tmp_path / "haustiere", train=1, test=1)
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "чёрный кот 猫 🐈")
    dataset = load(root)
    assert dataset.class_names == ["cat", "чёрный кот 猫 🐈"]
    assert len(dataset.fingerprint) == 64


def test_a_folder_that_cannot_be_listed(
    pets: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:

    def denied(_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(listing.os, "scandir", denied)
    assert message(pets) == (
        f"cannot list {pets}: Permission denied; make it readable, or give another folder"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_class_folder_without_permission(pets: Path, message: Message) -> None:
    (pets / "train" / "cat").chmod(0)
    try:
        assert f"cannot list {pets}/train/cat: Permission denied" in message(pets)
    finally:
        (pets / "train" / "cat").chmod(0o700)


def test_systems_folders_are_never_classes_nor_pictures(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 4, "dog": 4})
    for name in ("@eaDir", "lost+found", "__pycache__", "$RECYCLE.BIN", "#recycle", ".cache"):
        make_tree(root / name, {"000.png": 1}, first=500)
        make_tree(root / "cat", {name: 1}, first=600)
    (root / "System Volume Information").mkdir()
    dataset = load(root, test_fraction=0.25)
    assert dataset.class_names == ["cat", "dog"]
    assert sum(map(len, dataset.splits.values())) == 8
    assert dataset.notes == ()


def test_the_cache_folder_is_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 4, "dog": 4})
    monkeypatch.chdir(root)
    settings = DataConfig(dataset=".", test_fraction=0.25)
    before = load_dataset(settings).fingerprint
    (root / "cache").mkdir()
    (root / "cache" / "a.h5").write_bytes(b"x")
    make_tree(root / "cache", {"benchmark-pets": 1})  # pictures of our own
    make_tree(root / "data", {"eurosat": 1})
    again = load_dataset(settings)
    assert again.fingerprint == before
    assert again.notes == ("left out cache/, data/: featcache's own files",)
    # From above, where the default --cache-dir is another folder.
    shutil.rmtree(root / "cache" / "benchmark-pets")
    shutil.rmtree(root / "data")
    other = load(root, test_fraction=0.25)
    assert (other.fingerprint, other.name) == (before, "pets")
    assert other.notes == ("left out cache/: featcache's own files",)


def test_the_cache_folder_beside_and_in_train(pets: Path, message: Message) -> None:
    for place in (pets / "cache", pets / "train" / "old"):
        place.mkdir()
        (place / "pets.h5.part").write_bytes(b"x")
    dataset = load_dataset(DataConfig(dataset=str(pets), cache_dir=pets / "cache"))
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.notes == ("left out old/: featcache's own files",)
    shutil.rmtree(pets / "test")
    said = message(pets, test_fraction=0.2)
    assert said.startswith(f"{pets} has train/ but neither test/ nor val/")


def test_a_cache_folder_that_is_a_class(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "things", {"cache": 2, "coin": 2})
    with pytest.raises(UserError, match="where featcache keeps its own files, but has images"):
        load_dataset(DataConfig(dataset=str(root), cache_dir=root / "cache", test_fraction=0.5))
    assert load(root, test_fraction=0.5).class_names == ["cache", "coin"]
    (root / "coin" / "features.h5").write_bytes(b"x")  # a file of ours makes no class vanish
    assert load(root, test_fraction=0.5).class_names == ["cache", "coin"]


def test_class_names_in_two_unicode_forms(pets: Path, message: Message) -> None:
    (pets / "train" / "dog").rename(pets / "train" / "caf\u00e9")
    (pets / "test" / "dog").rename(pets / "test" / "cafe\u0301")
    said = message(pets)
    assert said.endswith(
        "('cafe\u0301' and 'caf\u00e9' (the same letters in two Unicode forms, NFC and NFD)); "
        "make them the same"
    )


def test_a_test_folder_without_labels(pets: Path, message: Message) -> None:
    shutil.rmtree(pets / "test")
    (pets / "test").mkdir()
    (pets / "test" / "1.png").write_bytes(encoded(picture(0)))
    assert message(pets) == (
        f"{pets}/test has images (1, such as 1.png) but no class folders, so nothing can be "
        f"scored on it: give {pets}/train itself with --test-fraction 0.2, or move them into "
        f"{pets}/test/<class>/"
    )
    (pets / "test" / "unknown").mkdir()
    (pets / "test" / "1.png").rename(pets / "test" / "unknown" / "1.png")
    assert message(pets).endswith(
        f"make them the same, or give {pets}/train itself with --test-fraction 0.2"
    )


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"new\nline.png", b"\xff"])
def test_names_that_cannot_be_told_are_skipped_when_asked(
    tmp_path: Path, name: bytes, load: Load, message: Message
) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    full = os.fsencode(root / "train" / "cat") + b"/" + name
    try:
        os.mkdir(full) if name == b"\xff" else open(full, "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "or leave such files out with --on-error skip" in message(root)
    dataset = load(root, on_error="skip")
    assert dataset.splits["train"].ids == ["train/cat/000.png", "train/dog/000.png"]
    assert dataset.notes == (
        "left out because their names are too long, not UTF-8, or have control characters: 1 "
        f"({full!r})",
    )


def test_a_class_is_not_left_out_for_its_name(tmp_path: Path, message: Message) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    (root / "train" / "new\nline").mkdir()
    said = message(root, on_error="skip")
    assert said.endswith("is not UTF-8, or has control characters: rename it")


def test_paths_longer_than_a_cache_or_the_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load, message: Message
) -> None:
    root = make_folder(tmp_path / "pets", train=1, test=1)
    deep = root / "train" / "cat"
    with contextlib.chdir(deep):
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        Path("x.png").write_bytes(b"x")
    assert "File name too long" in message(root)
    monkeypatch.setattr(listing, "MAX_NAME_BYTES", 40)
    (deep / ("e" * 40 + ".png")).write_bytes(b"x")
    dataset = load(root, on_error="skip")
    assert dataset.splits["train"].ids == ["train/cat/000.png", "train/dog/000.png"]
    assert "control characters: 2 (" in dataset.notes[0]


def test_a_tree_as_a_second_test_set_has_the_labels_of_the_first(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "Elsewhere", {"dog": 2, "eel": 1})
    (top / "cat").mkdir()
    given = config("digits", tmp_path)
    dataset = load_test_folder(given, top, ["ant", "cat", "dog", "eel"])
    assert list(dataset.splits) == ["test"]
    assert (dataset.name, dataset.class_names) == ("elsewhere", ["ant", "cat", "dog", "eel"])
    test = dataset.splits["test"]
    assert test.ids == ["dog/000.png", "dog/001.png", "eel/000.png"]
    assert test.labels.tolist() == [2, 2, 3]
    assert dataset.notes == (f"{top} has no images of ant, cat",)


def test_a_second_test_set_of_other_classes(tmp_path: Path) -> None:
    given = config("digits", tmp_path)
    top = make_tree(tmp_path / "other", {"cat": 1, **dict.fromkeys("uvwxyz", 1)})
    with pytest.raises(UserError) as caught:
        load_test_folder(given, top, ["cat", "dog"])
    assert str(caught.value) == (
        f"{top} has class folders that are not among the classes of train: 'u', 'v', 'w', 'x', 'y' "
        "and 1 more; rename or remove them"
    )
    (top / "loose.png").write_bytes(encoded(picture(1)))
    with pytest.raises(UserError, match="has images outside class folders"):
        load_test_folder(given, top, ["cat", "dog"])
    with pytest.raises(UserError, match=r"there is no folder .*: give a folder of class folders"):
        load_test_folder(given, top / "loose.png", ["cat", "dog"])

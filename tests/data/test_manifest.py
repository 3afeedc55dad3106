"""CSV manifests: what is read, and one line for each thing that can be wrong."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_helpers import Load, Message, config, make_tree, number_in
from featcache.data import BadImage, load_dataset
from featcache.errors import UserError

GOOD = [
    "path,label,split",
    "img/a/000.png,cat,train",
    "img/a/001.png,cat,test",
    "img/b/000.png,dog,train",
    "img/b/001.png,dog,test",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tree(tmp_path / "set" / "img", {"a": 3, "b": 3})
    return tmp_path / "set"


def write(folder: Path, lines: list[str] | bytes) -> Path:
    file = folder / "list.csv"
    file.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode() + b"\n")
    return file


@pytest.fixture
def message(message: Message) -> Message:
    """The message with the manifest's path as list.csv, and its folder as DIR."""
    return lambda file, **settings: (
        message(file, **settings).replace(str(file), "list.csv").replace(str(file.parent), "DIR")
    )


def test_with_splits(folder: Path, tmp_path: Path, load: Load) -> None:
    dataset = load(write(folder, GOOD))
    assert (dataset.name, dataset.kind, dataset.class_names) == ("list", "manifest", ["cat", "dog"])
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train.ids == ["img/a/000.png", "img/b/000.png"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 1]
    assert train.weights is None
    assert [number_in(np.asarray(test.load(i))) for i in range(2)] == [1, 4]
    assert dataset.info(config(folder, tmp_path)).seed == 0


def test_rows_are_sorted_whatever_the_files_order(folder: Path, load: Load) -> None:
    one = load(write(folder, GOOD))
    two = load(write(folder, [GOOD[0], *GOOD[:0:-1]]))
    assert one.splits["train"].ids == two.splits["train"].ids
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    "data",
    [
        "\ufeff" + "\n".join(GOOD),  # a byte order mark
        "\r\n".join(GOOD),
        "\n\n".join(GOOD),  # empty lines
        "\n".join(line.replace("img/a/000.png", '"img/a/000.png"') for line in GOOD),
        "\n".join([GOOD[0].upper(), *GOOD[1:]]),
        "\n".join([GOOD[0].replace(",", " , "), *GOOD[1:]]),
        "\n".join(line.replace(",cat,train", ", cat ,Train ") for line in GOOD),
        "\n".join(", ".join(f'"{field}"' for field in line.split(",")) for line in GOOD),
        "\n".join(",".join(reversed(line.split(","))) for line in GOOD),
    ],
)
def test_forms_that_mean_the_same(folder: Path, data: str, load: Load) -> None:
    dataset = load(write(folder, data.encode()))
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.splits["train"].ids == ["img/a/000.png", "img/b/000.png"]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_val_may_be_called_as_folders_call_it(folder: Path, name: str, load: Load) -> None:
    file = write(folder, [*GOOD, f"img/a/002.png,cat,{name}"])
    assert list(load(file).splits) == ["train", "test", "val"]
    file = write(folder, [line.replace(",test", f",{name}") for line in GOOD])
    assert list(load(file).splits) == ["train", "test"]


def test_classes_that_look_alike_are_named(folder: Path, load: Load) -> None:
    lines = [GOOD[0], "img/a/000.png,1,train", "img/a/001.png,1.0,train"]
    lines += ["img/b/000.png,Dog,train", "img/b/001.png,dog,train", "img/b/002.png,dog,test"]
    assert load(write(folder, lines)).notes == (
        "classes that may be the same: 'Dog' and 'dog' (they differ only in case or spaces); "
        "'1' and '1.0' (the same number)",
    )


def test_an_image_root(folder: Path, tmp_path: Path, load: Load, message: Message) -> None:
    (tmp_path / "lists").mkdir()
    file = write(tmp_path / "lists", GOOD)
    assert "list.csv, line 2: img/a/000.png: No such file" in message(file)
    dataset = load(file, image_root=folder)
    assert dataset.fingerprint == load(write(folder, GOOD)).fingerprint
    assert number_in(np.asarray(dataset.splits["test"].load(1))) == 4
    write(tmp_path / "lists", [*GOOD, "../x.png,cat,train"])
    assert message(file, image_root=folder) == (
        f"list.csv, line 6: ../x.png leaves --image-root; paths must stay in {folder}/: give the "
        "images' folder with --image-root, or add --allow-outside"
    )
    assert message(file, image_root=folder / "absent") == (
        f"--image-root {folder}/absent is not a folder that can be read; check it"
    )
    for name in (folder / "img", "digits"):
        said = message(Path(name), image_root=folder, test_fraction=0.2)
        assert "--image-root is for CSV manifests, not for " in said


def test_paths_outside_when_asked_for(
    folder: Path, tmp_path: Path, load: Load, message: Message
) -> None:
    make_tree(tmp_path / "else", {"c": 3}, first=70)
    (folder / "linked").symlink_to(tmp_path / "else")
    lines = [*GOOD, f"{tmp_path}/else/c/000.png,cat,train", "../else/c/001.png,cat,train"]
    file = write(folder, [*lines, "linked/c/002.png,cat,test"])
    dataset = load(file, allow_outside=True)
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert [number_in(np.asarray(train.load(row))) for row in (0, 1)] == [71, 70]
    assert train.ids[:2] == ["../else/c/001.png", f"{tmp_path}/else/c/000.png"]
    assert number_in(np.asarray(test.load(2))) == 72
    write(folder, [*lines, f"{folder}/img/b/000.png,dog,train"])
    said = message(file, allow_outside=True)
    assert "duplicate path DIR/img/b/000.png, first in line 4" in said


def test_rows_with_unusable_paths_can_be_skipped(folder: Path, load: Load) -> None:
    lines = [*GOOD, '"a', 'b.png",cat,train', "é" * 2100 + ".png,cat,train"]
    dataset = load(write(folder, lines), on_error="skip")
    assert dataset.splits["train"].ids == ["img/a/000.png", "img/b/000.png"]
    assert dataset.notes == (
        "left out because their names are too long, not UTF-8, or have control characters: 2 "
        "(line 7, line 8)",
    )


def test_a_file_in_the_other_unicode_form_is_named(folder: Path, message: Message) -> None:
    (folder / "cafe\u0301.png").touch()
    said = message(write(folder, [*GOOD, "caf\u00e9.png,cat,train"]))
    assert "No such file or directory (the file's name is in Unicode form NFD, the manifest" in said


def test_a_share_for_testing(folder: Path, tmp_path: Path, load: Load) -> None:
    lines = ["path,label", *(f"img/{c}/00{n}.png,{c}" for c in "ab" for n in range(3))]
    dataset = load(write(folder, lines), test_fraction=0.34)
    assert dataset.splits["test"].labels.tolist() == [0, 1]
    assert dataset.info(config(folder, tmp_path, seed=42)).seed == 42


def test_val_alone_serves_as_test_and_weights_are_kept(folder: Path, load: Load) -> None:
    lines = [GOOD[0] + ",weight,camera"]
    lines += [f"{line.replace(',test', ',val')},{n}.5,x" for n, line in enumerate(GOOD[1:])]
    dataset = load(write(folder, lines))
    assert list(dataset.splits) == ["train", "test"]
    weights = dataset.splits["train"].weights
    assert weights is not None
    assert (weights.dtype, weights.tolist()) == (np.float32, [0.5, 2.5])
    assert dataset.notes == (
        "ignored columns of the manifest: 'camera' (known: path, label, labels, "
        "target, split, weight, group)",
    )


def test_all_three_splits(folder: Path, load: Load) -> None:
    dataset = load(write(folder, [*GOOD, "img/a/002.png,cat,val"]))
    assert list(dataset.splits) == ["train", "test", "val"]


def test_a_class_without_test_rows_is_fine(folder: Path, load: Load) -> None:
    dataset = load(write(folder, GOOD[:-1]))
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.splits["test"].labels.tolist() == [0]


WRONG = {
    "empty file": (b"", "list.csv, line 1: no column 'path' and 'label'; the first line is '', "),
    "no path": (["label,split", "a,b"], "list.csv, line 1: no column 'path'; the first line is "),
    "semicolons": (["path;label", "a;b"], "no column 'path' and 'label'; the first line is 'path;"),
    "column twice": (["path,label,label"], "list.csv, line 1: duplicate column 'label'; keep one"),
    "header only": (["path,label"], "list.csv has a header but no rows: add lines of path,label"),
    "too few fields": ([*GOOD, "img/a/002.png"], "line 6: fields: 1, but the header has 3"),
    "too many fields": ([*GOOD, "a,b,train,c"], "line 6: fields: 4, but the header has 3"),
    "empty path": ([*GOOD, ",cat,train"], "list.csv, line 6: the path is empty"),
    "empty label": ([*GOOD, "img/a/002.png, ,train"], "list.csv, line 6: the label is empty"),
    "empty split": ([*GOOD, "img/a/002.png,cat,"], "list.csv, line 6: split ''; one of train, "),
    "odd split": ([*GOOD, "img/a/002.png,cat,dev"], "list.csv, line 6: split 'dev'; one of train,"),
    "missing file": (
        [*GOOD, "img/a/009.png,cat,train"],
        "list.csv, line 6: img/a/009.png: No such file or directory; correct the path, or skip "
        "such rows with --on-error skip",
    ),
    "backslashes": ([*GOOD, "img\\a\\002.png,cat,train"], "(write / between folders)"),
    "a folder": ([*GOOD, "img/a,cat,train"], "list.csv, line 6: img/a is not a file"),
    "absolute": ([*GOOD, "/etc/passwd,cat,train"], "line 6: /etc/passwd is an absolute path; give"),
    "outside": ([*GOOD, "../x.png,cat,train"], "line 6: ../x.png leaves the manifest's folder"),
    "outside and back": ([*GOOD, "img/../../x,cat,train"], "line 6: img/../../x leaves the"),
    "itself": ([*GOOD, ".,cat,train"], "line 6: . leaves the manifest's folder; paths must stay"),
    "twice": ([*GOOD, GOOD[1]], "list.csv, line 6: duplicate path img/a/000.png, first in line 2"),
    "twice in disguise": (
        [*GOOD, "./img/b/../a/000.png,dog,test"],
        "line 6: duplicate path ./img/b/../a/000.png, first in line 2",
    ),
    "one class": ([GOOD[0], GOOD[1], GOOD[2]], "list.csv: the train rows have only one label, 'c"),
    "class in another case": (
        [*GOOD, "img/a/002.png,Cat,test"],
        "label 'Cat' has no train row ('Cat' and 'cat' (they differ only in case or spaces)); add",
    ),
    "class only in test": (
        [*GOOD, "img/a/002.png,eel,test"],
        "list.csv, line 6: label 'eel' has no train row; add one or correct the label",
    ),
    "no train": ([GOOD[0], GOOD[2], GOOD[4]], "list.csv: no row has split train; train and test"),
    "no test": ([GOOD[0], GOOD[1], GOOD[3]], "list.csv: no row has split test; train and test ar"),
    "latin-1": ("\n".join([*GOOD, "café"]).encode("latin-1"), "list.csv, line 6: not UTF-8"),
    "utf-16": ("\n".join(GOOD).encode("utf-16"), "list.csv, line 1: has a NUL byte; save the file"),
    "NUL": ([*GOOD, "a\0b,cat,train"], "list.csv, line 6: has a NUL byte; save the file as text"),
    "control": (
        [*GOOD, "a\x1bb,cat,train"],
        "line 6: the path has a line break or another control",
    ),
    "line break": (
        [*GOOD, '"a', 'b",cat,train'],
        "list.csv, line 7: the path has a line break or another control character; correct it, or "
        "leave such rows out with --on-error skip",
    ),
    "control in a label": (
        [*GOOD, "a,c\x1bt,train"],
        "line 6: a field has a line break or another",
    ),
    "open quote": ([*GOOD, '"a,cat,train'], "list.csv, line 6: not CSV: unexpected end of data"),
    "stray quote": ([*GOOD, '"a"b,cat,train'], "list.csv, line 6: not CSV: ',' expected after"),
    "huge field": (
        [*GOOD, "a" * 200_000 + ",cat,train"],
        "list.csv, line 6: not CSV: field larger",
    ),
    "long field": (
        [*GOOD, "a" * 5000 + ",cat,train"],
        "list.csv, line 6: the path has more than 4096 bytes; correct it, or leave such rows out ",
    ),
    "long label": (
        [*GOOD, f"a,{'c' * 300},train"],
        "list.csv, line 6: the label is too long; at most 256 characters",
    ),
    "long name": ([*GOOD, "a" * 300 + ",cat,train"], "File name too long; correct the path"),
    "old Mac": ("\r".join(GOOD).encode(), "line 1: not CSV: new-line character seen in unquoted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line(case: str, folder: Path, message: Message) -> None:
    lines, said = WRONG[case]
    assert said in message(write(folder, lines))


@pytest.mark.parametrize("weight", ["", "x", "nan", "inf", "-1", "1e39", "1_0x"])
def test_weights_are_numbers(weight: str, folder: Path, message: Message) -> None:
    lines = [GOOD[0] + ",weight", *(f"{line},{weight}" for line in GOOD[1:])]
    said = message(write(folder, lines))
    assert said == f"list.csv, line 2: weight {weight!r}; give a number of 0 or more"


def test_a_share_is_said_if_and_only_if_it_is_needed(folder: Path, message: Message) -> None:
    said = message(write(folder, GOOD), test_fraction=0.2)
    assert said == "list.csv has its own column split: leave out --test-fraction"
    lines = [",".join(line.split(",")[:2]) for line in GOOD]
    said = message(write(folder, lines))
    assert "say which fraction to set aside for testing, for example --test-fraction 0.2" in said


def test_links_must_stay_inside_too(
    folder: Path, tmp_path: Path, load: Load, message: Message
) -> None:
    make_tree(tmp_path / "secret", {"a": 1})
    (folder / "link.png").symlink_to(tmp_path / "secret" / "a" / "000.png")
    (folder / "dir").symlink_to(tmp_path / "secret")
    (folder / "fine.png").symlink_to(folder / "img" / "a" / "002.png")
    for path in ("link.png", "dir/a/000.png"):
        said = message(write(folder, [*GOOD, f"{path},cat,train"]))
        assert said.startswith(f"list.csv, line 6: {path} leaves the manifest's folder")
    dataset = load(write(folder, [*GOOD, "fine.png,cat,train"]))
    assert number_in(np.asarray(dataset.splits["train"].load(0))) == 2


def test_a_folder_whose_name_starts_alike_is_outside(
    folder: Path, tmp_path: Path, message: Message
) -> None:
    make_tree(tmp_path / "set2", {"a": 1})
    (folder / "link.png").symlink_to(tmp_path / "set2" / "a" / "000.png")
    assert "leaves" in message(write(folder, [*GOOD, "link.png,cat,train"]))


def test_a_manifest_reached_through_a_link(folder: Path, tmp_path: Path, load: Load) -> None:
    write(folder, GOOD)
    (tmp_path / "other").symlink_to(folder)
    dataset = load(tmp_path / "other" / "list.csv")
    assert number_in(np.asarray(dataset.splits["train"].load(1))) == 3


def test_missing_files_can_be_skipped(folder: Path, load: Load) -> None:
    file = write(folder, [*GOOD, "img/a/009.png,cat,train"])
    split = load(file, on_error="skip").splits["train"]
    assert split.ids[1] == "img/a/009.png"
    assert split.content[1].tolist() == [0] * 31 + [6]
    with pytest.raises(BadImage, match="missing"):
        split.load(1)


def test_a_manifest_that_is_far_too_large(
    folder: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    monkeypatch.setattr("featcache.data.manifest.MAX_BYTES", 50)
    assert "is larger than 50 bytes" in message(write(folder, GOOD))


def fuzz(folder: Path, tmp_path: Path, rng: random.Random, cases: int) -> int:
    """Mutated manifests load or are refused in one line; how many were refused."""
    good = "\n".join(GOOD).encode()
    tokens = [
        b",",
        b'"',
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"../",
        b"/",
        b"train",
        b"cat",
        b"\xef\xbb\xbf",
    ]
    refused = 0
    for _ in range(cases):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = rng.randrange(len(data))
            length = rng.choice([0, 0, 1, 6])
            data[place : place + length] = rng.choice([*tokens, bytes([rng.randrange(256)])])
        said = ""
        try:
            dataset = load_dataset(config(write(folder, bytes(data)), tmp_path))
            assert all(len(split) for split in dataset.splits.values())
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        refused += bool(said)
    return refused


def test_damaged_manifests(folder: Path, tmp_path: Path) -> None:
    assert fuzz(folder, tmp_path, random.Random(0), 300) > 100


@pytest.mark.slow
def test_damaged_manifests_at_length(folder: Path, tmp_path: Path) -> None:
    assert fuzz(folder, tmp_path, random.Random(1), 20_000) > 5000


def test_groups_stay_on_one_side_of_a_share(tmp_path: Path, load: Load) -> None:
    root = make_tree(tmp_path / "set", {"cat": 30, "dog": 30})
    lines = [f"{c}/{i:03d}.png,{c},student {i // 3}" for c in ("cat", "dog") for i in range(30)]
    splits = load(write(root, ["path,label,group", *lines]), test_fraction=0.2).splits
    assert np.bincount(splits["test"].labels).tolist() == [6, 6]
    assert len(set(splits["test"].groups or ())) == 2
    assert len(set(splits["train"].groups or ())) == 8
    assert not set(splits["train"].groups or ()) & set(splits["test"].groups or ())
    # The same groups from the ids; another expression is another dataset.
    two = load(root, test_fraction=0.2, group_from=r"(\d\d)\d\.png")
    assert len(set(two.splits["train"].groups or ())) == 2


def test_groups_are_part_of_the_fingerprint(folder: Path, load: Load) -> None:
    plain = load(write(folder, GOOD))
    grouped = [
        load(write(folder, [GOOD[0] + ",group", *(f"{line},{g}" for line in GOOD[1:])]))
        for g in ("a", "b")
    ]
    assert len({dataset.fingerprint for dataset in (plain, *grouped)}) == 3
    assert grouped[0].splits["test"].groups == ["a", "a"]


@pytest.mark.parametrize("name", ["lable", "labell", "labe"])
def test_a_misspelt_column_is_refused_with_the_right_name(
    name: str, folder: Path, message: Message
) -> None:
    said = message(write(folder, [f"path,{name},split", *GOOD[1:]]))
    assert said == f"list.csv, line 1: column {name!r} is not known; rename it 'label'"


@pytest.mark.parametrize(
    ("name", "meant"), [("gruop", "group"), ("Groups", "group"), ("wieght", "weight")]
)
def test_a_misspelt_optional_column_too(
    name: str, meant: str, folder: Path, message: Message
) -> None:
    said = message(write(folder, [f"{GOOD[0]},{name}", *(f"{line},1" for line in GOOD[1:])]))
    assert said == f"list.csv, line 1: column {name.lower()!r} is not known; rename it {meant!r}"


def test_other_columns_are_named_and_case_does_not_matter(folder: Path, load: Load) -> None:
    header = "Path,Label,Split,height,patch,weight_kg"
    dataset = load(write(folder, [header, *(f"{line},1,2,3" for line in GOOD[1:])]))
    assert dataset.notes == (
        "ignored columns of the manifest: 'height', 'patch', 'weight_kg' (known: path, label, "
        "labels, target, split, weight, group)",
    )
    assert list(dataset.splits) == ["train", "test"]


def test_every_row_has_a_group(folder: Path, message: Message) -> None:
    lines = [f"{GOOD[0]},group", *(f"{line},g" for line in GOOD[1:-1]), GOOD[-1] + ","]
    assert message(write(folder, lines)) == (
        "list.csv, line 5: group ''; give a name of 1 to 256 characters, and an image that belongs "
        "to no other one of its own"
    )
    lines[-1] += "h"
    said = message(write(folder, lines), group_from="(.)")
    assert said == "list.csv has its own column group: leave out --group-from"


def test_several_labels_per_image(folder: Path, load: Load, tmp_path: Path) -> None:
    lines = [
        "path,labels,split",
        "img/a/000.png,red | round,train",
        "img/a/001.png,,test",
        "img/b/000.png,shiny|red|red,train",
        "img/b/001.png,round,test",
        "img/a/002.png,,train",
    ]
    dataset = load(write(folder, lines))
    assert dataset.class_names == ["red", "round", "shiny"]
    train, test = dataset.splits["train"].targets, dataset.splits["test"].targets
    assert train is not None
    assert test is not None
    assert train.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert test.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert dataset.splits["train"].labels.tolist() == [0, 0, 0]
    assert dataset.info(config(folder, tmp_path)).task == "multilabel"
    lines[1] = "img/a/000.png,round,train"
    assert load(write(folder, lines)).fingerprint != dataset.fingerprint


def test_a_number_per_image(folder: Path, load: Load, tmp_path: Path) -> None:
    cells = [line.split(",") for line in GOOD[1:]]
    rows = [f"{path},{number}.5,{split}" for number, (path, _, split) in enumerate(cells)]
    lines = ["path,target,split", *rows]
    dataset = load(write(folder, lines))
    assert dataset.class_names == ["target"]
    assert dataset.splits["train"].targets.tolist() == [0.5, 2.5]  # type: ignore[union-attr]
    assert dataset.info(config(folder, tmp_path)).task == "regression"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["labels,label", "a,a"], "1: columns label and labels; keep one of them"),
        (["target", "much"], "2: target 'much'; give a number"),
        (["target", "inf"], "2: target 'inf'; give a number"),
        (["labels", "a||b"], "2: the label is empty; write a|b, or leave it empty"),
        (["labels", ""], ": no train row has a label; give some of them labels"),
        (["labels", "a", "b|a"], "3: label 'b' has no train row; add one or correct the label"),
    ],
)
def test_wrong_labels_and_targets(
    lines: list[str], said: str, folder: Path, message: Message
) -> None:
    header, first, second = [*lines, "a" if "label" in lines[0] else "1"][:3]
    second = "" if "no train row has" in said else second
    rows = [f"img/a/000.png,{first},train", f"img/b/000.png,{second},test"]
    where = "list.csv" if said.startswith(":") else "list.csv, line "
    assert message(write(folder, [f"path,{header},split", *rows])) == where + said


def test_the_other_column_for_labels_is_suggested(folder: Path, load: Load) -> None:
    several = [GOOD[0], *(line.replace("cat", "cat|pet") for line in GOOD[1:])]
    assert load(write(folder, several)).notes == (
        "labels with | in them are classes of their own: if images have several labels, rename "
        "the column label to labels",
    )
    single = [GOOD[0].replace("label", "labels"), *GOOD[1:]]
    assert load(write(folder, single)).notes == (
        "every image has exactly one label: rename the column labels to label for one class per "
        "image",
    )

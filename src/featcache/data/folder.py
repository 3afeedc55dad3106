"""Class-folder trees: train/<class>/*.jpg beside test/<class>/*.jpg, or one such tree."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit, short_name
from featcache.data.images import EXTENSIONS
from featcache.data.sampling import split_off_test
from featcache.data.sources import FileSource
from featcache.errors import UserError
from featcache.memo import Memo

SPLIT_FOLDERS = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
_IGNORED_FOLDERS = {"__MACOSX"}
MAX_DEPTH = 32
_ACCEPTED = ", ".join(EXTENSIONS)


@dataclass
class _Tree:
    """What one class-folder tree holds: ids relative to the dataset's folder, by class."""

    top: Path
    by_class: dict[str, list[str]]
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def num_images(self) -> int:
        return sum(len(ids) for ids in self.by_class.values())


def load_folder(config: DataConfig, root: Path, memo: Memo) -> ImageDataset:
    """Read a folder with train/ and test/ (or val/), or one class-folder tree.

    Raises:
        UserError: It is not such a folder; the message says what is wrong and what to do.
    """
    tops, beside = _split_tops(root)
    if "train" in tops and len(tops) > 1:
        if config.test_fraction is not None:
            others = " and ".join(f"{tops[s].name}/" for s in tops if s != "train")
            raise UserError(f"{root} has its own {others}: leave out --test-fraction")
        return _load_split_tree(root, tops, memo, beside)
    if not beside or config.test_fraction is None:
        # With other folders and a share, train/ may well be a class: of vehicles, say.
        _refuse_half_split(root, tops)
    tree = _read_tree(root, root)
    if config.test_fraction is None:
        raise UserError(
            f"{root} is one tree of {len(tree.by_class)} class folders without train/ and test/: "
            "say which share to set aside for testing, for example --test-fraction 0.2"
        )
    _refuse_empty_classes(tree)
    every = _split_of("all", tree, root, sorted(tree.by_class), memo)
    splits = split_off_test(every, config.test_fraction, config.seed)
    return ImageDataset(
        short_name(root.resolve().name),
        "folder",
        splits,
        sorted(tree.by_class),
        drawn=True,
        test_fraction=config.test_fraction,
        notes=_notes([tree]),
    )


def _load_split_tree(
    root: Path, tops: dict[str, Path], memo: Memo, beside: list[str]
) -> ImageDataset:
    trees = {split: _read_tree(root, top) for split, top in tops.items()}
    class_names = sorted(trees["train"].by_class)
    _refuse_empty_classes(trees["train"])
    for tree in trees.values():
        _refuse_other_classes(trees["train"], tree)
    if "test" not in trees:
        trees["test"] = trees.pop("val")
    order: list[str] = [split for split in ("train", "test", "val") if split in trees]
    splits = {s: _split_of(s, trees[s], root, class_names, memo) for s in order}
    notes = _notes(list(trees.values()))
    if beside:
        notes += (f"ignored folders beside {tops['train'].name}/: {', '.join(beside[:5])}",)
    return ImageDataset(short_name(root.resolve().name), "folder", splits, class_names, notes=notes)


def _split_tops(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders that hold train, test and val, whatever their case, and the other folders."""
    tops: dict[str, Path] = {}
    beside: list[str] = []
    for entry in _entries(root):
        split = SPLIT_FOLDERS.get(entry.name.lower())
        if not _is_folder(entry):
            continue
        if split is None:
            beside.append(entry.name)
            continue
        if split in tops:
            raise UserError(
                f"{root} has both {tops[split].name}/ and {entry.name}/: keep one of them"
            )
        tops[split] = root / entry.name
    return tops, beside


def _refuse_half_split(root: Path, tops: dict[str, Path]) -> None:
    if "train" in tops:
        raise UserError(
            f"{root} has {tops['train'].name}/ but neither test/ nor val/: add one, or give "
            f"{tops['train']} itself with --test-fraction 0.2"
        )
    if tops:
        found = next(iter(tops.values())).name
        raise UserError(f"{root} has {found}/ but no train/: add train/<class>/ folders")


def _read_tree(root: Path, top: Path) -> _Tree:
    """List a class-folder tree; ids are relative to `root`."""
    tree = _Tree(top, {})
    prefix = "" if top == root else f"{top.name}/"
    loose: list[str] = []
    for entry in _entries(top):
        if _is_folder(entry):
            found = _pictures(Path(entry.path), f"{prefix}{entry.name}/", tree.ignored)
            tree.by_class[entry.name] = sorted(found)
        elif _is_picture(entry.name):
            loose.append(entry.name)
        else:
            tree.ignored[_suffix(entry.name)] += 1
    if loose:
        raise UserError(
            f"{top} has pictures outside class folders ({len(loose)}, such as {loose[0]}): move "
            f"them into {top}/<class>/"
        )
    _check_tree(tree)
    return tree


def _check_tree(tree: _Tree) -> None:
    names = sorted(tree.by_class)
    if not names:
        seen = f" (only {_counted(tree.ignored)})" if tree.ignored else ""
        raise UserError(
            f"{tree.top} has no class folders{seen}: put pictures into {tree.top}/<class>/"
        )
    if tree.num_images == 0:
        seen = f", only {_counted(tree.ignored)}" if tree.ignored else ""
        raise UserError(
            f"no picture in the class folders of {tree.top}{seen}; file names that count end in "
            f"{_ACCEPTED}"
        )
    if len(names) == 1:
        raise UserError(
            f"{tree.top} has one class folder only, {names[0]!r}: a classifier needs two or more"
        )


def _refuse_empty_classes(tree: _Tree) -> None:
    empty = [name for name, ids in sorted(tree.by_class.items()) if not ids]
    if empty:
        raise UserError(
            f"no picture in class folder {tree.top / empty[0]}{_and_more(empty)}: add some or "
            "remove the folder"
        )


def _refuse_other_classes(train: _Tree, other: _Tree) -> None:
    only = {
        train.top: sorted(train.by_class.keys() - other.by_class.keys()),
        other.top: sorted(other.by_class.keys() - train.by_class.keys()),
    }
    told = [
        f"only {top.name}/ has {', '.join(map(repr, names[:5]))}{_and_more(names, 5)}"
        for top, names in only.items()
        if names
    ]
    if told:
        raise UserError(
            f"the class folders of {train.top} and {other.top.name}/ differ: {'; '.join(told)}; "
            "make them the same"
        )


def _split_of(name: str, tree: _Tree, root: Path, class_names: list[str], memo: Memo) -> ImageSplit:
    number = {class_name: label for label, class_name in enumerate(class_names)}
    samples = sorted((i, number[c]) for c, ids in tree.by_class.items() for i in ids)
    ids = [sample_id for sample_id, _ in samples]
    labels = np.array([label for _, label in samples], dtype=np.int64)
    base = os.path.join(os.path.abspath(root), "")
    return ImageSplit(name, ids, labels, FileSource([base + i for i in ids], memo, base))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without hidden entries.

    Raises:
        UserError: It cannot be listed, or a name is not UTF-8.
    """
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"cannot list {folder}: {error.strerror}; make it readable, or give another folder"
        ) from error
    for entry in found:
        if not is_printable(entry.name):
            raise UserError(
                f"the name {os.fsencode(entry.name)!r} in {folder} is not UTF-8, or has control "
                "characters: rename it"
            )
    kept = (entry for entry in found if entry.name not in _IGNORED_FOLDERS)
    return sorted(kept, key=lambda entry: entry.name)


def is_printable(name: str) -> bool:
    """Whether a name can stand in a cache and in a one-line message."""
    # Python reads bytes that are not UTF-8 as lone surrogates.
    return not re.search("[\\x00-\\x1f\\x7f\ud800-\udfff]", name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example; opening it will say so
        return False


def _pictures(
    folder: Path, prefix: str, ignored: Counter[str], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Ids, each with `prefix`, of the pictures in a folder and its subfolders; links are followed.

    A link to a folder that it lies in would go round for ever and is refused.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"{folder} is a link to a folder that contains it: remove the link")
    if len(above) >= MAX_DEPTH:
        raise UserError(f"{folder} lies more than {MAX_DEPTH} folders deep in its class folder")
    for entry in _entries(folder):
        if _is_folder(entry):
            below = f"{prefix}{entry.name}/"
            yield from _pictures(Path(entry.path), below, ignored, (*above, here))
        elif _is_picture(entry.name):
            yield prefix + entry.name
        else:
            ignored[_suffix(entry.name)] += 1


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _is_picture(name: str) -> bool:
    return _suffix(name) in EXTENSIONS


def _counted(ignored: Counter[str]) -> str:
    kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{suffix} {count}x" for suffix, count in kinds[:3])
    return f"files of other kinds ({told}{', ...' if len(kinds) > 3 else ''})"


def _and_more(names: list[str], shown: int = 1) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _notes(trees: list[_Tree]) -> tuple[str, ...]:
    ignored: Counter[str] = Counter()
    for tree in trees:
        ignored.update(tree.ignored)
    return (f"ignored {_counted(ignored)}",) if ignored else ()

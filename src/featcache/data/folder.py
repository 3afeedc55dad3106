"""Folders of class folders: train/<class>/*.jpg and test/<class>/*.jpg, or only <class>/*.jpg."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit, short_name
from featcache.data.images import EXTENSIONS
from featcache.data.listing import (
    SPLIT_NAMES,
    Listing,
    alike_text,
    is_folder,
    is_image_file,
    left_out_note,
    look_alikes,
)
from featcache.data.sampling import split_off_test
from featcache.data.sources import FileSource
from featcache.data.torchvision_sets import TORCHVISION_SETS
from featcache.errors import UserError
from featcache.file_hashes import Memo

_ACCEPTED = ", ".join(EXTENSIONS)


@dataclass
class _Tree:
    """The images of one tree of class folders: ids relative to the dataset's folder, by class.

    `loose` are images outside class folders.
    """

    top: Path
    listing: Listing
    by_class: dict[str, list[str]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return sum(len(ids) for ids in self.by_class.values())


def load_folder(config: DataConfig, root: Path, memo: Memo) -> ImageDataset:
    """Read a folder with train/ and test/ (or val/), or one tree of class folders.

    Raises:
        UserError: It is not such a folder; the message says why and what to do.
    """
    tops, beside = _split_tops(root, _new_listing(config))
    if "train" in tops and len(tops) > 1:
        if config.test_fraction is not None:
            others = " and ".join(f"{tops[s].name}/" for s in tops if s != "train")
            raise UserError(f"{root} has its own {others}: leave out --test-fraction")
        trees = {split: _read_tree(root, top, _new_listing(config)) for split, top in tops.items()}
        return _load_split_tree(root, trees, memo, beside)
    if not beside or config.test_fraction is None:
        # Beside other folders and with --test-fraction, train/ may be a class, say of vehicles.
        _refuse_half_split(root, tops)
    tree = _read_tree(root, root, _new_listing(config))
    _check_train(tree)
    if config.test_fraction is None:
        raise UserError(
            f"{root} is one tree of {len(tree.by_class)} class folders without train/ and test/: "
            "say which fraction to set aside for testing, for example --test-fraction 0.2"
        )
    every = _split_of("all", tree, root, sorted(tree.by_class), memo)
    splits = split_off_test(every, config.test_fraction, config.seed, group_from=config.group_from)
    return ImageDataset(
        short_name(root.resolve().name),
        "folder",
        splits,
        sorted(tree.by_class),
        drawn=True,
        test_fraction=config.test_fraction,
        notes=_notes([tree]),
    )


def load_test_tree(
    config: DataConfig, root: Path, class_names: list[str], memo: Memo
) -> ImageDataset:
    """Read one tree of class folders as a test split alone, with the labels of another dataset.

    Raises:
        UserError: It is not such a tree, or has a class that the other dataset lacks.
    """
    tree = _read_tree(root, root, _new_listing(config))
    _check_tree(tree)
    unknown = sorted(tree.by_class.keys() - set(class_names))
    if unknown:
        if all(name.lower() in SPLIT_NAMES for name in unknown):
            raise UserError(
                f"{root} has the folders {', '.join(unknown)}, not class folders: give one of "
                f"them, for example {root / unknown[0]}"
            )
        pairs = look_alikes([*unknown, *(set(class_names) - tree.by_class.keys())])
        alike = f" ({alike_text(pairs)})" if pairs else ""
        raise UserError(
            f"{root} has class folders that are not among the classes of train: "
            f"{', '.join(map(repr, unknown[:5]))}{_and_more(unknown, 5)}{alike}; rename or remove "
            "them"
        )
    missing = [name for name in class_names if not tree.by_class.get(name)]
    notes = _notes([tree])
    if missing:
        notes += (f"{root} has no images of {', '.join(missing[:5])}{_and_more(missing, 5)}",)
    splits = {"test": _split_of("test", tree, root, class_names, memo)}
    name = short_name(root.resolve().name)
    return ImageDataset(name, "folder", splits, class_names, notes=notes)


def _new_listing(config: DataConfig) -> Listing:
    return Listing(_own_folders(config), skip_names=config.on_error == "skip")


def _own_folders(config: DataConfig) -> frozenset[str]:
    """Resolved paths of the folders with our caches and downloaded datasets."""
    own = [config.cache_dir]
    places = (place for known in TORCHVISION_SETS.values() for place in known.places)
    if any((config.data_root / place).exists() for place in places):
        own.append(config.data_root)
    return frozenset(map(os.path.realpath, own))


def _load_split_tree(
    root: Path, trees: dict[str, _Tree], memo: Memo, beside: list[str]
) -> ImageDataset:
    train = trees["train"]
    _check_train(train)
    for tree in trees.values():
        _refuse_unlabeled(train, tree)
        _check_tree(tree)
        _refuse_other_classes(train, tree)
    class_names = sorted(train.by_class)
    if "test" not in trees:
        trees["test"] = trees.pop("val")
    order: list[str] = [split for split in ("train", "test", "val") if split in trees]
    splits = {s: _split_of(s, trees[s], root, class_names, memo) for s in order}
    notes = _notes(list(trees.values()))
    if beside:
        notes += (f"ignored folders beside {train.top.name}/: {', '.join(beside[:5])}",)
    return ImageDataset(short_name(root.resolve().name), "folder", splits, class_names, notes=notes)


def _split_tops(root: Path, listing: Listing) -> tuple[dict[str, Path], list[str]]:
    """The folders of train, test and val, in any case, and the names of other folders."""
    tops: dict[str, Path] = {}
    beside: list[str] = []
    for entry in listing.entries(root, classes=True):
        split = SPLIT_NAMES.get(entry.name.lower())
        if not is_folder(entry):
            continue
        if split is None:
            if not listing.has_only_ours(entry.path):
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


def _read_tree(root: Path, top: Path, listing: Listing) -> _Tree:
    """List a class-folder tree; ids are relative to `root`."""
    tree = _Tree(top, listing)
    prefix = "" if top == root else f"{top.name}/"
    for entry in listing.entries(top, classes=True):
        if is_folder(entry):
            found = sorted(listing.images(entry.path, f"{prefix}{entry.name}/"))
            if not found and listing.has_only_ours(entry.path):
                listing.ours.append(entry.name)
            else:
                tree.by_class[entry.name] = found
        elif is_image_file(entry.name):
            tree.loose.append(entry.name)
        else:
            listing.ignore(entry.name)
    return tree


def _check_tree(tree: _Tree) -> None:
    if tree.loose:
        raise UserError(
            f"{tree.top} has images outside class folders ({len(tree.loose)}, such as "
            f"{tree.loose[0]}): move them into {tree.top}/<class>/"
        )
    names, ignored = sorted(tree.by_class), tree.listing.ignored
    if not names:
        seen = f" (only {counted(ignored)})" if ignored else ""
        raise UserError(
            f"{tree.top} has no class folders{seen}: put images into {tree.top}/<class>/"
        )
    if tree.num_images == 0:
        seen = f", only {counted(ignored)}" if ignored else ""
        raise UserError(
            f"no image in the class folders of {tree.top}{seen}; image files end in {_ACCEPTED}"
        )


def _check_train(tree: _Tree) -> None:
    _check_tree(tree)
    if len(tree.by_class) == 1:
        raise UserError(
            f"{tree.top} has only one class folder, {next(iter(tree.by_class))!r}: a classifier "
            "needs at least two"
        )
    empty = [name for name, ids in sorted(tree.by_class.items()) if not ids]
    if empty:
        raise UserError(
            f"no image in class folder {tree.top / empty[0]}{_and_more(empty)}: add some or "
            "remove the folder"
        )


def _refuse_unlabeled(train: _Tree, tree: _Tree) -> None:
    if tree.loose and not tree.by_class:
        raise UserError(
            f"{tree.top} has images ({len(tree.loose)}, such as {tree.loose[0]}) but no class "
            f"folders, so nothing can be scored on it: give {train.top} itself with "
            f"--test-fraction 0.2, or move them into {tree.top}/<class>/"
        )


def _refuse_other_classes(train: _Tree, other: _Tree) -> None:
    only = {
        train.top: sorted(train.by_class.keys() - other.by_class.keys()),
        other.top: sorted(other.by_class.keys() - train.by_class.keys()),
    }
    lacking = [
        f"only {top.name}/ has {', '.join(map(repr, names[:5]))}{_and_more(names, 5)}"
        for top, names in only.items()
        if names
    ]
    if lacking:
        pairs = look_alikes([name for names in only.values() for name in names])
        alike = f" ({alike_text(pairs)})" if pairs else ""
        other_way = (
            ""
            if train.by_class.keys() & other.by_class.keys()
            else f", or give {train.top} itself with --test-fraction 0.2"
        )
        raise UserError(
            f"the class folders of {train.top} and {other.top.name}/ differ: {'; '.join(lacking)}"
            f"{alike}; make them the same{other_way}"
        )


def _split_of(name: str, tree: _Tree, root: Path, class_names: list[str], memo: Memo) -> ImageSplit:
    number = {class_name: label for label, class_name in enumerate(class_names)}
    classes = sorted(tree.by_class, key=lambda c: f"{c}/")  # the ids are then sorted
    ids = [sample_id for c in classes for sample_id in tree.by_class[c]]
    sizes = [len(tree.by_class[c]) for c in classes]
    labels = np.repeat(np.array([number[c] for c in classes], np.int64), sizes)
    base = os.path.join(os.path.abspath(root), "")
    return ImageSplit(name, ids, labels, FileSource(ids, memo, folder=base, prefix=base))


def counted(ignored: Counter[str]) -> str:
    """Files of other kinds in words, with the commonest suffixes."""
    kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{suffix} {count}x" for suffix, count in kinds[:3])
    return f"files of other kinds ({shown}{', ...' if len(kinds) > 3 else ''})"


def _and_more(names: list[str], shown: int = 1) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _notes(trees: list[_Tree]) -> tuple[str, ...]:
    ignored: Counter[str] = Counter()
    for tree in trees:
        ignored.update(tree.listing.ignored)
    ours = sorted({f"{name}/" for tree in trees for name in tree.listing.ours})
    unusable = [path for tree in trees for path in tree.listing.unusable]
    notes = []
    if ignored:
        notes.append(f"ignored {counted(ignored)}")
    if ours:
        notes.append(f"left out {', '.join(ours)}: featcache's own files")
    if unusable:
        notes.append(left_out_note(unusable))
    return tuple(notes)

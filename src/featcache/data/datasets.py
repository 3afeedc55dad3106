"""From what the user typed to a dataset: `load_dataset`.

It opens scikit-learn's digits, a torchvision dataset, a folder, a manifest or tar shards as an
`ImageDataset`, then reduces that to the number of images asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import os
import shlex
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.folder import load_folder, load_test_tree
from featcache.data.index import indexed
from featcache.data.listing import alike_text, look_alikes
from featcache.data.manifest import load_manifest
from featcache.data.sampling import (
    copies_lines,
    find_copies,
    find_shared_groups,
    shared_groups_lines,
    split_off_test,
    stratified_rows,
)
from featcache.data.sources import ArraySource
from featcache.data.tar.places import is_remote, names_shards, shards_in
from featcache.data.torchvision_sets import TORCHVISION_SETS, load_torchvision
from featcache.errors import UserError, one_of
from featcache.file_hashes import Memo

Int64 = NDArray[np.int64]
DIGITS_TEST_FRACTION = 0.2
DIGITS_WHITE = 16
WIDE_BYTES = 64 * 2**20
_FLAGS = {"train": "--num-train", "test": "--num-test"}


def load_dataset(config: DataConfig) -> ImageDataset:
    """Load what `config.dataset` names: its samples are listed, and decoded when they are used.

    A known name (digits, cifar10, ...; case, dashes and underscores do not matter) means that
    dataset even if there is a folder of that name; a note says so, and ./digits is the folder.
    Anything else is the path of a folder or of a CSV manifest, or names tar shards. A torchvision
    dataset that was loaded before comes from an index, without importing torch until its first
    image is read.

    `num_train` and `num_test` take the first images of a torchvision dataset that comes split, and
    a stratified, seeded sample of the others. A val split is reduced in proportion to train.

    Raises:
        UserError: There is no such dataset, or something is wrong with it or with the settings.
    """
    name = _known_name(config.dataset)
    if name is not None:
        _refuse_manifest_flags(config)
    if name in TORCHVISION_SETS:
        dataset = indexed(config, name, functools.partial(_load, config, name))
    else:
        dataset = _load(config, name)
    dataset = _grouped(dataset, config)
    shared = shared_groups_lines([found._asdict() for found in find_shared_groups(dataset.splits)])
    if config.strict:
        _refuse_leaks(dataset, shared)
    return dataclasses.replace(
        dataset, notes=(*_shadow_notes(config, name), *dataset.notes, *shared)
    )


def load_test_folder(config: DataConfig, folder: Path, class_names: list[str]) -> ImageDataset:
    """A folder of class folders as a second test set, labeled as the first.

    Args:
        config: The settings of the first dataset: unreadable images, where to keep hashes.
        folder: Has a folder for every class, or for some of them.
        class_names: The first dataset's.

    Returns:
        A dataset with a test split alone, and these class names.

    Raises:
        UserError: There is no such folder, or it has other classes.
    """
    mode = _mode_of(str(folder), folder)
    if mode is None or not stat.S_ISDIR(mode):
        raise UserError(f"there is no folder {folder}: give a folder of class folders")
    return load_test_tree(config, folder, class_names, _memo(config, folder))


def _load(config: DataConfig, name: str | None) -> ImageDataset:
    """Open the dataset, then apply `num_train` and `num_test`."""
    if name == "digits":
        dataset = load_digits(config)
    elif name is not None:
        dataset = load_torchvision(config, name, _memo(config, config.data_root / name))
    else:
        dataset = _load_path(config, Path(config.dataset))
    return _reduced(dataset, config)


def _grouped(dataset: ImageDataset, config: DataConfig) -> ImageDataset:
    """Find the groups of images that come in splits of their own; a part set aside has them."""
    if config.group_from is None:
        return dataset
    splits = {
        name: split if split.groups is not None else split.grouped_by(config.group_from)
        for name, split in dataset.splits.items()
    }
    return dataclasses.replace(dataset, splits=splits)


def _refuse_leaks(dataset: ImageDataset, shared: list[str]) -> None:
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    found = [*shared, *copies_lines(find_copies(dataset.splits).report(), sizes, divided=False)]
    if found:
        raise UserError(f"{'; '.join(found)} (or leave out --strict)")


def _known_name(text: str) -> str | None:
    """The key of a dataset known by name, or None."""
    key = text.strip().lower().replace("-", "").replace("_", "").replace(" ", "")
    return key if key == "digits" or key in TORCHVISION_SETS else None


def _refuse_manifest_flags(config: DataConfig) -> None:
    if config.image_root is not None or config.allow_outside:
        flag = "--allow-outside" if config.image_root is None else "--image-root"
        raise UserError(f"{flag} is for CSV manifests, not for {config.dataset}: leave it out")


def _shadow_notes(config: DataConfig, name: str | None) -> tuple[str, ...]:
    """Say when a dataset known by name hides a folder of the same name."""
    if name is None or not Path(config.dataset).is_dir():
        return ()
    what = "scikit-learn's digits" if name == "digits" else f"torchvision's {name}"
    folder = shlex.quote(f"./{config.dataset}")
    return (f"using {what}, not the folder {folder}: type {folder} for the folder",)


def _memo(config: DataConfig, root: Path | str) -> Memo:
    """File hashes of one dataset; each has its own memo, because a memo is read as a whole."""
    place = os.fspath(root) if is_remote(os.fspath(root)) else os.path.abspath(root)
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    return Memo(config.cache_dir, f"files-{name}")


def _load_path(config: DataConfig, path: Path) -> ImageDataset:
    mode = _mode_of(config.dataset, path)
    if mode is not None and stat.S_ISREG(mode) and path.suffix.lower() == ".csv":
        return load_manifest(config, path, _memo(config, config.image_root or path.parent))
    _refuse_manifest_flags(config)
    is_folder = mode is not None and stat.S_ISDIR(mode)
    if shards_in(config.dataset) if is_folder else names_shards(config.dataset):
        from featcache.data.tar.dataset import load_shards

        return load_shards(config, _memo(config, config.dataset))
    if is_folder:
        return load_folder(config, path, _memo(config, path))
    if mode is not None:
        what = "a file" if stat.S_ISREG(mode) else "neither a folder nor a file"
        raise UserError(
            f"{path} is {what} but not a manifest: give a .csv file with columns "
            "path,label[,split][,group], a folder of class folders, or tar shards"
        )
    if os.sep in config.dataset or path.suffix.lower() == ".csv":
        raise UserError(
            f"no folder or file {config.dataset!r}: give a folder of class folders, a CSV "
            "manifest, or a known name such as digits or cifar10"
        )
    known = one_of(config.dataset, ["digits", *TORCHVISION_SETS], "dataset")
    raise UserError(f"no folder or CSV file {config.dataset!r} is here, and {known}")


def _mode_of(text: str, path: Path) -> int | None:
    """The file mode of `path`; None if it does not exist.

    Raises:
        UserError: The path cannot be accessed.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{text!r:.200} cannot be a dataset: {reason}; make it readable, or give another one"
        ) from error


def _reduced(dataset: ImageDataset, config: DataConfig) -> ImageDataset:
    """Apply `num_train` and `num_test`, and add notes on what is left."""
    wanted = {"train": config.num_train, "test": config.num_test}
    splits = dict(dataset.splits)
    for name, total in wanted.items():
        if total is None:
            continue
        if total > len(splits[name]):
            raise UserError(
                f"{_FLAGS[name]} {total}: {dataset.name} has {len(splits[name])} {name} images; "
                f"give at most that, or leave {_FLAGS[name]} out"
            )
        splits[name] = _fewer(dataset, splits[name], total, config.seed)
    if "val" in splits and config.num_train is not None:
        share = config.num_train / len(dataset.splits["train"])
        total = max(1, round(len(splits["val"]) * share))
        splits["val"] = _fewer(dataset, splits["val"], total, config.seed)
    _check_width(splits)
    drew = any(total is not None for total in wanted.values()) and not _has_own_order(dataset)
    return dataclasses.replace(
        dataset,
        splits=splits,
        drawn=dataset.drawn or drew,
        notes=(
            *dataset.notes,
            *_notes_on_classes(dataset, splits["train"]),
        ),
    )


def _has_own_order(dataset: ImageDataset) -> bool:
    """Whether the dataset has an order of its own, so that its first images mean something."""
    return dataset.kind == "torchvision" and not dataset.drawn


def _notes_on_classes(dataset: ImageDataset, train: ImageSplit) -> tuple[str, ...]:
    """Name classes that look alike, and say if the first train images lack some classes.

    Raises:
        UserError: They are all of one class.
    """
    pairs = look_alikes(dataset.class_names)
    alike = (f"classes that may be the same: {alike_text(pairs)}",) if pairs else ()
    if train.targets is not None:
        return alike
    # Not np.unique, which imports numpy.ma: a twentieth of the time that a hit takes.
    there, kept = (
        np.count_nonzero(np.bincount(s.labels)) for s in (dataset.splits["train"], train)
    )
    if kept < 2:
        raise UserError(
            f"the {len(train)} train images of {dataset.name} that --num-train keeps are all "
            "of one class: give a larger number, or leave --num-train out"
        )
    if kept == there:
        return alike
    return (
        *alike,
        f"the {len(train)} train images have {kept} of {there} classes: see --num-train",
    )


def _check_width(splits: dict[str, ImageSplit]) -> None:
    """Refuse an image whose long path makes the cache large: it stores all paths at one width.

    Only if the padding takes more than WIDE_BYTES and most of the space.

    Raises:
        UserError: Naming the image.
    """
    for split in splits.values():
        sizes = [len(i) if i.isascii() else len(os.fsencode(i)) for i in split.ids]
        width, total = max(sizes, default=0), sum(sizes)
        if len(sizes) * width > max(WIDE_BYTES, 4 * total):
            longest, padded = split.ids[sizes.index(width)], len(sizes) * width / 1e6
            raise UserError(
                f"the paths of the {split.name} images would take {padded:.0f} MB in the cache, "
                f"because each takes the space of the longest ({width} bytes: "
                f"{longest:.60}…): shorten that path, or remove the image"
            )


def _fewer(dataset: ImageDataset, split: ImageSplit, total: int, seed: int) -> ImageSplit:
    if _has_own_order(dataset):
        return split.subset(np.arange(total))
    rows = stratified_rows(split.ids, split.labels, total, seed=seed, purpose=split.name)
    return split.subset(rows)


def load_digits(config: DataConfig) -> ImageDataset:
    """scikit-learn's digits, 1,797 gray 8x8 images; the test split is stratified and seeded."""
    values, labels = _read_digits()
    pixels = np.rint(values * (255.0 / DIGITS_WHITE)).astype(np.uint8).reshape(-1, 8, 8)
    images = [Image.fromarray(image) for image in pixels]
    ids = [f"digits/{number:05d}" for number in range(len(images))]
    every = ImageSplit("all", ids, labels, ArraySource(images.__getitem__))
    fraction = config.test_fraction or DIGITS_TEST_FRACTION
    splits = split_off_test(every, fraction, config.seed, group_from=config.group_from)
    names = [str(digit) for digit in range(10)]
    return ImageDataset("digits", "digits", splits, names, drawn=True, test_fraction=fraction)


def _read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Values 0 to 16, float64 [N, 64], and labels, int64 [N].

    scikit-learn ships them as one compressed table. Reading it takes a fiftieth of the time that
    importing scikit-learn takes; if the table has moved, scikit-learn loads it.
    """
    spec = importlib.util.find_spec("sklearn")
    home = Path(spec.origin).parent if spec and spec.origin else Path()
    table_file = home / "datasets" / "data" / "digits.csv.gz"
    if table_file.is_file():
        with gzip.open(table_file, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",")
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    return np.asarray(bunch.data, np.float64), np.asarray(bunch.target, np.int64)

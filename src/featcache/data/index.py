"""An index of what torchvision's datasets contain, so that they need not be opened to know.

Opening one imports torch and reads the label, and often the pixels, of every image. To find out
whether a cache is up to date, ids, labels and hashes are enough. The index keeps them in the cache
folder and is valid as long as no file of the dataset changes.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache import __version__
from featcache.config import DataConfig
from featcache.config.checks import record_from_json
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.torchvision_sets import places_of
from featcache.errors import UserError
from featcache.file_hashes import Memo, tree_stamp
from featcache.runtime import version_of

Load = Callable[[], ImageDataset]
UInt8 = NDArray[np.uint8]


def indexed(config: DataConfig, name: str, load: Load) -> ImageDataset:
    """A torchvision dataset from the index, or loaded and added to it.

    Args:
        config: Which images of the dataset, and where the index is.
        name: A key of TORCHVISION_SETS.
        load: Opens the dataset; of one from the index, called when the first image is read.

    Raises:
        UserError: As `load` does.
    """
    memo = Memo(config.cache_dir, f"index-{name}")
    key, stamp = _key(config, name), _stamp(config, name)
    if stamp is not None:
        lazy = _LazyDataset(config, name, load, stamp, memo, key)
        with contextlib.suppress(ValueError):
            return _dataset_of(record_from_json(_Entry, memo.get(key, stamp)), name, lazy)
    dataset = load()
    entry = _entry_of(dataset)
    stamp = stamp or _stamp(config, name)  # a first run downloads in between
    if entry is not None and stamp is not None and stamp == _stamp(config, name):
        memo.put(key, stamp, dataclasses.asdict(entry))
        memo.save()
    return dataset


def _key(config: DataConfig, name: str) -> str:
    """Everything but the files that decides what the dataset is."""
    counts: list[Any] = [config.num_train, config.num_test, config.test_fraction, config.seed]
    if config.group_from is not None:
        counts.append(config.group_from)
    root = os.path.abspath(config.data_root)
    versions = [version_of("torchvision"), version_of("pillow"), __version__]
    return json.dumps([name, root, *counts, *versions])


def _stamp(config: DataConfig, name: str) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        return tree_stamp(places_of(config, name))
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SplitEntry:
    """A split in the index; ids are a prefix and a number each, arrays are in base64."""

    prefix: str
    numbers: str
    labels: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """A dataset in the index."""

    class_names: list[str]
    drawn: bool
    test_fraction: float | None
    notes: list[str]
    splits: dict[str, _SplitEntry]


def _entry_of(dataset: ImageDataset) -> _Entry | None:
    """The dataset's entry; None if its ids are not numbers with a common prefix."""
    splits = {}
    for name, split in dataset.splits.items():
        matches = [re.fullmatch(r"(.*)/([0-9]{6,9})", sample_id) for sample_id in split.ids]
        prefixes = {match[1] for match in matches if match}
        if len(prefixes) != 1 or None in matches:
            return None
        numbers = np.array([int(match[2]) for match in matches if match])
        splits[name] = _SplitEntry(
            prefix=prefixes.pop(),
            numbers=pack(numbers, "<u4"),
            labels=pack(split.labels, "<u4"),
            content=pack(split.content, "u1"),
        )
    return _Entry(
        class_names=dataset.class_names,
        drawn=dataset.drawn,
        test_fraction=dataset.test_fraction,
        notes=list(dataset.notes),
        splits=splits,
    )


def _dataset_of(entry: _Entry, name: str, lazy: _LazyDataset) -> ImageDataset:
    return ImageDataset(
        name,
        "torchvision",
        {split: _split_of(split, part, lazy) for split, part in entry.splits.items()},
        entry.class_names,
        drawn=entry.drawn,
        test_fraction=entry.test_fraction,
        notes=tuple(entry.notes),
    )


def _split_of(name: str, entry: _SplitEntry, lazy: _LazyDataset) -> ImageSplit:
    ids = [f"{entry.prefix}/{number:06d}" for number in unpack(entry.numbers, "<u4")]
    labels = unpack(entry.labels, "<u4").astype(np.int64)
    content = unpack(entry.content, "u1").reshape(-1, 32)
    if not len(ids) == len(labels) == len(content):
        raise ValueError("lengths differ")
    return ImageSplit(name, ids, labels, _LazySource(lazy, name, content))


def pack(values: NDArray[Any], dtype: str) -> str:
    """An array as text, for JSON."""
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def unpack(text: str, dtype: str) -> NDArray[Any]:
    """The flat array in such a text. Raises ValueError if it is none."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)


@dataclasses.dataclass(eq=False)
class _LazyDataset:
    """A dataset that is opened when its first image is read."""

    _config: DataConfig
    _name: str
    _load: Load
    _stamp: tuple[int, ...]
    _memo: Memo
    _key: str
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _dataset: ImageDataset | None = None
    _contents: dict[str, UInt8] = dataclasses.field(default_factory=dict)

    def expect(self, name: str, content: UInt8) -> None:
        """Require these hashes of a split once it is opened, uint8 [N, 32]."""
        self._contents[name] = content

    def _split(self, name: str) -> ImageSplit:
        with self._lock:
            if self._dataset is None:
                if _stamp(self._config, self._name) != self._stamp:
                    raise self.changed()
                dataset = self._load()
                for split, content in self._contents.items():
                    if len(content) != len(dataset.splits[split]):
                        raise self.changed()
                    dataset.splits[split].record(content)
                self._dataset = dataset
            return self._dataset.splits[name]

    def changed(self) -> UserError:
        """The error for files that are not those in the index."""
        return UserError(
            f"the files of {self._name} in {self._config.data_root}/ changed during the run: run "
            "the same command again"
        )

    def read(self, name: str, position: int) -> bytes | Image.Image:
        """An undecoded image of a split. Raises BadImage, and UserError if it changed."""
        try:
            return self._split(name).read(position)
        except UserError:
            # Or the next run would use the same entry.
            self._memo.put(self._key, (), None)
            self._memo.save()
            raise


class _LazySource:
    """The images of one split of such a dataset, whose hashes are known."""

    def __init__(self, lazy: _LazyDataset, name: str, content: UInt8) -> None:
        lazy.expect(name, content)
        self._lazy = lazy
        self._name = name
        self._content = content

    def read(self, position: int) -> bytes | Image.Image:
        """The undecoded image. Raises BadImage, and UserError if it changed."""
        return self._lazy.read(self._name, position)

    def content(self, position: int) -> bytes:
        """The sha256 of the image."""
        return bytes(self._content[position])

    def record(self, position: int, digest: bytes) -> None:
        """Require that the image has this sha256. Raises UserError if it has another."""
        if digest != self.content(position):
            raise self._lazy.changed()

    def recall(self, name: str) -> bytes | None:
        """All hashes."""
        return self._content.tobytes()

    def finish(self) -> None:
        """Nothing to save."""

"""What a dataset holds, without opening it when that was found out before.

Opening a torchvision dataset imports torch and reads every picture's label, and often every
pixel. To answer "is this cached already?" ids, labels and hashes are enough, so they are kept in a
memo that is valid while no file of the dataset changes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import os
import re
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache import __version__
from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.load import (
    known_name,
    load_dataset,
    refuse_manifest_flags,
    shadow_notes,
)
from featcache.data.torchvision_sets import places_of
from featcache.errors import UserError
from featcache.file_hashes import Memo, tree_stamp
from featcache.runtime import version_of


def describe(config: DataConfig) -> ImageDataset:
    """The same dataset as load_dataset gives, without importing torch where that can be avoided.

    Folders, manifests and digits never need torch. Of a torchvision dataset seen before, ids,
    labels and hashes come from a memo; its pictures are opened when first loaded.

    Raises:
        UserError: As load_dataset does.
    """
    name = known_name(config.dataset)
    if name is None or name == "digits":
        return load_dataset(config)
    refuse_manifest_flags(config)
    memo = Memo(config.cache_dir, f"index-{name}")
    key = _key(config, name)
    stamp = _stamp(config, name)
    if stamp is not None:
        later = _Later(config, name, stamp, memo, key)
        known = _from_json(memo.get(key, stamp), name, later)
        if known is not None:
            return dataclasses.replace(known, notes=shadow_notes(config) + known.notes)
    dataset = load_dataset(config)
    value = _to_json(dataset, [n for n in dataset.notes if n not in shadow_notes(config)])
    stamp = stamp or _stamp(config, name)  # a first run downloads in between
    if value is not None and stamp is not None and stamp == _stamp(config, name):
        memo.put(key, stamp, value)
        memo.save()
    return dataset


def _key(config: DataConfig, name: str) -> str:
    """Everything but the files that decides what the dataset is."""
    counts = [config.num_train, config.num_test, config.test_fraction, config.seed]
    root = os.path.abspath(config.data_root)
    versions = [version_of("torchvision"), version_of("pillow"), __version__]
    return json.dumps([name, root, *counts, *versions])


def _stamp(config: DataConfig, name: str) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        return tree_stamp(places_of(config, name))
    return None


def _to_json(dataset: ImageDataset, notes: list[str]) -> dict[str, Any] | None:
    """The dataset's description; None if its ids are not numbers with a common prefix."""
    splits = {}
    for name, split in dataset.splits.items():
        matches = [re.fullmatch(r"(.*)/([0-9]{6,9})", sample_id) for sample_id in split.ids]
        prefixes = {match[1] for match in matches if match}
        if len(prefixes) != 1 or None in matches:
            return None
        numbers = np.array([int(match[2]) for match in matches if match])
        splits[name] = {
            "prefix": prefixes.pop(),
            "numbers": _pack(numbers, "<u4"),
            "labels": _pack(split.labels, "<u4"),
            "content": _pack(split.content, "u1"),
        }
    return {
        "class_names": dataset.class_names,
        "drawn": dataset.drawn,
        "test_fraction": dataset.test_fraction,
        "notes": notes,
        "splits": splits,
    }


def _from_json(value: Any, name: str, later: _Later) -> ImageDataset | None:
    """The dataset again; None if the description is not one."""
    try:
        splits = {
            split: _split_from_json(split, part, later) for split, part in value["splits"].items()
        }
        return ImageDataset(
            name,
            "torchvision",
            splits,
            [str(class_name) for class_name in value["class_names"]],
            drawn=bool(value["drawn"]),
            test_fraction=value["test_fraction"],
            notes=tuple(str(note) for note in value["notes"]),
        )
    except (TypeError, KeyError, ValueError, AttributeError, binascii.Error):
        return None


def _split_from_json(name: str, part: dict[str, str], later: _Later) -> ImageSplit:
    numbers = _unpack(part["numbers"], "<u4")
    ids = [f"{part['prefix']}/{number:06d}" for number in numbers]
    labels = _unpack(part["labels"], "<u4").astype(np.int64)
    content = _unpack(part["content"], "u1").reshape(-1, 32)
    if not len(ids) == len(labels) == len(content):
        raise ValueError("lengths differ")
    return ImageSplit(name, ids, labels, _LaterSource(later, name, content))


def _pack(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)


class _Later:
    """A dataset that is opened when its first picture is asked for."""

    def __init__(
        self, config: DataConfig, name: str, stamp: tuple[int, ...], memo: Memo, key: str
    ) -> None:
        self._config = config
        self._name = name
        self._stamp = stamp
        self._memo = memo
        self._key = key
        self._lock = threading.Lock()
        self._dataset: ImageDataset | None = None
        self._contents: dict[str, NDArray[np.uint8]] = {}

    def expect(self, name: str, content: NDArray[np.uint8]) -> None:
        """Demand these hashes of a split once it is opened, uint8 [N, 32]."""
        self._contents[name] = content

    def split(self, name: str) -> ImageSplit:
        """A split of the opened dataset."""
        with self._lock:
            if self._dataset is None:
                if _stamp(self._config, self._name) != self._stamp:
                    raise self.changed()
                dataset = load_dataset(self._config)
                for split, content in self._contents.items():
                    if len(content) != len(dataset.splits[split]):
                        raise self.changed()
                    dataset.splits[split].record(content)
                self._dataset = dataset
            return self._dataset.splits[name]

    def changed(self) -> UserError:
        """What a run says when the files are not those that were described."""
        return UserError(
            f"the files of {self._name} in {self._config.data_root}/ changed during the run: run "
            "the same command again"
        )

    def read(self, name: str, position: int) -> bytes | Image.Image:
        """An undecoded picture. Raises BadImage, and UserError if it is not the described one."""
        try:
            return self.split(name).read(position)
        except UserError:
            # Or the next run would trust the same description.
            self._memo.put(self._key, (), None)
            self._memo.save()
            raise


class _LaterSource:
    """The pictures of one split of such a dataset, whose hashes are known."""

    def __init__(self, later: _Later, name: str, content: NDArray[np.uint8]) -> None:
        later.expect(name, content)
        self._later = later
        self._name = name
        self._content = content

    def read(self, position: int) -> bytes | Image.Image:
        """The undecoded picture. Raises BadImage, and UserError if it is not the described one."""
        return self._later.read(self._name, position)

    def content(self, position: int) -> bytes:
        """The sha256 of the picture."""
        return bytes(self._content[position])

    def record(self, position: int, digest: bytes) -> None:
        """Demand from now on that the picture has this sha256."""
        if digest != self.content(position):
            raise self._later.changed()

    def finish(self) -> None:
        """Nothing to do."""

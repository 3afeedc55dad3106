"""What a dataset holds, without opening it when that was found out before.

Opening a torchvision dataset imports torch and reads every picture's label, and often every
pixel. To answer "is this cached already?" ids, labels and hashes are enough, so they are kept in a
memo that is valid while no file of the dataset changes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.load import known_name, load_dataset
from featcache.data.torchvision_sets import places_of
from featcache.errors import UserError
from featcache.memo import Memo, tree_stamp
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
    memo = Memo(config.cache_dir, f"index-{name}")
    key = _key(config, name)
    stamp = _stamp(config, name)
    if stamp is not None:
        known = _from_json(memo.get(key, stamp), config, name)
        if known is not None:
            return known
    dataset = load_dataset(config)
    value = _to_json(dataset)
    stamp = stamp or _stamp(config, name)  # a first run downloads in between
    if value is not None and stamp is not None and stamp == _stamp(config, name):
        memo.put(key, stamp, value)
        memo.save()
    return dataset


def _key(config: DataConfig, name: str) -> str:
    """Everything but the files that decides what the dataset is."""
    counts = [config.num_train, config.num_test, config.test_fraction, config.seed]
    root = os.path.abspath(config.data_root)
    versions = [version_of("torchvision"), version_of("pillow"), version_of("featcache")]
    return json.dumps([name, root, *counts, *versions])


def _stamp(config: DataConfig, name: str) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        return tree_stamp(places_of(config, name))
    return None


def _to_json(dataset: ImageDataset) -> dict[str, Any] | None:
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
        "splits": splits,
    }


def _from_json(value: Any, config: DataConfig, name: str) -> ImageDataset | None:
    """The dataset again; None if the description is not one."""
    try:
        splits = {
            split: _split_from_json(split, part, config) for split, part in value["splits"].items()
        }
        return ImageDataset(
            name,
            "torchvision",
            splits,
            [str(class_name) for class_name in value["class_names"]],
            drawn=bool(value["drawn"]),
            test_fraction=value["test_fraction"],
        )
    except (TypeError, KeyError, ValueError, AttributeError, binascii.Error):
        return None


def _split_from_json(name: str, part: dict[str, str], config: DataConfig) -> ImageSplit:
    numbers = _unpack(part["numbers"], "<u4")
    ids = [f"{part['prefix']}/{number:06d}" for number in numbers]
    labels = _unpack(part["labels"], "<u4").astype(np.int64)
    content = _unpack(part["content"], "u1").reshape(-1, 32)
    if not len(ids) == len(labels) == len(content):
        raise ValueError("lengths differ")
    return ImageSplit(name, ids, labels, _LaterSource(config, name)).with_content(content)


def _pack(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)


class _LaterSource:
    """Pictures of a dataset that is opened when the first one is asked for."""

    def __init__(self, config: DataConfig, split: str) -> None:
        self._config = config
        self._name = split
        self._lock = threading.Lock()
        self._split: ImageSplit | None = None

    def _opened(self, position: int) -> ImageSplit:
        with self._lock:
            if self._split is None:
                self._split = load_dataset(self._config).splits[self._name]
        if position >= len(self._split):
            raise UserError(
                f"{self._config.dataset} changed during the run: run the same command again"
            )
        return self._split

    def read(self, position: int) -> bytes | Image.Image:
        """The undecoded picture. Raises BadImage."""
        return self._opened(position).read(position)

    def content(self, position: int) -> bytes:
        """The sha256 of the picture."""
        return self._opened(position).content[position].tobytes()

    def finish(self) -> None:
        """Nothing to do."""

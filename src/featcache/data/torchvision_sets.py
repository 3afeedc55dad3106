"""torchvision's classification datasets by name."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.sampling import split_off_test
from featcache.data.sources import ArraySource, FileSource, Source
from featcache.errors import UserError
from featcache.file_hashes import Memo
from featcache.runtime import import_torchvision

DEFAULT_TEST_FRACTION = 0.2
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class TorchvisionSet:
    """How torchvision loads one dataset.

    Attributes:
        factory: The class in torchvision.datasets.
        splits: Arguments for each split; a single split "all" is divided by --test-fraction.
        places: Its files and folders under the data root.
        extra: Arguments for every split.
    """

    factory: str
    splits: dict[str, dict[str, Any]]
    places: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)


_BY_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _by_name(train: str = "train", test: str = "test", val: str = "") -> dict[str, dict[str, Any]]:
    splits = {"train": {"split": train}, "test": {"split": test}}
    return {**splits, "val": {"split": val}} if val else splits


TORCHVISION_SETS: dict[str, TorchvisionSet] = {
    "cifar10": TorchvisionSet("CIFAR10", _BY_FLAG, ("cifar-10-batches-py",)),
    "cifar100": TorchvisionSet("CIFAR100", _BY_FLAG, ("cifar-100-python",)),
    "country211": TorchvisionSet("Country211", _by_name(val="valid"), ("country211",)),
    "dtd": TorchvisionSet("DTD", _by_name(val="val"), ("dtd",)),
    "emnist": TorchvisionSet("EMNIST", _BY_FLAG, ("EMNIST",), {"split": "balanced"}),
    "eurosat": TorchvisionSet("EuroSAT", {"all": {}}, ("eurosat",)),
    "fashionmnist": TorchvisionSet("FashionMNIST", _BY_FLAG, ("FashionMNIST",)),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", _by_name(val="val"), ("fgvc-aircraft-2013b",)),
    "flowers102": TorchvisionSet("Flowers102", _by_name(val="val"), ("flowers-102",)),
    "food101": TorchvisionSet("Food101", _by_name(), ("food-101",)),
    "gtsrb": TorchvisionSet("GTSRB", _by_name(), ("gtsrb",)),
    "imagenette": TorchvisionSet("Imagenette", _by_name(test="val"), ("imagenette2",)),
    "kmnist": TorchvisionSet("KMNIST", _BY_FLAG, ("KMNIST",)),
    "mnist": TorchvisionSet("MNIST", _BY_FLAG, ("MNIST",)),
    "oxfordiiitpet": TorchvisionSet(
        "OxfordIIITPet", _by_name(train="trainval"), ("oxford-iiit-pet",)
    ),
    "qmnist": TorchvisionSet("QMNIST", _BY_FLAG, ("QMNIST",)),
    "renderedsst2": TorchvisionSet("RenderedSST2", _by_name(val="val"), ("rendered-sst2",)),
    "stanfordcars": TorchvisionSet("StanfordCars", _by_name(), ("stanford_cars",)),
    "stl10": TorchvisionSet("STL10", _by_name(), ("stl10_binary",)),
    "svhn": TorchvisionSet("SVHN", _by_name(), ("train_32x32.mat", "test_32x32.mat")),
    "usps": TorchvisionSet("USPS", _BY_FLAG, ("usps.bz2", "usps.t.bz2")),
}
"""By name, in lower case without dashes and underscores."""


def load_torchvision(config: DataConfig, name: str, memo: Memo) -> ImageDataset:
    """Load a dataset by its key in TORCHVISION_SETS, downloading it if need be.

    Raises:
        UserError: The download failed, or --test-fraction was given needlessly.
    """
    spec = TORCHVISION_SETS[name]
    if "all" not in spec.splits and config.test_fraction is not None:
        raise UserError(f"{name} has its own test split: leave out --test-fraction")
    parts = {split: _open(config, name, spec, args) for split, args in spec.splits.items()}
    labels = {split: _labels(part) for split, part in parts.items()}
    splits = {
        split: _split_of(split if split != "all" else name, part, labels[split], memo)
        for split, part in parts.items()
    }
    class_names = _class_names(parts, labels)
    if "all" not in splits:
        splits = {name: splits[name] for name in ("train", "test", "val") if name in splits}
        return ImageDataset(name, "torchvision", splits, class_names)
    fraction = config.test_fraction or DEFAULT_TEST_FRACTION
    divided = split_off_test(splits["all"], fraction, config.seed, group_from=config.group_from)
    return ImageDataset(
        name, "torchvision", divided, class_names, drawn=True, test_fraction=fraction
    )


def _open(config: DataConfig, name: str, spec: TorchvisionSet, arguments: dict[str, Any]) -> Any:
    """Construct torchvision's dataset: from disk if it is there, else by downloading it."""
    datasets = import_torchvision("datasets")
    factory = getattr(datasets, spec.factory)
    every = {"root": str(config.data_root), **spec.extra, **arguments}
    with contextlib.ExitStack() as stack:
        # stdout is for --json, and some datasets print; NumPy warns about how CIFAR was pickled.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # The many readers and downloaders may raise anything.
        with contextlib.suppress(Exception):
            return factory(**every, download=False)
        try:
            return factory(**every, download=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{name} is not (or not whole) in {config.data_root}/ and could not be downloaded "
                f"({reason}); connect to a network, or put its files ({', '.join(spec.places)}) "
                "there, or give the folder that has them with --data-root; remove what a broken "
                "download left; digits works offline"
            ) from error


def _labels(part: Any) -> Int64:
    """Labels in the dataset's order, int64 [N]; read without decoding images if possible."""
    pairs = _pairs(part)
    if pairs is not None:
        return np.array([label for _, label in pairs], dtype=np.int64)
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(part, attribute, None)
        if values is not None and len(values) == len(part):
            array = np.asarray(values)
            return (array[:, 0] if array.ndim == 2 else array).astype(np.int64)
    return np.array([int(part[i][1]) for i in range(len(part))], dtype=np.int64)


def _pairs(part: Any) -> list[tuple[str, int]] | None:
    """(path, label) of every sample; None for datasets that keep no such list."""
    for attribute in ("samples", "_samples"):
        values = getattr(part, attribute, None)
        if values and len(values) == len(part):
            return [(os.fspath(path), int(label)) for path, label in values]
    return None


def _paths(part: Any) -> list[str] | None:
    """The file of every sample; None for datasets that do not keep images in files."""
    pairs = _pairs(part)
    if pairs is not None:
        return [path for path, _ in pairs]
    for attribute in ("_image_files", "_images"):
        values = getattr(part, attribute, None)
        if values and len(values) == len(part):
            return [os.fspath(path) for path in values]
    return None


def _class_names(parts: dict[str, Any], labels: dict[str, Int64]) -> list[str]:
    """Names by label; if the dataset has none, the labels' numbers with leading zeros.

    Raises:
        UserError: The splits number their classes differently.
    """
    count = 1 + max(int(values.max()) for values in labels.values())
    names_of = [[str(name) for name in getattr(p, "classes", None) or []] for p in parts.values()]
    names = names_of[0]
    if any(other != names for other in names_of):
        raise UserError(
            "the splits of this dataset have different classes, so files must be missing: remove "
            "its folder under --data-root and run again to download it"
        )
    if len(names) >= count and len(set(names)) == len(names):
        return names
    return [f"{label:0{len(str(count - 1))}d}" for label in range(count)]


def _split_of(name: str, part: Any, labels: Int64, memo: Memo) -> ImageSplit:
    ids = [f"{name}/{number:06d}" for number in range(len(part))]
    paths = _paths(part)
    source: Source
    if paths is not None:
        paths = [os.path.abspath(path) for path in paths]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        source = FileSource(paths, memo, folder)
    else:
        source = ArraySource(_image_getter(part))
    return ImageSplit(name, ids, labels, source)


def _image_getter(part: Any) -> Callable[[int], Image.Image]:
    def get(position: int) -> Image.Image:
        image = part[position][0]
        assert isinstance(image, Image.Image)
        return image

    return get


def places_of(config: DataConfig, name: str) -> list[Path]:
    """The files and folders of a dataset."""
    return [config.data_root / place for place in TORCHVISION_SETS[name].places]

"""scikit-learn's digits, without importing scikit-learn: 1,797 grey pictures of 8x8 pixels."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.sampling import split_off_test
from featcache.data.sources import ArraySource

DIGITS_TEST_FRACTION = 0.2
WHITE = 16


def load_digits(config: DataConfig) -> ImageDataset:
    """The digits, a stratified and seeded part of them set aside for testing."""
    values, labels = _read_digits()
    pixels = np.rint(values * (255.0 / WHITE)).astype(np.uint8).reshape(-1, 8, 8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    ids = [f"digits/{number:05d}" for number in range(len(pictures))]
    every = ImageSplit("all", ids, labels, ArraySource(pictures.__getitem__))
    fraction = config.test_fraction or DIGITS_TEST_FRACTION
    splits = split_off_test(every, fraction, config.seed)
    names = [str(digit) for digit in range(10)]
    return ImageDataset("digits", "digits", splits, names, drawn=True, test_fraction=fraction)


def _read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Values 0 to 16, float64 [N, 64], and labels, int64 [N].

    scikit-learn ships them as one compressed table. Reading that takes a fiftieth of the time that
    importing scikit-learn does; where the table has moved, scikit-learn is asked.
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

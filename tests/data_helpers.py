"""Small datasets on disk for the data tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from featcache.config import DataConfig
from featcache.data import ImageDataset


def picture(number: int, side: int = 16) -> Image.Image:
    """A picture whose number can be read back from any pixel: red + 256 * green; blue is noise."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    pixels[..., 2] = np.random.default_rng(number).integers(0, 256, (side, side))
    return Image.fromarray(pixels)


def number_in(pixels: np.ndarray) -> int:
    """The number of a picture, from its pixels uint8 [H, W, 3]."""
    assert (pixels[..., :2] == pixels[0, 0, :2]).all()
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_tree(top: Path, classes: dict[str, int], first: int = 0) -> Path:
    """top/<class>/000.png, ...; every picture of a tree has another number."""
    number = first
    for name, count in classes.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (top / name / f"{i:03d}.png").write_bytes(encoded(picture(number)))
            number += 1
    return top


def make_folder(root: Path, train: int = 4, test: int = 2) -> Path:
    make_tree(root / "train", {"cat": train, "dog": train})
    make_tree(root / "test", {"cat": test, "dog": test}, first=1000)
    return root


def config(dataset: object, tmp_path: Path, **settings: object) -> DataConfig:
    places = {"data_root": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    return DataConfig(dataset=str(dataset), **(places | settings))  # type: ignore[arg-type]


class Load(Protocol):
    """Loads a dataset; further settings are those of DataConfig."""

    def __call__(self, dataset: object, **settings: object) -> ImageDataset: ...


class Message(Protocol):
    """The one line that refuses a dataset; further settings are those of DataConfig."""

    def __call__(self, dataset: object, **settings: object) -> str: ...

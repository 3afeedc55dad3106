"""Images, and small datasets on disk.

`picture` makes images that can be told apart by number, `make_pets` images that can be learned.
"""

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


SIDE = 24
HUES = {"cat": (180, 90, 90), "dog": (90, 180, 90), "eel": (90, 90, 180)}


def make_pets(root: Path, train: int = 11, test: int = 4) -> Path:
    """Class folders of images that a few steps of training can tell apart.

    Three classes of `train` and `test` images each, 24 by 24 pixels.
    """
    for seed, (name, hue) in enumerate(HUES.items()):
        draw(root / "train" / name, train, hue, seed)
        draw(root / "test" / name, test, hue, 100 + seed)
    return root


def draw(folder: Path, num: int, hue: tuple[int, int, int], seed: int) -> None:
    """Noise around a color, brighter on the left, so that mirroring changes it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    slope = np.linspace(30, -30, SIDE)[None, :, None]
    for i in range(num):
        noise = rng.integers(-60, 61, (SIDE, SIDE, 3))
        pixels = np.clip(np.array(hue) + noise + slope, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")

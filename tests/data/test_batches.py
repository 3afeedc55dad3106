"""Shuffled batches for fine-tuning: right pixels, labels and rows, decoded once or as they come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_helpers import Load, encoded, make_tree, number_in, picture
from featcache.config import Preprocessing
from featcache.data import (
    BadImage,
    ImageSplit,
    decode_split,
    iterate_batches,
)
from featcache.errors import UserError

PREP = Preprocessing(image_px=8, resize="squash", resize_px=8)


@pytest.fixture
def split(tmp_path: Path, load: Load) -> ImageSplit:
    root = tmp_path / "pets"
    make_tree(root / "train", {"cat": 20, "dog": 17})
    make_tree(root / "test", {"cat": 1, "dog": 1})
    return load(root).splits["train"]


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order_and_the_flips(
    split: ImageSplit, workers: int, memory: bool
) -> None:
    rng = np.random.default_rng(0)
    order, flips = rng.permutation(37)[:33], rng.random(33) < 0.5
    source = decode_split(split, PREP, workers=workers) if memory else split
    assert source is not None
    batches = list(iterate_batches(source, order, 8, PREP, workers=workers, flip_mask=flips))
    assert [len(rows) for _, _, rows in batches] == [8, 8, 8, 8, 1]
    rows = np.concatenate([rows for _, _, rows in batches])
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in batches]), split.labels[order])
    for place, pixels in enumerate(np.concatenate([x for x, _, _ in batches])):
        assert number_in(pixels) == order[place]
        plain = np.asarray(split.load(order[place]).resize((8, 8), 2))
        np.testing.assert_array_equal(pixels, plain[:, ::-1] if flips[place] else plain)


def test_a_pass_leaves_the_decoded_pixels_as_they_were(split: ImageSplit) -> None:
    decoded = decode_split(split, PREP, workers=1)
    assert decoded is not None
    before = decoded.pixels.copy()
    flips = np.ones(37, dtype=bool)
    for pixels, _, _ in iterate_batches(
        decoded, np.arange(37), 5, PREP, workers=1, flip_mask=flips
    ):
        pixels[:] = 0
    np.testing.assert_array_equal(decoded.pixels, before)


def test_too_much_for_memory_is_not_decoded(split: ImageSplit) -> None:
    size = 37 * 8 * 8 * 3
    assert decode_split(split, PREP, workers=0, limit_bytes=size - 1) is None
    assert decode_split(split, PREP, workers=0, limit_bytes=size) is not None


@pytest.mark.parametrize("memory", [True, False])
def test_bad_pictures_raise_or_are_left_out(
    split: ImageSplit, tmp_path: Path, memory: bool
) -> None:
    for name in ("cat/003", "dog/000", "dog/001"):  # rows 3, 20, 21
        (tmp_path / "pets" / "train" / f"{name}.png").write_bytes(b"junk")
    order = np.array([5, 3, 20, 21, 7])
    if memory:
        with pytest.raises(UserError, match=MESSAGE):
            decode_split(split, PREP, workers=1)
    else:
        with pytest.raises(UserError, match=MESSAGE):
            list(iterate_batches(split, order, 2, PREP, workers=1))
    told: list[tuple[int, str]] = []

    def on_bad(index: int, bad: BadImage) -> None:
        told.append((index, bad.reason))

    source = decode_split(split, PREP, workers=1, on_bad=on_bad) if memory else split
    assert source is not None
    batches = list(iterate_batches(source, order, 2, PREP, workers=1, on_bad=on_bad))
    assert [rows.tolist() for _, _, rows in batches] == [[5], [7]]
    assert [number_in(pixels[0]) for pixels, _, _ in batches] == [5, 7]
    assert sorted(told) == [(row, "not an image") for row in (3, 20, 21)]


MESSAGE = (
    r"^train/cat/003\.png in split train: not an image; repair or remove it, or leave such "
    r"images out with --on-error skip$"
)


def test_abandoning_a_pass_leaves_no_thread(split: ImageSplit) -> None:
    import threading

    batches = iterate_batches(split, np.arange(37), 4, PREP, workers=3)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_jpeg_pictures_too(tmp_path: Path, load: Load) -> None:
    for name in ("train/a/1", "train/b/1", "test/a/1", "test/b/1"):
        file = tmp_path / "jpegs" / f"{name}.JPG"
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(picture(3), "JPEG"))
    dataset = load(tmp_path / "jpegs")
    ((pixels, labels, rows),) = iterate_batches(
        dataset.splits["train"], np.array([1, 0]), 4, PREP, workers=2
    )
    assert pixels.shape == (2, 8, 8, 3)
    assert labels.tolist() == rows.tolist() == [1, 0]

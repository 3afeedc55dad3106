"""Pixels equal torchvision's: bit for bit by Pillow, within one gray level by torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.config import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Views
from featcache.data import BadImage, normalize, to_pixels, view_pixels
from featcache.data import pixels as pixels_module

MODES = ["nearest", "bilinear", "bicubic"]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def torchvisions(image: Image.Image, prep: Preprocessing) -> np.ndarray:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    mode = InterpolationMode(prep.interpolation)
    px = prep.image_px
    if prep.resize == "squash":
        return np.asarray(Resize((px, px), mode)(image))
    return np.asarray(Compose([Resize(prep.resize_px, mode), CenterCrop(px)])(image))


def assert_close(got: np.ndarray, wanted: np.ndarray, share: float = 0.03) -> None:
    """Equal within one gray level, and all but a share of the numbers equal.

    torch's weights have 16 bits where Pillow's have 22, so sums close to a half round differently.
    """
    assert got.dtype == np.uint8
    off = np.abs(got.astype(int) - wanted)
    assert off.max() <= 1
    assert (off > 0).mean() <= share


@pytest.fixture(params=["Pillow", "torch"])
def resizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of them makes images smaller, whatever is faster here."""
    monkeypatch.setattr(pixels_module, "_torch_is_fast", lambda: request.param == "torch")
    return request.param


def prep(px: int = 16, resize: str = "crop", resize_px: int | None = None, mode: str = "bilinear"):
    return Preprocessing(image_px=px, resize=resize, resize_px=resize_px or px, interpolation=mode)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(8, 40),
    st.integers(0, 17),
    st.sampled_from(["crop", "squash"]),
    st.sampled_from(MODES),
    st.booleans(),
)
def test_equal_to_torchvision(
    width: int, height: int, px: int, more: int, resize: str, mode: str, torchs: bool
) -> None:
    image = noise(width, height)
    how = prep(px, resize, px + more, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels_module, "_torch_is_fast", lambda: torchs)
        got = to_pixels(image, how)
    wanted = torchvisions(image, how)
    assert got.shape == (px, px, 3)
    short = px if resize == "squash" else px + more
    if torchs and mode != "nearest" and short <= min(width, height):
        assert_close(got, wanted, share=0.15)  # of few numbers
    else:
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (256, 256), (224, 900), (3000, 2000)])
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_torchvision_at_imagenets_sizes(
    size: tuple[int, int], mode: str, resizer: str
) -> None:
    how = prep(224, "crop", 256, mode)
    got, wanted = to_pixels(noise(*size), how), torchvisions(noise(*size), how)
    if resizer == "torch" and mode != "nearest" and min(size) > 256:
        assert (got != wanted).any()  # else Pillow was at work
        assert_close(got, wanted)
    else:
        np.testing.assert_array_equal(got, wanted)


def test_large_images_are_made_smaller_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "_torch_is_fast", lambda: True)
    image, how = noise(300, 200), prep(32, "crop", 40, "bicubic")
    whole = to_pixels(image, how)
    for num_bytes in (300 * 4 * 7, 1):  # strips of seven rows, and of one
        monkeypatch.setattr(pixels_module, "_STRIP_BYTES", num_bytes)
        np.testing.assert_array_equal(to_pixels(image, how), whole)


def test_memory_that_pillow_does_not_lend_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "_torch_is_fast", lambda: True)
    image, how = noise(300, 200), prep(32, "squash")
    wanted = to_pixels(image, how)
    for error in (AttributeError, ValueError):  # Pillow before 11.2; memory in several pieces

        def refuse(image: Image.Image, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "__arrow_c_array__", refuse)
        np.testing.assert_array_equal(to_pixels(image, how), wanted)
    monkeypatch.undo()


def test_lent_memory_is_what_pillow_holds() -> None:
    for size in ((1, 1), (1, 4000), (4000, 1), (313, 207), (2048, 2048)):  # the last fills a block
        image = noise(*size)
        lent = pixels_module._lent(image)
        assert lent is not None
        np.testing.assert_array_equal(lent[..., :3], np.asarray(image))
    wanted = np.array(image)
    del image  # the array keeps the memory
    np.testing.assert_array_equal(lent[..., :3], wanted)
    assert pixels_module._lent(noise(2048, 2049)) is None  # in two blocks


@pytest.mark.parametrize("mode", ["L", "P", "LA", "I;16", "F", "1"])
def test_memory_of_another_layout_is_not_taken(mode: str) -> None:
    lent = pixels_module._lent(Image.new(mode, (9, 5)))
    assert lent is None or lent.shape == (5, 9, 4)


@pytest.mark.parametrize(("name", "value"), [("alignment", 64), ("block_size", 4096)])
def test_pillows_allocator_may_be_set_otherwise(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels_module, "_torch_is_fast", lambda: True)
    how = prep(32, "squash")
    wanted = to_pixels(noise(301, 200), how)
    before = getattr(Image.core, f"get_{name}")()
    try:
        getattr(Image.core, f"set_{name}")(value)
        image = noise(301, 200)
        assert pixels_module._lent(image) is None
        np.testing.assert_array_equal(to_pixels(image, how), wanted)
    finally:
        getattr(Image.core, f"set_{name}")(before)


@pytest.mark.parametrize("size", [(100, 185), (16, 300), (20, 2000)])
def test_tall_images_are_pillows(size: tuple[int, int], resizer: str) -> None:
    how = prep(16, "squash", mode="bicubic")  # Pillow resizes them in another order than torch
    np.testing.assert_array_equal(to_pixels(noise(*size), how), torchvisions(noise(*size), how))


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = noise(16, 16)
    for resize in ("crop", "squash"):
        np.testing.assert_array_equal(to_pixels(image, prep(16, resize)), np.asarray(image))


def test_a_picture_that_would_grow_too_large_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "MAX_PIXELS", 16 * 16 * 10)
    assert to_pixels(noise(10, 1), prep(16)).shape == (16, 16, 3)
    with pytest.raises(BadImage, match=r"too large \(11x1 px, 176x16 px after the resize\)"):
        to_pixels(noise(11, 1), prep(16))
    assert to_pixels(noise(11, 1), prep(16, "squash")).shape == (16, 16, 3)


def test_plain_and_mirrored_views() -> None:
    image = noise(20, 30)
    plain = to_pixels(image, prep())
    np.testing.assert_array_equal(view_pixels(image, prep(), Views(), 0), plain[None])
    flipped = view_pixels(image, prep(), Views(kind="flip", num=2), 0)
    np.testing.assert_array_equal(flipped, [plain, plain[:, ::-1]])


def test_fast_decoding_leaves_enough_for_every_view() -> None:
    fast = dataclasses.replace(prep(16, "crop", 20), fast_decode=True)
    assert pixels_module.least_px(fast, Views()) == 20
    assert pixels_module.least_px(fast, Views(kind="flip", num=2)) == 20
    assert pixels_module.least_px(fast, Views(kind="random", num=3)) == 40
    assert pixels_module.least_px(prep(), Views(kind="random", num=3)) is None


def test_random_views_follow_from_seed_index_and_view() -> None:
    image = noise(40, 30)
    views = Views(kind="random", num=4, seed=7)
    one = view_pixels(image, prep(), views, 5)
    np.testing.assert_array_equal(one[0], to_pixels(image, prep()))
    np.testing.assert_array_equal(one, view_pixels(image, prep(), views, 5))
    assert len({view.tobytes() for view in one}) == 4
    for other in (
        view_pixels(image, prep(), views, 6),
        view_pixels(image, prep(), Views(kind="random", num=4, seed=8), 5),
    ):
        assert all((a != b).any() for a, b in zip(one[1:], other[1:], strict=True))
    # Fewer views are the same ones.
    fewer = view_pixels(image, prep(), Views(kind="random", num=2, seed=7), 5)
    np.testing.assert_array_equal(fewer, one[:2])
    huge = view_pixels(image, prep(), views, 2**64 - 1)
    assert huge.shape == one.shape


def test_random_crops_have_the_promised_area_and_shape() -> None:
    rng = np.random.default_rng(0)
    lefts = []
    for _ in range(500):
        left, top, right, bottom = pixels_module._random_box((400, 300), rng)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        width, height = right - left, bottom - top
        assert 0.34 < width * height / (400 * 300) <= 1
        assert 0.74 < width / height < 1.35
        lefts.append(left)
    assert min(lefts) == 0
    assert max(lefts) > 100


def test_a_thin_picture_gets_the_central_crop() -> None:
    rng = np.random.default_rng(0)
    assert pixels_module._random_box((1000, 10), rng) == (495, 0, 505, 10)
    assert pixels_module._random_box((1, 1), rng) == (0, 0, 1, 1)


@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (2, 300, 300, 3), (5, 16, 24, 3), (0, 8, 8, 3)])
@pytest.mark.parametrize(("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)])
def test_normalize_equals_torchvision(
    shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    import torch
    from torchvision.transforms import Normalize

    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    how = Preprocessing(image_px=8, resize="crop", resize_px=8, mean=mean, std=std)
    got = normalize(pixels, how)
    wanted = Normalize(mean, std)(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_normalize_takes_a_view_of_a_batch() -> None:
    import torch

    pixels = torch.arange(2 * 2 * 8 * 8 * 3, dtype=torch.int64).to(torch.uint8)
    pixels = pixels.reshape(2, 2, 8, 8, 3)
    for view in range(2):
        one = normalize(pixels[:, view], prep(8))
        assert torch.equal(one, normalize(pixels[:, view].contiguous(), prep(8)))

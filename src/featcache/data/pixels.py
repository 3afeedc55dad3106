"""From an image to the network's input: resize, crop, views, normalization."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import types
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import Preprocessing, Views
from featcache.config.records import Interpolation
from featcache.data.images import MAX_PIXELS, TOO_LARGE, BadImage

if TYPE_CHECKING:
    import torch

UInt8 = NDArray[np.uint8]

RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
AREA = (0.35, 1.0)
"""Fraction of the image's area that a random view shows."""
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
"""Log of a random view's aspect ratio, before it is resized to a square."""
CROP_TRIES = 10
_BLOCK = 65536
"""Pixels that fit a processor core's cache as float32."""
_STRIP_BYTES = 2**24
"""Pillow keeps images of up to this size in one piece of memory."""


def to_pixels(image: Image.Image, prep: Preprocessing) -> UInt8:
    """Resize and crop as torchvision's Resize and CenterCrop do with PIL images.

    Bit for bit, except that most images are made smaller by torch where that has vector
    instructions (x86 with AVX2): about 1 number in 500 then differs, by one gray level.

    Args:
        image: RGB.
        prep: `squash` ignores the aspect ratio; `crop` cuts the center after a resize of the
            shorter side.

    Returns:
        uint8 [H, W, 3] with H = W = prep.image_px; may be read-only.

    Raises:
        BadImage: The image is so long and thin that it would be too large after the resize.
    """
    side = prep.image_px
    if prep.resize == "squash":
        return _resized(image, (side, side), (0, 0, side, side), prep.interpolation)
    width, height = image.size
    short = prep.resize_px
    # The longer side is truncated, not rounded, as in torchvision.
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage(TOO_LARGE, f"{width}x{height} px, {size[0]}x{size[1]} px after the resize")
    # round() rounds half to even, as torchvision does.
    left, top = round((size[0] - side) / 2.0), round((size[1] - side) / 2.0)
    return _resized(image, size, (left, top, left + side, top + side), prep.interpolation)


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], mode: Interpolation
) -> UInt8:
    """Resize to `size` and cut out `box`."""
    if image.size != size:
        less = image.width - size[0], image.height - size[1]
        # Pillow 13 begins with the height if that loses over twice as much, torch with the width.
        same_order = min(less) >= 0 and less[1] <= 2 * less[0]
        if same_order and mode != "nearest" and _torch_is_fast():
            return _shrunk(image, size, box, mode)
        image = image.resize(size, RESAMPLE[mode])
    return np.asarray(image if box == (0, 0, *image.size) else image.crop(box))


@functools.cache
def _torch_is_fast() -> bool:
    """Whether torch resizes bytes with vector instructions here; without, Pillow is faster."""
    import torch

    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _shrunk(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], mode: str
) -> UInt8:
    """Like Pillow's resize and crop, four times as fast; each number within one gray level."""
    import torch

    def resized(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(
            pixels, size=(height, width), mode=mode, antialias=True
        )

    rows = max(1, _STRIP_BYTES // (4 * image.width))
    if image.height <= rows:
        small = resized(_as_tensor(image), *size)
    else:  # only the width, in strips, so that no second copy of a large image is made
        strips = []
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            strips.append(resized(_as_tensor(strip), size[0], strip.height))
        small = resized(torch.cat(strips, dim=2), *size)
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
    for channel in range(3):  # one by one is five times as fast as a copy of [..., :3]
        pixels[..., channel] = small[0, channel, top:bottom, left:right].numpy()
    return pixels


class _Schema(ctypes.Structure):
    """`struct ArrowSchema` of Arrow's C data interface, as far as it is read here."""


class _Array(ctypes.Structure):
    """`struct ArrowArray`, likewise."""


_COUNTS = ("length", "null_count", "offset", "n_buffers", "n_children")
_Schema._fields_ = [
    *((name, ctypes.c_char_p) for name in ("format", "name", "metadata")),
    *((name, ctypes.c_int64) for name in ("flags", "n_children")),
    ("children", ctypes.POINTER(ctypes.POINTER(_Schema))),
]
_Array._fields_ = [
    *((name, ctypes.c_int64) for name in _COUNTS),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Array))),
]
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _as_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image, without a copy where Pillow can lend its memory.

    Returns:
        uint8 [1, C, H, W] in channels-last memory, with C = 4 (the last is unused) or 3.
    """
    import torch

    pixels = _lent(image)
    pixels = np.array(image) if pixels is None else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _lent(image: Image.Image) -> UInt8 | None:
    """Pillow's own memory, uint8 [H, W, 4], which lives as long as the array; None if not lent."""
    shape = (image.height, image.width, 4)
    with contextlib.suppress(AttributeError, ValueError):  # Pillow before 11.2; memory in pieces
        if Image.core.get_alignment() != 1:  # type: ignore[attr-defined]
            return None  # rows have gaps, of which Arrow's array says nothing
        capsules = image.__arrow_c_array__()
        schema = _Schema.from_address(_pointer(capsules[0], b"arrow_schema"))
        array = _Array.from_address(_pointer(capsules[1], b"arrow_array"))
        values = array.children[0].contents
        kinds = (schema.format, schema.children[0].contents.format)
        extent = (array.offset, values.offset, values.length)
        if (kinds, extent) == ((b"+w:4", b"C"), (0, 0, math.prod(shape))):
            owner = types.SimpleNamespace(capsules=capsules)  # the array keeps it
            owner.__array_interface__ = {
                "data": (values.buffers[1], False),
                "shape": shape,
                "typestr": "|u1",
                "version": 3,
            }
            return np.asarray(owner)
    return None


def least_px(prep: Preprocessing, views: Views) -> int | None:
    """The sides that a decoded JPEG must have at least; None to decode it at its own size."""
    # Random views may show half of a side only.
    return prep.resize_px * (2 if views.kind == "random" else 1) if prep.fast_decode else None


def view_pixels(image: Image.Image, prep: Preprocessing, views: Views, index: int) -> UInt8:
    """All views of one image.

    Args:
        image: RGB.
        prep: Applied to view 0, the plain image, and mirrored for `flip`; a random view is
            resized from its crop straight to the input size.
        views: Which versions.
        index: Decides every random choice, with `views.seed` and the view's number.

    Returns:
        uint8 [V, H, W, 3] with V = views.num.
    """
    plain = to_pixels(image, prep)
    if views.num == 1:
        return plain[None]
    pixels = np.empty((views.num, *plain.shape), dtype=np.uint8)
    pixels[0] = plain
    if views.kind == "flip":
        pixels[1] = plain[:, ::-1]
        return pixels
    side = (prep.image_px, prep.image_px)
    for view in range(1, views.num):
        rng = np.random.Generator(np.random.PCG64([views.seed, index, view]))
        box = _random_box(image.size, rng)
        crop = np.asarray(image.resize(side, RESAMPLE[prep.interpolation], box=box))
        pixels[view] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return pixels


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A crop of random area, aspect ratio and position; the largest central square if none fits."""
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def normalize(pixels: torch.Tensor, prep: Preprocessing) -> torch.Tensor:
    """Scale to [0, 1], subtract the mean, divide by the standard deviation, per channel.

    Args:
        pixels: uint8 [N, H, W, 3], on any device.
        prep: Has the mean and standard deviation.

    Returns:
        float32 [N, 3, H, W] in channels-last memory, on the same device.
    """
    import torch

    num, height, width, channels = pixels.shape
    means, stds = _repeated(prep.mean, prep.std, width, pixels.device)
    scaled = torch.empty((num, height, width * channels), device=pixels.device)
    # Rows of W * 3 numbers instead of 3 make torch's inner loops long, and with a few images at a
    # time all three steps find them in the processor's cache: five times faster.
    rows = pixels.reshape(num, height, width * channels)
    block = max(1, _BLOCK // (height * width)) if pixels.device.type == "cpu" else max(1, num)
    for start in range(0, num, block):
        part = scaled[start : start + block]
        torch.div(rows[start : start + block], 255, out=part).sub_(means).div_(stds)
    return scaled.view(num, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _repeated(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of every number in a row of pixels; cached, since copying them stalls a GPU."""
    import torch

    with torch.inference_mode(False):
        both = torch.tensor([mean, std], dtype=torch.float32).repeat(1, width).to(device)
    return both[0], both[1]

"""Reading one picture: bytes to RGB, whatever the format and mode, or a reason why not."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

REASONS: dict[int, str] = {
    1: "truncated",
    2: "empty file",
    3: "not a picture",
    4: "too large",
    5: "unreadable",
    6: "missing",
    7: "other",
}
"""Why a picture could not be used, by the code that a cache stores; 0 is a good row."""

TRUNCATED, EMPTY, NOT_A_PICTURE, TOO_LARGE, UNREADABLE, MISSING, OTHER = REASONS

MAX_PIXELS = 2**27
"""Larger pictures are refused before they are decoded: 134 million pixels, 400 MB as RGB."""
MAX_FILE_BYTES = 2**29
_MANY_PIXELS = 2**24

EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
"""File names that count as pictures, in any case; the content decides the format."""

_HEIGHT_TAG = 0x0101
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError),
    *(KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError, NotImplementedError),
    *(AssertionError, RuntimeError),
)
"""What Pillow's decoders let through on damaged input, found by fuzzing."""


class BadImage(Exception):  # noqa: N818
    """A picture that cannot be used.

    Attributes:
        code: A key of REASONS.
        reason: Its text.
        detail: What exactly was wrong, for people; may be empty.
    """

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(code, detail)
        self.code = code
        self.reason = REASONS[code]
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def read_file(path: str) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file, and its status before they were read.

    Raises:
        BadImage: It is missing, empty, too large, not a regular file, or cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(UNREADABLE, "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(TOO_LARGE, f"{status.st_size} bytes, at most {MAX_FILE_BYTES}")
            data = file.readall()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage(MISSING) from error
    except OSError as error:
        raise BadImage(UNREADABLE, error.strerror or "") from error
    if not data:
        raise BadImage(EMPTY)
    return data, status


def decode(data: bytes) -> Image.Image:
    """Decode a picture of any accepted format to RGB, upright as its EXIF says.

    Alpha is laid over white. 16-bit grey is scaled to 8 bits. Of several frames the first counts.

    Raises:
        BadImage: The bytes are not a picture, are damaged, or are too large.
    """
    factory = _factory(data)
    if factory is None:
        raise BadImage(EMPTY if not data else NOT_A_PICTURE)
    try:
        with _open(factory, data) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(TOO_LARGE, f"{width}x{height} px, at most {MAX_PIXELS} in all")
            _refuse_missing_strips(image)
            # Pillow warns of large tiles, and of oddities behind an animated PNG's pixels.
            noisy = width * height > _MANY_PIXELS or (data[:1] == b"\x89" and b"acTL" in data)
            with _quiet() if noisy else contextlib.nullcontext():
                image.load()
            return to_rgb(_upright(image))
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _reason_of(error) from error


def decode_opened(image: Image.Image) -> Image.Image:
    """The picture that `decode` would give, of one that the caller opened or made with Pillow.

    Raises:
        BadImage: It is damaged, too large, or has no pixels.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        code = TOO_LARGE if image.width * image.height else OTHER
        raise BadImage(code, f"{image.width}x{image.height} px, at most {MAX_PIXELS} in all")
    try:
        # One at a time: the caller may give one picture twice, and loading it is not thread-safe.
        with _quiet():
            image.load()
        # Pillow's own TIFF reader has turned the picture by now.
        turned = isinstance(image, TiffImagePlugin.TiffImageFile)
        return to_rgb(image if turned else _upright(image))
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _reason_of(error) from error


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose EXIF Pillow does not parse: it is slow, and warns when damaged."""

    def _read_dpi_from_exif(self) -> None:
        return


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that Pillow does not turn upright, since it parses (and warns of) all EXIF for it."""

    def load_end(self) -> None:
        self._size = self.im.size  # of the picture as stored; Pillow gives that after turning


_Factory = Callable[[io.BytesIO], Image.Image]


def _factory(data: bytes) -> _Factory | None:
    """The format's reader by its first bytes.

    An own list, since Image.open also tries formats that start other programs (EPS) and warns of
    large pictures by a global filter that threads cannot set apart.
    """
    head = data[:12]
    for magic, factory in _MAGIC:
        if head.startswith(magic):
            return factory
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return PpmImagePlugin.PpmImageFile
    return None


_MAGIC: tuple[tuple[bytes, _Factory], ...] = (
    (b"\xff\xd8\xff", _Jpeg),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", _Tiff),
    (b"MM\0*", _Tiff),
    (b"II+\0", _Tiff),
    (b"MM\0+", _Tiff),
)

_WARNING_LOCK = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings; one thread at a time, because the filters belong to the process."""
    with _WARNING_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(factory: _Factory, data: bytes) -> Image.Image:
    """Parse the header; pixels are not decoded yet, except of WebP."""
    if factory in (_Jpeg, BmpImagePlugin.BmpImageFile, PpmImagePlugin.PpmImageFile):
        return factory(io.BytesIO(data))
    with _quiet():
        return factory(io.BytesIO(data))


def _refuse_missing_strips(image: Image.Image) -> None:
    """Refuse a TIFF whose strips or tiles do not reach its last row; Pillow leaves the rest black.

    Raises:
        BadImage: Some rows are not in the file.
    """
    if isinstance(image, _Tiff):
        height = image.tag_v2.get(_HEIGHT_TAG)
        reached = max((tile.extents[3] for tile in image.tile if tile.extents), default=0)
        if not isinstance(height, int) or reached < height:
            raise BadImage(TRUNCATED, f"{reached} of {height} rows")


def _reason_of(error: BaseException) -> BadImage:
    text = str(error) or type(error).__name__
    if isinstance(error, EOFError | struct.error | IndexError) or "runcated" in text:
        return BadImage(TRUNCATED, text)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(TOO_LARGE, text)
    return BadImage(OTHER, text)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF orientation says."""
    how = _TRANSPOSE.get(_orientation(image))
    return image if how is None else image.transpose(how)


def _orientation(image: Image.Image) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        value = image.tag_v2.get(_ORIENTATION_TAG, 1)
        return value if isinstance(value, int) else 1
    exif = image.info.get("exif")
    return exif_orientation(exif) if isinstance(exif, bytes) else 1


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 where there is none or the block is damaged.

    Pillow's own reader warns about damaged blocks, and parses all of them to find this one.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    with contextlib.suppress(struct.error):
        (start,) = struct.unpack_from(order + "I", block, 4)
        (num_entries,) = struct.unpack_from(order + "H", block, start)
        for entry in range(num_entries):
            tag, kind, count, value = struct.unpack_from(
                order + "HHIH", block, start + 2 + 12 * entry
            )
            if tag == _ORIENTATION_TAG:
                return value if kind == 3 and count == 1 else 1  # one unsigned short
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB; alpha is laid over white.

    Raises:
        BadImage: Its numbers have no agreed meaning as brightness.
    """
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _from_wide(image)
    if "transparency" in image.info or mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        return _over_white(image)
    return image if mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.new("RGB", rgba.size, (255, 255, 255))
    opaque.paste(rgba, mask=rgba.getchannel("A"))
    return opaque


def _from_wide(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits.

    Integers count as 16 bits: 65535 is white. Floats count as 0 to 1 if none is larger, else as
    0 to 255, else as 0 to 65535. Anything else is refused rather than guessed.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65535:
        raise BadImage(OTHER, f"grey values from {low:g} to {high:g}, wanted 0 to 65535")
    white = 65535.0
    if image.mode == "F" and high <= 255:
        white = 1.0 if high <= 1 else 255.0
    grey = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _MANY_PIXELS // 16 // values.shape[1])
    for top in range(0, len(values), rows):  # in strips: float64 takes eight times the memory
        strip = values[top : top + rows].astype(np.float64)
        grey[top : top + rows] = np.rint(strip * (255.0 / white))
    return Image.fromarray(grey).convert("RGB")

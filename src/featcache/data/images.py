"""Decoding one image: bytes of any format and mode to RGB, or the reason why that failed."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import threading
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from featcache.data.formats import DECODE_ERRORS, format_of, open_header, quiet, webp_size
from featcache.runtime import num_cores

REASONS: dict[int, str] = {
    1: "truncated",
    2: "empty file",
    3: "not an image",
    4: "too large",
    5: "unreadable",
    6: "missing",
    7: "other",
}
"""Why an image could not be used, by the code that a cache stores; 0 is a good row."""

TRUNCATED, EMPTY, NOT_AN_IMAGE, TOO_LARGE, UNREADABLE, MISSING, OTHER = REASONS

MAX_PIXELS = 2**27
"""Images with more pixels (134 million) are refused before they are decoded."""
MAX_PICTURE_BYTES = 12 * MAX_PIXELS
"""Images that would take more memory to decode (1.6 GB) are refused before they are decoded."""
MAX_FILE_BYTES = 2**29
_CORE_BYTES = 2**28
_MANY_PIXELS = 2**24

# Bytes per pixel while an image is decoded and rotated, measured and rounded up: Pillow keeps RGB
# in four bytes, and its WebP decoder two more canvases. For other formats the mode decides.
_FORMAT_BYTES = {"WEBP": 24, "AVIF": 24, "HEIF": 24, "JXL": 24, "JPEG2000": 32}
_MODE_BYTES = {"LA": 14, "F": 14, "I": 14}
_OTHER_MODE_BYTES = 12

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Suffixes of image files, in any case; the content decides the format."""

_TURNED_BY = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):  # noqa: N818
    """An image that cannot be used.

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


class _MemoryBudget:
    """Memory that threads share: one that needs more than is free waits for the others."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset: in a forked child the threads that held memory do not exist to free it."""
        self._free = max(MAX_PICTURE_BYTES, num_cores() * _CORE_BYTES)
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: num_bytes <= self._free)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += num_bytes
                self._changed.notify_all()


_BUDGET = _MemoryBudget()
os.register_at_fork(after_in_child=_BUDGET.reset)


@contextlib.contextmanager
def decoded(data: bytes, least_px: int | None = None) -> Iterator[Image.Image]:
    """Decode an image of any accepted format to RGB, upright as its EXIF or XMP says.

    Alpha is blended over white, 16-bit gray is scaled to 8 bits, and of several frames the first
    is used. All threads together hold at most 1.6 GB of images, or 268 MB per core if that is
    more; an image counts until the block ends.

    Args:
        data: The file's content.
        least_px: Decode a JPEG at 1/2, 1/4 or 1/8 of its size if both sides stay at least this
            long: fewer pixels are computed, from the low frequencies alone.

    Raises:
        BadImage: The bytes are not an image, are damaged, or are too large.
    """
    name = _readable_format(data)
    with _errors_named():
        # Opening a WebP makes Pillow allocate whole canvases, so its size is read first.
        header = None if name == "WEBP" else open_header(name, data)
        size, mode = (webp_size(data), "RGBA") if header is None else (header.size, header.mode)
    per_pixel = _FORMAT_BYTES.get(name) or _MODE_BYTES.get(mode, _OTHER_MODE_BYTES)
    num_bytes = size[0] * size[1] * per_pixel
    if size[0] * size[1] > MAX_PIXELS or num_bytes > MAX_PICTURE_BYTES:
        most = min(MAX_PIXELS, MAX_PICTURE_BYTES // per_pixel)
        raise BadImage(TOO_LARGE, f"{size[0]}x{size[1]} px, at most {most} in all")
    with _BUDGET.held(num_bytes):
        with _errors_named():
            header = header or open_header(name, data)
            if least_px is not None and name == "JPEG":
                header.draft(header.mode, (least_px, least_px))
            image = _loaded(header, data)
        header = None
        yield image


def _readable_format(data: bytes) -> str:
    found = format_of(data)
    if found is None:
        raise BadImage(NOT_AN_IMAGE if data else EMPTY)
    if not found.is_readable():
        detail = f"{found.called}, which Pillow does not read here: {found.remedy()}"
        raise BadImage(OTHER, detail)
    return found.name


def decode(data: bytes) -> Image.Image:
    """Like `decoded`, for an image to keep. Raises BadImage."""
    with decoded(data) as image:
        return image


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    _refuse_missing_strips(image)
    # Pillow warns about large tiles, and about odd chunks after the pixels of an animated PNG.
    noisy = image.width * image.height > _MANY_PIXELS or (data[:1] == b"\x89" and b"acTL" in data)
    with quiet() if noisy else contextlib.nullcontext():
        image.load()
    return _upright_rgb(image)


def decode_opened(image: Image.Image) -> Image.Image:
    """Like `decode`, for an image that the caller opened or made with Pillow.

    Raises:
        BadImage: It is damaged, too large, or has no pixels.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        code = TOO_LARGE if image.width * image.height else OTHER
        raise BadImage(code, f"{image.width}x{image.height} px, at most {MAX_PIXELS} in all")
    with _errors_named():
        # One at a time: the caller may give one image twice, and loading it is not thread-safe.
        with quiet():
            image.load()
        return _upright_rgb(image)


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Turn what Pillow raises into a BadImage."""
    try:
        yield
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _reason_of(error) from error


def _refuse_missing_strips(image: Image.Image) -> None:
    """Refuse a TIFF whose strips or tiles end before its last row; Pillow leaves the rest black.

    Raises:
        BadImage: Some rows are not in the file.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        height = image.tag_v2.get(TiffImagePlugin.IMAGELENGTH)
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


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB and rotate it as its EXIF or XMP says, if they can be read.

    Not by ImageOps.exif_transpose: it also rewrites the EXIF, and fails where that is damaged.
    """
    rgb, how = to_rgb(image), None
    if image.info.keys() & _TURNED_BY or isinstance(image, TiffImagePlugin.TiffImageFile):
        with contextlib.suppress(*DECODE_ERRORS), quiet():
            how = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return rgb if how is None else rgb.transpose(how)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB; alpha is blended over white.

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
    """Convert gray of more than 8 bits to RGB.

    Integers count as 16 bits: 65535 is white. Floats count as 0 to 1 if none is larger, else as
    0 to 255, else as 0 to 65535. Other ranges are refused, because their meaning is a guess.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65535:
        raise BadImage(OTHER, f"gray values from {low:g} to {high:g}, expected 0 to 65535")
    white = 65535.0
    if image.mode == "F" and high <= 255:
        white = 1.0 if high <= 1 else 255.0
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
    transparent = image.info.get("transparency")
    gray = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _MANY_PIXELS // 16 // values.shape[1])
    for top in range(0, len(values), rows):  # in strips, since float64 takes eight times the memory
        strip, out = values[top : top + rows], gray[top : top + rows]
        scaled = strip.astype(np.float64) * (255.0 / white)
        out[:] = np.rint(255.0 - scaled if inverted else scaled)
        if transparent is not None:
            out[strip == transparent] = 255
    return Image.fromarray(gray).convert("RGB")

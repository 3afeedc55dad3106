"""Reading one picture: bytes to RGB, whatever the format and mode, or a reason why not."""

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
    3: "not a picture",
    4: "too large",
    5: "unreadable",
    6: "missing",
    7: "other",
}
"""Why a picture could not be used, by the code that a cache stores; 0 is a good row."""

TRUNCATED, EMPTY, NOT_A_PICTURE, TOO_LARGE, UNREADABLE, MISSING, OTHER = REASONS

MAX_PIXELS = 2**27
"""Larger pictures are refused before they are decoded: 134 million pixels."""
MAX_PICTURE_BYTES = 12 * MAX_PIXELS
"""Pictures that take more memory to decode are refused before they are: 1.6 GB."""
MAX_FILE_BYTES = 2**29
_CORE_BYTES = 2**28
_MANY_PIXELS = 2**24

# Bytes per pixel while a picture is decoded and turned, measured and rounded up: Pillow keeps RGB
# in four bytes, and the animation decoder of WebP two canvases besides. Other formats: by mode.
_FORMAT_BYTES = {"WEBP": 24, "AVIF": 24, "HEIF": 24, "JXL": 24, "JPEG2000": 32}
_MODE_BYTES = {"LA": 14, "F": 14, "I": 14}
_OTHER_MODE_BYTES = 12

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""File names that count as pictures, in any case; the content decides the format."""

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


class _Room:
    """Memory that threads share: whoever needs more than is free waits for the others."""

    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        """Forget who held what: in a forked child those threads are not there to free it."""
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


_ROOM = _Room()
os.register_at_fork(after_in_child=_ROOM.empty)


@contextlib.contextmanager
def decoded(data: bytes) -> Iterator[Image.Image]:
    """Decode a picture of any accepted format to RGB, upright as its EXIF or XMP says.

    Alpha is laid over white. 16-bit grey is scaled to 8 bits. Of several frames the first counts.
    All threads together decode at most 1.6 GB, or 268 MB per core where that is more: a picture
    counts until the block ends.

    Raises:
        BadImage: The bytes are not a picture, are damaged, or are too large.
    """
    name = _readable_format(data)
    with _errors_named():
        # The first thing that Pillow does with WebP is to lay out whole canvases.
        header = None if name == "WEBP" else open_header(name, data)
        size, mode = (webp_size(data), "RGBA") if header is None else (header.size, header.mode)
    per_pixel = _FORMAT_BYTES.get(name) or _MODE_BYTES.get(mode, _OTHER_MODE_BYTES)
    num_bytes = size[0] * size[1] * per_pixel
    if size[0] * size[1] > MAX_PIXELS or num_bytes > MAX_PICTURE_BYTES:
        most = min(MAX_PIXELS, MAX_PICTURE_BYTES // per_pixel)
        raise BadImage(TOO_LARGE, f"{size[0]}x{size[1]} px, at most {most} in all")
    with _ROOM.held(num_bytes):
        with _errors_named():
            image = _loaded(header or open_header(name, data), data)
        header = None
        yield image


def _readable_format(data: bytes) -> str:
    found = format_of(data)
    if found is None:
        raise BadImage(NOT_A_PICTURE if data else EMPTY)
    if not found.is_readable():
        detail = f"{found.called}, which Pillow does not read here: {found.remedy()}"
        raise BadImage(OTHER, detail)
    return found.name


def decode(data: bytes) -> Image.Image:
    """What `decoded` gives, to keep. Raises BadImage."""
    with decoded(data) as image:
        return image


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    _refuse_missing_strips(image)
    # Pillow warns of large tiles, and of oddities behind an animated PNG's pixels.
    noisy = image.width * image.height > _MANY_PIXELS or (data[:1] == b"\x89" and b"acTL" in data)
    with quiet() if noisy else contextlib.nullcontext():
        image.load()
    return _upright_rgb(image)


def decode_opened(image: Image.Image) -> Image.Image:
    """The picture that `decode` would give, of one that the caller opened or made with Pillow.

    Raises:
        BadImage: It is damaged, too large, or has no pixels.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        code = TOO_LARGE if image.width * image.height else OTHER
        raise BadImage(code, f"{image.width}x{image.height} px, at most {MAX_PIXELS} in all")
    with _errors_named():
        # One at a time: the caller may give one picture twice, and loading it is not thread-safe.
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
    """Refuse a TIFF whose strips or tiles do not reach its last row; Pillow leaves the rest black.

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
    """Convert a loaded picture, and turn it as its EXIF or XMP says, where they can be read."""
    rgb, how = to_rgb(image), None
    if image.info.keys() & _TURNED_BY or isinstance(image, TiffImagePlugin.TiffImageFile):
        with contextlib.suppress(*DECODE_ERRORS), quiet():
            how = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return rgb if how is None else rgb.transpose(how)


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
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
    transparent = image.info.get("transparency")
    grey = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _MANY_PIXELS // 16 // values.shape[1])
    for top in range(0, len(values), rows):  # in strips: float64 takes eight times the memory
        strip, out = values[top : top + rows], grey[top : top + rows]
        scaled = strip.astype(np.float64) * (255.0 / white)
        out[:] = np.rint(255.0 - scaled if inverted else scaled)
        if transparent is not None:
            out[strip == transparent] = 255
    return Image.fromarray(grey).convert("RGB")

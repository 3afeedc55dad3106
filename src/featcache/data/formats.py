"""Recognizing an image's format, and opening it with Pillow's reader for that format."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

# Pillow's name of a format, the common name, and how its files begin.
_FORMATS = tuple(
    (name, called, re.compile(start, re.DOTALL))
    for name, called, start in (
        ("JPEG", "JPEG", rb"\xff\xd8\xff"),
        ("PNG", "PNG", rb"\x89PNG\r\n\x1a\n"),
        ("GIF", "GIF", rb"GIF8[79]a"),
        ("BMP", "BMP", rb"BM"),
        ("TIFF", "TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("WEBP", "WebP", rb"RIFF....WEBP"),
        ("PPM", "PPM", rb"P[1-6]\s"),
        ("JPEG2000", "JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
        ("AVIF", "AVIF", rb"....ftyp(?:avi[fs]|m[is]f1(?:....)+?avi[fs])"),
        ("HEIF", "HEIC", rb"....ftyp(?:he[iv][cmsx]|m[is]f1)"),
        ("JXL", "JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    )
)
_HEAD_BYTES = 64


DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError),
    *(KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError, NotImplementedError),
    *(AssertionError, RuntimeError),
)
"""What Pillow's decoders raise on damaged input, found by fuzzing."""


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose EXIF Pillow does not parse, which is slow and warns of damage."""

    def _read_dpi_from_exif(self) -> None:
        return


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that Pillow does not rotate upright, for which it would parse all EXIF and warn."""

    def _open(self) -> None:
        super()._open()
        with contextlib.suppress(*DECODE_ERRORS):
            self.getexif()  # while the file is open and warnings are off

    def load_end(self) -> None:
        self._size = self.im.size  # of the image as stored; Pillow's is after rotation


_OWN = {"JPEG": _Jpeg, "TIFF": _Tiff}


class Format(NamedTuple):
    """An image format: Pillow's name for it and the common name."""

    name: str
    called: str

    def is_readable(self) -> bool:
        """Whether Pillow has a reader for it on this machine."""
        if self.name not in Image.OPEN:
            with quiet():
                Image.init()
                if self.name == "HEIF":
                    with contextlib.suppress(ImportError):
                        importlib.import_module("pillow_heif").register_heif_opener()
        return self.name in Image.OPEN

    def remedy(self) -> str:
        """What to do if it has none."""
        install = "python -m pip install pillow-heif, or " if self.name == "HEIF" else ""
        return f"{install}convert it to JPEG or PNG"


def format_of(data: bytes) -> Format | None:
    """The format, found from the first bytes; None for anything that is not an image."""
    head = data[:_HEAD_BYTES]
    return next((Format(n, called) for n, called, start in _FORMATS if start.match(head)), None)


# Warning filters belong to the process, so only one thread at a time may change them.
_WARNING_LOCK = threading.Lock()


def _forget_threads() -> None:
    """In a forked child the thread that held the lock does not exist to release it."""
    global _WARNING_LOCK  # noqa: PLW0603
    _WARNING_LOCK = threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, in one thread at a time."""
    with _WARNING_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_header(name: str, data: bytes) -> ImageFile.ImageFile:
    """Parse the header; no pixels are decoded yet, but WebP's canvases are allocated.

    Not by Image.open, which hides what is wrong with a header.
    """
    lean = _without_bulk(data) if name == "PNG" else data
    with quiet() if name not in ("JPEG", "BMP", "PPM") else contextlib.nullcontext():
        return (_OWN.get(name) or Image.OPEN[name][0])(io.BytesIO(lean), "")


def _without_bulk(data: bytes) -> bytes:
    """A PNG without the profiles and texts that unpack to more than Pillow accepts."""
    stream, kept, place = PngImagePlugin.PngStream(io.BytesIO()), 8, 8
    parts = []
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + 12 + length
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            stream.fp = io.BytesIO(data[start + 8 : place])
            try:
                stream.call(kind, 0, length)
            except ValueError:
                parts.append(data[kept:start])
                kept = place
            except DECODE_ERRORS:
                break
    return b"".join((data[:8], *parts, data[kept:])) if parts else data


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP's canvas, from its first chunk."""
    kind = data[12:16]
    if kind == b"VP8X":
        wide, high = data[24:27], data[27:30]
        return int.from_bytes(wide, "little") + 1, int.from_bytes(high, "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF

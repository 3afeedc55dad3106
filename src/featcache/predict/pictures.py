"""Pictures in every form as a split, so that they take the same way as a dataset's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.data import ImageSplit
from featcache.data.images import MAX_FILE_BYTES, decode_opened
from featcache.data.sources import ArraySource, FileSource
from featcache.errors import UserError

Encoded = bytes | bytearray | memoryview
Picture = Image.Image | str | os.PathLike[str] | Encoded | BinaryIO | npt.NDArray[np.uint8]

ACCEPTED = "a path, a PIL image, a file's bytes, a file opened in binary mode, or a uint8 array"


def split_of(pictures: Picture | Iterable[Picture]) -> ImageSplit:
    """Pictures as a split; rows are in the order given, ids are the paths as given.

    Raises:
        UserError: One is in none of the forms that `Picture` names.
    """
    many: list[Any]
    if _is_one(pictures):
        many = [pictures]
    elif isinstance(pictures, Iterable):
        many = list(pictures)
    else:
        raise UserError(f"a {type(pictures).__name__} is no picture: give {ACCEPTED}, or a list")
    taken = [_taken(place, picture) for place, picture in enumerate(many)]
    ids = [p if isinstance(p, str) else f"picture {place}" for place, p in enumerate(taken)]
    return ImageSplit("pictures", ids, np.zeros(len(ids), np.int64), _Pictures(taken, ids))


def _is_one(pictures: object) -> bool:
    """Whether this is one picture, not many; an array of four axes is many."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim < 4
    known = isinstance(pictures, Image.Image | str | os.PathLike | Encoded)
    return known or hasattr(pictures, "read")


def _taken(place: int, picture: Any) -> str | bytes | Image.Image:
    """A path, a file's bytes or a PIL image. A file is read now: it can be read only once."""
    if isinstance(picture, str | os.PathLike):
        return os.fsdecode(picture)
    if isinstance(picture, Image.Image):
        return picture
    if hasattr(picture, "read"):
        picture = picture.read(MAX_FILE_BYTES + 1)
    if isinstance(picture, np.ndarray):
        return _from_array(place, picture)
    if isinstance(picture, Encoded):
        if len(picture) > MAX_FILE_BYTES:
            raise UserError(f"picture {place} is larger than {MAX_FILE_BYTES} bytes")
        return bytes(picture)
    raise UserError(f"picture {place} is a {type(picture).__name__}: give {ACCEPTED}")


def _from_array(place: int, array: npt.NDArray[Any]) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (1, 3, 4):
        raise UserError(
            f"picture {place} is an array {array.dtype} {list(array.shape)}: give uint8 [H, W], or "
            "[H, W, C] of 1, 3 (RGB) or 4 (RGBA) channels"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


class _Pictures:
    """Where each picture comes from: a file or memory."""

    def __init__(self, pictures: Sequence[str | bytes | Image.Image], ids: Sequence[str]) -> None:
        self._pictures = pictures
        self._files = FileSource([os.path.abspath(path) for path in ids], None)
        self._opened = ArraySource(self._decoded)

    def _decoded(self, position: int) -> Image.Image:
        return decode_opened(cast(Image.Image, self._pictures[position]))

    def read(self, position: int) -> bytes | Image.Image:
        """The file's bytes, or the picture upright and in RGB. Raises BadImage."""
        picture = self._pictures[position]
        if isinstance(picture, bytes):
            return picture
        if isinstance(picture, Image.Image):
            return self._decoded(position)  # the caller's own object: nothing to compare
        return self._files.read(position)

    def content(self, position: int) -> bytes:
        """The sha256 of what the picture is. Raises BadImage."""
        picture = self._pictures[position]
        if isinstance(picture, bytes):
            return hashlib.sha256(picture).digest()
        return (self._files if isinstance(picture, str) else self._opened).content(position)

    def record(self, position: int, digest: bytes) -> None:
        """Demand from now on that the picture has this sha256."""
        if isinstance(self._pictures[position], str):  # else the caller's own object
            self._files.record(position, digest)

    def finish(self) -> None:
        """Nothing to do."""

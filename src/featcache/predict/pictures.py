"""Images in every form: the paths that a command line means, and what Python calls give."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.data import EXTENSIONS, ImageSplit, is_clutter
from featcache.data.images import MAX_FILE_BYTES, decode_opened
from featcache.data.sources import ArraySource, FileSource
from featcache.errors import UserError

STANDARD_INPUT = "-"
CHUNK_BYTES = 1 << 16
MAX_LIST_BYTES = 1 << 28
NOTHING_NAMED = "standard input named no image: give paths, one a line or NUL-separated"


def find_pictures(inputs: Sequence[str], stdin: BinaryIO | None = None) -> list[str]:
    """Paths of the images that `inputs` name, in the order given.

    Args:
        inputs: Files (whatever their names end in), folders, or "-".
        stdin: What "-" reads: paths, one a line or, as `find -print0` writes them, each ended by
            NUL; bytes that are not UTF-8 are kept as they are.

    Returns:
        Paths as given; those from folders sorted, under the folder's name as given.

    Raises:
        UserError: A folder cannot be listed or has no image, nothing named exists, or
            standard input is not a list of paths.
    """
    paths: list[str] = []
    for word in inputs:
        if word == STANDARD_INPUT:
            for arrived in arriving_pictures(stdin, MAX_LIST_BYTES):
                paths += arrived
        elif os.path.isdir(word):
            paths += pictures_below(word)
        else:
            paths.append(word)
    if not paths:
        raise UserError(NOTHING_NAMED)
    if STANDARD_INPUT not in inputs and all(map(_is_missing, paths)):
        more = f", nor any of {len(paths) - 1} others" if len(paths) > 1 else ""
        raise UserError(f"there is no {paths[0]}{more}: give images, folders, or -")
    return paths


def _is_missing(path: str) -> bool:
    """Whether nothing is there; an unreadable path is not missing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        pass
    return False


def arriving_pictures(
    stdin: BinaryIO | None = None, most_bytes: float = math.inf
) -> Iterator[list[str]]:
    """Paths of the images that standard input names, as they arrive.

    Args:
        stdin: As in `find_pictures`.
        most_bytes: More are refused.

    Raises:
        UserError: As `find_pictures`.
    """
    for entries in _entries(stdin or sys.stdin.buffer, most_bytes):
        names = [os.fsdecode(entry) for entry in entries if entry]
        found = [pictures_below(name) if os.path.isdir(name) else [name] for name in names]
        if found:
            yield list(chain.from_iterable(found))


def _entries(stdin: BinaryIO, most_bytes: float) -> Iterator[list[bytes]]:
    rest, num_bytes, separator = b"", 0, b""
    while chunk := _read(stdin):
        num_bytes += len(chunk)
        separator = separator or next((sign for sign in (b"\0", b"\n") if sign in chunk), b"")
        *entries, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        if len(rest) > CHUNK_BYTES or num_bytes > most_bytes:
            raise UserError("standard input is not a list of paths: give one a line")
        yield entries if separator == b"\0" else [entry.rstrip(b"\r") for entry in entries]
    yield [rest.rstrip(b"\r\n")]


def _read(stdin: BinaryIO) -> bytes:
    try:
        # Only what is there: a program that waits for the answer to a line sends no more.
        read: Callable[[int], bytes] = getattr(stdin, "read1", stdin.read)
        return read(CHUNK_BYTES)
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}; pipe paths in") from error


def pictures_below(folder: str) -> list[str]:
    """Every image in a folder and its subfolders, sorted by path.

    Hidden entries and systems' own folders (@eaDir, lost+found, …) are left out. Links to folders
    are followed, except back into a folder on the way down to them.

    Raises:
        UserError: A folder cannot be listed, or there is no image.
    """
    found = sorted(_images_below(folder, ()))
    if not found:
        raise UserError(f"no image in {folder}; names of images end in {', '.join(EXTENSIONS)}")
    return found


def _images_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_clutter(entry.name)]
    except OSError as error:
        raise UserError(
            f"cannot list {folder}: {error.strerror}; make it readable, or name its images"
        ) from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in found:
        if os.path.isdir(entry.path):
            yield from _images_below(entry.path, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path


Encoded = bytes | bytearray | memoryview
Picture = Image.Image | str | os.PathLike[str] | Encoded | BinaryIO | npt.NDArray[np.uint8]

ACCEPTED = "a path, a PIL image, a file's bytes, a file opened in binary mode, or a uint8 array"


def split_of(pictures: Picture | Iterable[Picture]) -> ImageSplit:
    """Images as a split; rows are in the order given, ids are the paths as given.

    Raises:
        UserError: One is in none of the forms that `Picture` names.
    """
    many: list[Any]
    if _is_one(pictures):
        many = [pictures]
    elif isinstance(pictures, Iterable):
        many = list(pictures)
    else:
        raise UserError(f"not an image but {type(pictures).__name__}: give {ACCEPTED}, or a list")
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
        """The sha256 of the image's content. Raises BadImage."""
        picture = self._pictures[position]
        if isinstance(picture, bytes):
            return hashlib.sha256(picture).digest()
        return (self._files if isinstance(picture, str) else self._opened).content(position)

    def record(self, position: int, digest: bytes) -> None:
        """Require from now on that the image has this sha256."""
        if isinstance(self._pictures[position], str):  # else the caller's own object
            self._files.record(position, digest)

    def recall(self, name: str) -> bytes | None:
        """Nothing is remembered."""

    def finish(self) -> None:
        """Nothing to do."""

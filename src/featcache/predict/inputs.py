"""Which pictures the words of a command line mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from featcache.data import EXTENSIONS
from featcache.errors import UserError

STANDARD_INPUT = "-"
CHUNK_BYTES = 1 << 16
MAX_LIST_BYTES = 1 << 28


def find_pictures(inputs: Sequence[str], stdin: BinaryIO | None = None) -> list[str]:
    """Paths of the pictures that `inputs` name, in the order given.

    Args:
        inputs: Files (whatever their names end in), folders, or "-".
        stdin: What "-" reads: paths, one a line or, as `find -print0` writes them, each ended by
            NUL; bytes that are not UTF-8 are kept as they are.

    Returns:
        Paths as given; those from folders sorted, under the folder's name as given.

    Raises:
        UserError: A folder cannot be listed or holds no picture, nothing named exists, or
            standard input is no list of paths.
    """
    paths: list[str] = []
    for word in inputs:
        if word == STANDARD_INPUT:
            paths += _listed(stdin or sys.stdin.buffer)
        elif os.path.isdir(word):
            paths += pictures_below(word)
        else:
            paths.append(word)
    if not paths:
        raise UserError("standard input named no picture: give paths, one a line")
    if STANDARD_INPUT not in inputs and not any(map(os.path.lexists, paths)):
        more = f", nor any of {len(paths) - 1} others" if len(paths) > 1 else ""
        raise UserError(f"there is no {paths[0]}{more}: give pictures, folders, or -")
    return paths


def _listed(stdin: BinaryIO) -> Iterator[str]:
    for entry in _entries(stdin):
        name = os.fsdecode(entry)
        if name and os.path.isdir(name):
            yield from pictures_below(name)
        elif name:
            yield name


def _entries(stdin: BinaryIO) -> Iterator[bytes]:
    rest, num_bytes, separator = b"", 0, b""
    while chunk := stdin.read(CHUNK_BYTES):
        num_bytes += len(chunk)
        separator = separator or (b"\0" if b"\0" in chunk else b"\n")
        *entries, rest = (rest + chunk).split(separator)
        if len(rest) > CHUNK_BYTES or num_bytes > MAX_LIST_BYTES:
            raise UserError("standard input is no list of pictures: give paths, one a line")
        yield from entries if separator == b"\0" else (entry.rstrip(b"\r") for entry in entries)
    yield rest.rstrip(b"\r\n")


def pictures_below(folder: str) -> list[str]:
    """Every picture in a folder and its subfolders, sorted by path; hidden entries are left out.

    Links to folders are followed, except back into a folder on the way down to them.

    Raises:
        UserError: A folder cannot be listed, or there is no picture.
    """
    found = sorted(_walk(folder, ()))
    if not found:
        raise UserError(
            f"no picture in {folder}; file names that count end in {', '.join(EXTENSIONS)}"
        )
    return found


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"cannot list {folder}: {error.strerror}; make it readable, or name its pictures"
        ) from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in found:
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path

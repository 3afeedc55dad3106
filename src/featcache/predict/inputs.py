"""Which pictures the words of a command line mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from featcache.data import EXTENSIONS
from featcache.errors import UserError

STANDARD_INPUT = "-"


def find_pictures(inputs: Sequence[str], stdin: BinaryIO | None = None) -> list[str]:
    """Paths of the pictures that `inputs` name, in the order given.

    Args:
        inputs: Files (whatever their names end in), folders, or "-".
        stdin: What "-" reads: paths, one a line or with NUL after each (find -print0); bytes that
            are not UTF-8 are kept as they are.

    Returns:
        Paths as given; those from folders sorted, under the folder's name as given.

    Raises:
        UserError: A folder cannot be listed or holds no picture, or nothing named exists.
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
        raise UserError("standard input named no picture: give paths, one a line or NUL-separated")
    if STANDARD_INPUT not in inputs and not any(map(os.path.lexists, paths)):
        more = f", nor any of {len(paths) - 1} others" if len(paths) > 1 else ""
        raise UserError(f"there is no {paths[0]}{more}: give pictures, folders, or -")
    return paths


def _listed(stdin: BinaryIO) -> Iterator[str]:
    try:
        data = stdin.read()
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}; pipe paths in") from error
    names = data.split(b"\0") if b"\0" in data else (s.rstrip(b"\r") for s in data.split(b"\n"))
    for name in map(os.fsdecode, names):
        if name and os.path.isdir(name):
            yield from pictures_below(name)
        elif name:
            yield name


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

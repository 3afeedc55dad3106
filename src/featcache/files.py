"""Files that others made: only ordinary ones are read, and none of them is written over."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from featcache.errors import UserError

MARKS_BYTES = 16 << 20
"""The marks of a file's kind lie within so many bytes of its start or end."""


def open_regular(path: Path | str) -> int:
    """Open an ordinary file for reading: no pipe can block, no device is touched.

    Returns:
        A file descriptor.

    Raises:
        OSError: It is a folder (EISDIR) or no ordinary file (EINVAL), or the file system refused.
    """
    # Before opening too: opening a device can do something.
    _check_regular(os.stat(path).st_mode, path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(os.fstat(fd).st_mode, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(mode: int, path: Path | str) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file", os.fspath(path))


def read_regular(path: Path | str, max_bytes: int) -> bytes:
    """All bytes of an ordinary file of bounded size.

    Raises:
        OSError: As `open_regular`; or it is larger than that (EFBIG).
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        reason = f"it has more than {max_bytes:,} bytes"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return data


def check_outputs(
    outputs: Mapping[Path, re.Pattern[bytes]], inputs: Collection[Path | str] = ()
) -> None:
    """Refuse to replace an input, a file that featcache did not write, a link, or a device.

    Args:
        outputs: Every file that a command will replace, companions included, each with a pattern
            that finds the marks of its kind.
        inputs: What the command reads; names of no file are passed over.

    Raises:
        UserError: In one line, naming the file.
    """
    for path, ours in outputs.items():
        if path.is_symlink():
            target = os.path.join(path.parent, os.readlink(path))
            raise UserError(
                f"{path} is a link, which would be replaced: give its target {target} as --output, "
                "or remove the link"
            )
        try:
            status = os.stat(path)
        except OSError:  # nothing is there; or the write says why not
            continue
        if any(_is_file(other, status) for other in inputs):
            raise UserError(f"{path} would be replaced and is to be read: give another --output")
        if not _is_ours(path, ours):
            raise UserError(
                f"{path} is there already and is no file that this command writes: give another "
                "--output, or move it away"
            )


def _is_file(path: Path | str, status: os.stat_result) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name of no file
        return os.path.samestat(status, os.stat(path))
    return False


def _is_ours(path: Path, ours: re.Pattern[bytes]) -> bool:
    """Whether a file has the marks of its kind; an empty one has nothing to lose."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = file.read(MARKS_BYTES)
            file.seek(max(len(start), os.fstat(file.fileno()).st_size - MARKS_BYTES))
            return not start or any(ours.search(part) for part in (start, file.read(MARKS_BYTES)))
    except OSError as error:
        raise UserError(
            f"cannot replace {path}: {error.strerror}; give another --output"
        ) from error

"""Safe reading and writing: only regular files are read, and writes are atomic.

A file that featcache did not write is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from featcache.errors import StorageError, UserError

_NUMBER = re.compile(r"[+-]\d+([.]\d+)?", re.ASCII)
MARKS_BYTES = 16 << 20
"""The marks of a file's kind are within this many bytes of its start or end."""
ABANDONED_S = 24 * 3600.0
"""A temporary file that was not touched for this long was left by a killed writer."""


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading, without blocking on pipes or touching devices.

    Returns:
        A file descriptor.

    Raises:
        OSError: It is a folder (EISDIR) or not a regular file (EINVAL), or the file system refused.
    """
    # Checked before opening too, since opening a device can have effects.
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
    """All bytes of a regular file of bounded size.

    Raises:
        OSError: As `open_regular`, or the file is larger than `max_bytes` (EFBIG).
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
        inputs: What the command reads; names that are not files are ignored.

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
        except OSError:  # it does not exist, or writing will report the error
            continue
        if any(_is_file(other, status) for other in inputs):
            raise UserError(f"{path} is an input and would be replaced: give another --output")
        if not _is_ours(path, ours):
            raise UserError(
                f"{path} exists and was not written by this command: give another --output, or "
                "move it away"
            )


def _is_file(path: Path | str, status: os.stat_result) -> bool:
    with contextlib.suppress(OSError, ValueError):  # not the name of a file
        return os.path.samestat(status, os.stat(path))
    return False


def _is_ours(path: Path, ours: re.Pattern[bytes]) -> bool:
    """Whether a file has the marks of its kind; an empty file may be replaced."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = file.read(MARKS_BYTES)
            file.seek(max(len(start), os.fstat(file.fileno()).st_size - MARKS_BYTES))
            return not start or any(ours.search(part) for part in (start, file.read(MARKS_BYTES)))
    except OSError as error:
        raise UserError(
            f"cannot replace {path}: {error.strerror}; give another --output"
        ) from error


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(
            f"cannot write {path}: {reason}; {room}choose another place with "
            "--output or --cache-dir, then run the same command again"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` atomically: `path` has its old content or all of the new.

    Raises:
        StorageError: The file system refused.
    """
    with storage_errors(path), replacing(path) as draft:
        draft.write_bytes(data)


def create_atomically(path: Path, data: bytes) -> bool:
    """Write a new file atomically; of several processes, on any machine, exactly one does.

    Returns:
        False if there is such a file already, which stays as it is.

    Raises:
        StorageError: The file system refused.
    """
    with storage_errors(path), _private_folder(path) as folder:
        draft = folder / path.name
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # this file system has no links
            if os.path.lexists(path):
                return False
            os.replace(draft, path)
        return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error.

    It is in a new private folder beside `path` with a random name. So it cannot collide with other
    processes, containers or threads, nobody can plant a link in its place, and whatever a library
    leaves beside it is removed with the folder.

    Raises:
        OSError: The file system refused; `path` is as it was.
    """
    with _private_folder(path) as folder:
        draft = folder / path.name
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path, older_s=ABANDONED_S)
    folder = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path, num_bytes: int = 0) -> None:
    """Check before the work starts that `num_bytes` can be written to `path`.

    Raises:
        StorageError: The folder cannot be written to, or has too little room.
    """
    with storage_errors(path), _private_folder(path):
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def temporaries_of(path: Path) -> list[Path]:
    """Temporary files and folders of writers of `path`, running or killed."""
    # Version 0.1.0 used a process id. Any other suffix belongs to a file with a longer name.
    name = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{16}}|[0-9]+)\.tmp")
    found = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    return [left for left in found if name.fullmatch(left.name)]


def remove_temporaries(path: Path, older_s: float = 0.0) -> None:
    """Remove temporary files and folders that killed writers of `path` left.

    Args:
        path: The file that they were writing.
        older_s: Keep what was touched in the last `older_s` seconds. 0 is for callers that hold
            the lock on `path`, so that nobody else is writing it.
    """
    for left in temporaries_of(path):
        with contextlib.suppress(OSError):
            inside = left.iterdir() if left.is_dir() and not left.is_symlink() else ()
            touched = max(p.lstat().st_mtime for p in (left, *inside))
            if older_s and touched > time.time() - older_s:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # from version 0.1.0
                left.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def csv_line(cells: Sequence[object]) -> str:
    """A line of a CSV file.

    A text that a spreadsheet would run as a formula begins with an apostrophe; numbers do not.
    """
    import csv

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(map(_as_text, cells))
    return buffer.getvalue()


def _as_text(cell: object) -> object:
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell

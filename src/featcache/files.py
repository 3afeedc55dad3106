"""Reading and writing files: only ordinary ones are read, new ones appear whole or not at all.

No file that featcache did not write is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from featcache.errors import StorageError, UserError

MARKS_BYTES = 16 << 20
"""The marks of a file's kind lie within so many bytes of its start or end."""
ABANDONED_S = 24 * 3600.0
"""A temporary that nobody touched for so long was left by a killed writer."""


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


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a StorageError that says what to do."""
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
    """Write `data` so that `path` holds either its old content or all of the new.

    Raises:
        StorageError: The file system refused.
    """
    with storage_errors(path), replacing(path) as draft:
        draft.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft of `path`, which takes its place when the block ends without an error.

    The draft lies beside `path` in a new folder with a random name that only this user may enter,
    so it collides with no other process, container or thread, no link can be planted in its way,
    and whatever a library leaves beside the draft goes with the folder.

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
    """Find out now, not after an hour's work, that `num_bytes` cannot be written to `path`.

    Raises:
        StorageError: The folder cannot be written to, or has too little room.
    """
    with storage_errors(path), _private_folder(path):
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def temporaries_of(path: Path) -> list[Path]:
    """What writers of `path` are writing now, or left when they were killed."""
    # Digits alone are of version 0.1.0; anything else is of a longer name.
    name = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{16}}|[0-9]+)\.tmp")
    found = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    return [left for left in found if name.fullmatch(left.name)]


def remove_temporaries(path: Path, older_s: float = 0.0) -> None:
    """Remove what killed writers of `path` left.

    Args:
        path: What they were writing.
        older_s: Leave alone what was touched in so many seconds. 0 is for callers that hold the
            lock on `path`: nobody else is writing it.
    """
    for left in temporaries_of(path):
        with contextlib.suppress(OSError):
            inside = left.iterdir() if left.is_dir() and not left.is_symlink() else ()
            touched = max(p.lstat().st_mtime for p in (left, *inside))
            if older_s and touched > time.time() - older_s:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # of version 0.1.0
                left.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())

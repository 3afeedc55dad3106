"""Bytes at offsets: whole reads and writes, hashing, reserving space, syncing."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from featcache.errors import CacheError, StorageError

CHUNK_BYTES = 2**20
RESUME = "rerun the same extract-features command to resume"
_GIVE = "give a file written by extract-features"
_USER_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG),
}
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError while reading `path` into a one-line error.

    Raises:
        CacheError: The file is not there or may not be read.
        StorageError: The file system failed.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(f"no cache {path}: {_hint(path)}") from error
    except OSError as error:
        if error.errno in _USER_ERRORS:
            advice = f"; {_GIVE}" if error.errno == errno.EISDIR else ""
            raise CacheError(f"cannot read {path}: {error.strerror}{advice}") from error
        reason = error.strerror or error
        raise StorageError(f"cannot read {path}: {reason}; try again when it is back") from error


def _hint(path: Path) -> str:
    if not path.name.endswith(".part") and path.with_name(path.name + ".part").exists():
        return f"its extraction is unfinished; {RESUME}"
    if any(path.parent.glob(f"{glob.escape(path.name)}.shard-*")):
        return f"its shards are not merged yet; {RESUME}, or type featcache merge {path}"
    return _GIVE


def read_at(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read exactly `num_bytes`.

    Raises:
        OSError: The file ends before that.
    """
    parts = []
    while num_bytes:
        part = os.pread(fd, num_bytes, offset)
        if not part:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of a contiguous buffer; short writes are continued."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def sha256_of(fd: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Sha256 of the bytes in (start, end) ranges, in order, in bounded memory."""
    digest = hashlib.sha256()
    for start, end in ranges:
        for at in range(start, end, CHUNK_BYTES):
            digest.update(read_at(fd, min(CHUNK_BYTES, end - at), at))
    return digest.digest()


def reserve(fd: int, num_bytes: int) -> bool:
    """Reserve disk space for a file of `num_bytes`, so that it cannot run out midway.

    Returns:
        False where the file system cannot reserve; the file then has its size and no more.

    Raises:
        OSError: There is not enough space.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return True
    os.ftruncate(fd, num_bytes)
    return False


def sync(fd: int) -> None:
    """Force the data to the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk, so that a rename survives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(fd)

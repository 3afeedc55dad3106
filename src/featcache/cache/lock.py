"""One writer per output: a lock that names its holder and that ends with the process."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import StorageError
from featcache.files import read_regular, storage_errors

# An fcntl lock does not keep out the process that holds it, hence this record of our own locks. It
# is still the right kind: forked children do not inherit it, so an orphaned worker cannot keep it.
_held: dict[tuple[int, int], str] = {}
_guard = threading.Lock()

NO_LOCK = "FEATCACHE_NO_LOCK"
"""Environment variable: 1 allows writing without locks where the file system has none."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
MAX_BYTES = 4096
POLL_S = 0.05


class HeldError(StorageError):
    """Another run, or another part of this one, is writing."""


class Lock:
    """An exclusive lock on `path` (NAME.h5.lock), held until `release` or the end of the process.

    The file stays behind when released: removing it would let two runs lock two different files.

    Raises:
        HeldError: Another run holds it; the message says which.
        StorageError: It is a link, or the file system has no locks (and `NO_LOCK` is not set) or
            refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _guard, storage_errors(path):
            if (holder := _held.get(_identity(path))) is not None:
                # The answer is from memory: opening and closing the file would drop our own lock.
                raise HeldError(_held_message(path, holder))
            self._fd = _open(path)
            try:
                _take(self._fd, path)
            except BaseException:
                os.close(self._fd)
                raise
            key = _identity(path)
            _held[key] = self._write_holder()
            # This also runs when a writer was dropped without being closed.
            self._drop = weakref.finalize(self, _drop, self._fd, key)

    def _write_holder(self) -> str:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with contextlib.suppress(OSError):  # it only serves other runs' messages; the lock is held
            before = os.pread(self._fd, MAX_BYTES, 0)
            if not before or _parsed(before):  # never empty a file that is not ours
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, json.dumps(who).encode(), 0)
        return _holder(who)

    def release(self) -> None:
        """Release the lock; does nothing the second time."""
        self._drop()


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise StorageError(f"{path} is not an ordinary file: remove it, or choose another --output")
    return os.open(path, flags, 0o644)


def _take(fd: int, path: Path) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise HeldError(_held_message(path, _read_holder(path))) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if os.environ.get(NO_LOCK) != "1":
            raise StorageError(
                f"cannot lock {path}: this file system has no locks; write to another disk with "
                f"--output or --cache-dir, or make sure that no other run writes there and set "
                f"{NO_LOCK}=1"
            ) from error


def _drop(fd: int, key: tuple[int, int]) -> None:
    os.close(fd)
    del _held[key]


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return status.st_dev, status.st_ino


def _held_message(path: Path, holder: str) -> str:
    output = path.with_name(path.name.removesuffix(".lock"))
    return (
        f"{output} is being written by {holder}: wait for that run, end it, "
        "or choose another --output"
    )


def _holder(who: Any) -> str:
    return f"process {int(who['pid'])} on {who['host']!s:.100} since {who['since']!s:.40}"


def _read_holder(path: Path) -> str:
    """Who wrote the lock file; "another process" if it cannot be read."""
    with contextlib.suppress(OSError):
        return _parsed(read_regular(path, MAX_BYTES)) or "another process"
    return "another process"


def _parsed(text: bytes) -> str | None:
    """The holder that a lock file names; None if it is not a lock file of ours."""
    try:
        return _holder(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def check_unlocked(path: Path) -> None:
    """Check, before any work, that no other run is writing an output.

    Raises:
        StorageError: One is; the message says which.
    """
    if os.path.lexists(lock_path(path)):
        with locked(path) as lock:
            lock.release()


def lock_path(path: Path) -> Path:
    """The file that is locked while `path` is written."""
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Lock an output until the end of the block.

    Raises:
        StorageError: Another run is writing it, or the file system refused.
    """
    with locked(path) as lock:
        yield
        lock.release()


@contextlib.contextmanager
def waiting_writer(path: Path) -> Iterator[None]:
    """Lock an output until the end of the block, after whoever is writing it now.

    Raises:
        StorageError: The file system refused.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(sole_writer(path))
                break
            except HeldError:
                time.sleep(POLL_S)
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Lock an output for writing; the lock is kept on success and released on an error.

    Raises:
        StorageError: Another run is writing it, or the file system refused.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(lock_path(path))
    try:
        yield lock
    except BaseException:
        lock.release()
        raise

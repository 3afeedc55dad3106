"""One writer per output, or the ranks of one job: a lock that names its holder and dies with it."""

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
from featcache.files import storage_errors

# An fcntl lock does not keep out the process that holds it, hence this record of our own locks. It
# is still the right kind: forked children do not inherit it, so an orphaned worker cannot keep it.
_held: dict[tuple[int, int], str] = {}
_guard = threading.Lock()

NO_LOCK = "FEATCACHE_NO_LOCK"
"""Environment variable: 1 allows writing without locks where the file system has none."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
MAX_BYTES = 4096
JOIN_S = 1800.0
"""How long a rank waits for the one that lays out the file, or checks what an earlier run left."""
UNKNOWN_S = 2.0
POLL_S = 0.1
# Byte 0 of the file is the lock; from here on, a byte stands for a block that a rank computes.
_CLAIMS = 1 << 40


class HeldError(StorageError):
    """Another run, or another part of this one, is writing; `by_rank`: it is a rank of a job."""

    def __init__(self, message: str, *, by_rank: bool = False) -> None:
        super().__init__(message)
        self.by_rank = by_rank


class Lock:
    """An exclusive lock on `path` (NAME.h5.lock), held until `release` or the end of the process.

    A rank of a job shares it with the other ranks, unless it is the first.

    The file stays behind when released: removing it would let two runs lock two different files.

    Args:
        path: The lock file.
        rank: "rank 0 of 4" where the process is one of several that may share the lock.

    Attributes:
        shared: Whether other ranks may hold it too.

    Raises:
        HeldError: Another run holds it; the message says which.
        StorageError: It is a link, or the file system has no locks (and `NO_LOCK` is not set) or
            refuses.
    """

    def __init__(self, path: Path, rank: str = "") -> None:
        self.path = path
        with _guard, storage_errors(path):
            if (holder := _held.get(_identity(path))) is not None:
                # The answer is from memory: opening and closing the file would drop our own lock.
                raise HeldError(_held_message(path, holder))
            self._fd = _open(path)
            try:
                self.shared = _take(self._fd, path, share=bool(rank))
            except BaseException:
                os.close(self._fd)
                raise
            key = _identity(path)
            _held[key] = self._write_holder(rank)
            # This also runs when a writer was dropped without being closed.
            self._drop = weakref.finalize(self, _drop, self._fd, key)

    def share(self) -> None:
        """Let other ranks in."""
        self.shared = True
        _try(self._fd, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Leave the other ranks and, if none is left, lock them out."""
        # First out, then in: two that wait for each other to leave would wait forever.
        _try(self._fd, fcntl.LOCK_UN)
        self.shared = not _try(self._fd, fcntl.LOCK_EX)
        return not self.shared

    def locked_out(self) -> bool:
        """After `alone` failed: whether one process has locked all others out."""
        return not (_try(self._fd, fcntl.LOCK_SH) and _try(self._fd, fcntl.LOCK_UN))

    def claim(self, number: int) -> bool:
        """Claim a block; False if another rank has it. A claim ends with the process, too."""
        return _try(self._fd, fcntl.LOCK_EX, _CLAIMS + number)

    def unclaim(self, number: int) -> None:
        """Give up a claim."""
        _try(self._fd, fcntl.LOCK_UN, _CLAIMS + number)

    def _write_holder(self, rank: str) -> str:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "rank": rank}
        if self.shared:
            return _holder(who)
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


def _try(fd: int, kind: int, at: int = 0) -> bool:
    """Lock or unlock one byte of a lock file; False if another process has it locked.

    Raises:
        OSError: The file system refused; one without locks grants all where `NO_LOCK` is set.
    """
    try:
        fcntl.lockf(fd, kind if kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB, 1, at)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS or os.environ.get(NO_LOCK) != "1":
            raise
    return True


def _take(fd: int, path: Path, *, share: bool) -> bool:
    """Lock out all others, or else share the lock; returns whether it is shared."""
    try:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH) if share else (fcntl.LOCK_EX,):
            if _try(fd, kind):
                return kind == fcntl.LOCK_SH
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise StorageError(
                f"cannot lock {path}: this file system has no locks; write to another disk with "
                f"--output or --cache-dir, or make sure that no other run writes there and set "
                f"{NO_LOCK}=1"
            ) from error
        raise
    # Not by opening the file again: closing it would drop what this process has locked.
    holder, by_rank = _parsed(os.pread(fd, MAX_BYTES, 0)) or ("another process", False)
    raise HeldError(_held_message(path, holder), by_rank=by_rank)


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
    rank = f" ({who['rank']!s:.40})" if who.get("rank") else ""
    return f"process {int(who['pid'])}{rank} on {who['host']!s:.100} since {who['since']!s:.40}"


def _parsed(text: bytes) -> tuple[str, bool] | None:
    """The holder that a lock file names, and whether it is a rank; None if it is not ours."""
    try:
        who = json.loads(text)
        return _holder(who), bool(who.get("rank"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
                pause()
        yield


@contextlib.contextmanager
def locked(path: Path, lock: Lock | None = None) -> Iterator[Lock]:
    """Lock an output for writing; the lock is kept on success and released on an error.

    Args:
        path: The output.
        lock: The lock on it, where the caller has it already.

    Raises:
        StorageError: Another run is writing it, or the file system refused.
    """
    if lock is None:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(lock_path(path))
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def join(path: Path, rank: str, wait_s: float = JOIN_S) -> Lock:
    """Lock an output as a rank of a job, which waits while another one has locked it out.

    Args:
        path: The output.
        rank: "rank 0 of 4".
        wait_s: For how long.

    Raises:
        HeldError: A run that is no rank is writing it, or the wait was too long.
        StorageError: The file system refused.
    """
    start = time.monotonic()
    while True:
        try:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            return Lock(lock_path(path), rank)
        except HeldError as error:
            # A rank that has just locked it may not have written yet who it is.
            if time.monotonic() > start + (wait_s if error.by_rank else UNKNOWN_S):
                raise
        pause()


def pause() -> None:
    """Wait a little before asking again, each rank for another time."""
    time.sleep(POLL_S * (0.5 + os.urandom(1)[0] / 256))

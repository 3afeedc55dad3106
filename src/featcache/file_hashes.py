"""Facts about files, such as their sha256, remembered while the files do not change.

A memo only saves time: if it is lost, damaged or unwritable, results stay the same. Its file is two
lines of JSON: a header with the sha256 of the second line, and the entries (key, digest of the
stamp, value).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from featcache.errors import StorageError
from featcache.files import open_regular, read_regular, write_atomically

MAX_BYTES = 2**30
"""Room for the hashes of about seven million files."""
MAX_FILES = 64
NUM_TOGETHER = 1000  # stamps hashed, or entries written, at once: faster than singly
SETTLE_S = 2.0
"""The coarsest clock of a file system: a younger file could change without a new timestamp."""

_Entries = dict[str, tuple[Any, Any]]  # by key, the digest of the stamp, and the value
_PREFIX = ".featcache-memo-"
_FORMAT = {"format": "featcache-memo", "version": 1}


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Values that change when the content does: size, times in ns, inode and device."""
    s = status
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def is_settled(status: os.stat_result, now_s: float) -> bool:
    """Whether the file's last change is old enough for its stamp to be trusted.

    A second write within one tick of the file system's clock does not change the stamp. So a file
    that changed just now, or in the future by its clock, must be read again next time.
    """
    limit_s = now_s - SETTLE_S
    return status.st_mtime < limit_s and status.st_ctime < limit_s


class Memo:
    """A bounded dictionary on disk; each value is valid for one stamp only.

    Args:
        cache_dir: The folder of the memo's file.
        name: Names the file. Each file is read as a whole.
    """

    def __init__(self, cache_dir: Path, name: str = "files") -> None:
        self._name = re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:80]
        self.path = Path(cache_dir) / f"{_PREFIX}{self._name}.json"
        self._lock = threading.Lock()
        self._entries: _Entries | None = None
        self._new: _Entries = {}

    def beside(self, name: str) -> Memo:
        """Another memo of the same thing, for facts that are read without these."""
        return Memo(self.path.parent, f"{self._name}-{name}")

    def get(self, key: str, stamp: Sequence[int]) -> Any | None:
        """The value of `key`, or None if there is none or the stamp differs."""
        with self._lock:
            if self._entries is None:
                self._entries = _read(self.path)
            entry = self._new.get(key) or self._entries.get(key)
        if entry is None or entry[0] != _digest(stamp):
            return None
        return entry[1]

    def put(self, key: str, stamp: Sequence[int], value: Any) -> None:
        """Remember `value`, which must be JSON, for `key` with this stamp."""
        with self._lock:
            self._new[key] = (_digest(stamp), value)

    def save(self) -> None:
        """Write new entries and free the memory of the others until the next `get`.

        If the folder cannot be written, nothing is saved.
        """
        with self._lock:
            self._entries = None
            if not self._new:
                return
            # Read again: another process may have added entries since.
            entries = {key: e for key, e in _read(self.path).items() if key not in self._new}
            entries.update(self._new)
            self._entries, self._new = entries, {}
            try:
                write_atomically(self.path, _encode(entries))
            except StorageError:
                return
            self._entries = None
        _remove_oldest(self.path)

    def file_sha256(self, path: Path) -> str:
        """The sha256 of a file as 64 hex digits, remembered while the file is unchanged.

        Raises:
            OSError: The file cannot be read.
        """
        key = os.path.abspath(path)
        now_s = time.time()
        before = os.stat(key)
        known = self.get(key, stamp_of(before))
        if isinstance(known, str) and re.fullmatch("[0-9a-f]{64}", known):
            return known
        with os.fdopen(open_regular(key), "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if is_settled(before, now_s) and stamp_of(os.stat(key)) == stamp_of(before):
            self.put(key, stamp_of(before), sha256)
        return sha256


def tree_stamp(paths: Iterable[Path]) -> tuple[int, ...] | None:
    """One stamp for all files and folders at and below `paths`; links are followed.

    Returns:
        None if there are no files, or one changed too recently.

    Raises:
        OSError: A folder or file cannot be inspected, or a link is broken or circular.
    """
    tops = filter(os.path.lexists, map(os.fspath, paths))
    return _stamp_of_all(found for top in tops for found in _files_below(top, ()))


def files_stamp(paths: Iterable[str]) -> tuple[int, ...] | None:
    """One stamp for all of these files; None if one is missing or changed too recently."""
    with contextlib.suppress(OSError):
        return _stamp_of_all((path, os.stat(path)) for path in paths)
    return None


def _stamp_of_all(files: Iterable[tuple[str, os.stat_result | None]]) -> tuple[int, ...] | None:
    now_s = time.time()
    found = hashlib.sha256()
    num_files = 0
    texts: list[str] = []
    for path, status in files:
        if status is None:
            texts.append(f"{path}\0()\0")  # a folder
        elif is_settled(status, now_s):
            s = status  # as text, which takes half the time that `stamp_of` would
            stamp = f"{s.st_size}, {s.st_mtime_ns}, {s.st_ctime_ns}, {s.st_ino}, {s.st_dev}"
            texts.append(f"{path}\0({stamp})\0")
            num_files += 1
        else:
            return None
        if len(texts) == NUM_TOGETHER:
            found.update("".join(texts).encode(errors="surrogateescape"))
            texts.clear()
    found.update("".join(texts).encode(errors="surrogateescape"))
    return (num_files, int.from_bytes(found.digest()[:16], "big")) if num_files else None


def _files_below(
    path: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Files with their status, and folders with None, at and below a path, sorted."""
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        yield path, status
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    yield path, None
    for name in sorted(os.listdir(path)):
        yield from _files_below(os.path.join(path, name), (*above, here))


def _digest(stamp: Sequence[int]) -> str:
    return hashlib.blake2b(repr(tuple(stamp)).encode(), digest_size=12).hexdigest()


def _encode(entries: _Entries) -> bytes:
    """The file's bytes; the oldest entries are dropped if they would not fit."""
    while True:
        file, rest = io.BytesIO(), iter(entries.items())
        start = file.write(_header(b"") + b"\n")
        for at in range(0, len(entries), NUM_TOGETHER):
            part = dict(itertools.islice(rest, NUM_TOGETHER))
            file.write(b"," if at else b"{")
            file.write(json.dumps(part, separators=(",", ":"))[1:-1].encode())
        file.write(b"}" if entries else b"{}")
        if file.tell() - start <= MAX_BYTES or not entries:
            with file.getbuffer() as whole:
                whole[: start - 1] = _header(whole[start:])
            file.write(b"\n")
            return file.getvalue()
        entries = dict(list(entries.items())[len(entries) // 2 + 1 :])


def _header(body: bytes | memoryview) -> bytes:
    return json.dumps({**_FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode()


def _read(path: Path) -> _Entries:
    """The entries of a memo file; empty if it is missing, not a memo, damaged or too large."""
    try:
        data = read_regular(path, MAX_BYTES + 4096)
        end = data.index(b"\n")
        body = memoryview(data)[end + 1 : len(data) - data.endswith(b"\n")]  # large: not copied
        same = json.loads(data[:end]) == json.loads(_header(body))
        entries = json.loads(str(body, "utf-8")) if same else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: (e[0], e[1]) for k, e in entries.items() if isinstance(e, list) and len(e) == 2}


def _remove_oldest(path: Path) -> None:
    """Keep at most MAX_FILES memos in the folder."""
    with contextlib.suppress(OSError):
        memos = sorted(path.parent.glob(f"{_PREFIX}*.json"), key=lambda p: p.stat().st_mtime_ns)
        for old in memos[:-MAX_FILES]:
            if old != path:
                old.unlink(missing_ok=True)

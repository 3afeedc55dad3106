"""Where pictures come from: files, or memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from featcache.data.images import BadImage, read_file
from featcache.errors import UserError
from featcache.memo import Memo, is_settled, stamp_of

_SHA256 = re.compile("[0-9a-f]{64}").fullmatch
_NOT_HASHED, _UNSURE = 0, 1


class Source(Protocol):
    """Where the pictures of a split come from, by position in the source."""

    def read(self, position: int) -> bytes | Image.Image:
        """The undecoded picture. Raises BadImage."""
        ...

    def content(self, position: int) -> bytes:
        """The sha256 of what the picture is: 32 bytes, all zero if it cannot be read."""
        ...

    def finish(self) -> None:
        """Called after a pass over the contents."""
        ...


class FileSource:
    """Pictures in files.

    Args:
        paths: Absolute paths.
        memo: Keeps the files' hashes between runs.
    """

    def __init__(self, paths: Sequence[str], memo: Memo | None) -> None:
        self._paths = paths
        self._memo = memo
        # What was hashed, to notice files that change before they are decoded.
        self._stamps = np.zeros(len(paths), dtype=np.int64)
        self._hashes = np.zeros((len(paths), 32), dtype=np.uint8)

    def read(self, position: int) -> bytes:
        """The file's bytes.

        Raises:
            BadImage: It cannot be read.
            UserError: It is not the file that was hashed any more.
        """
        path = self._paths[position]
        data, status = read_file(path)
        hashed = self._stamps[position]
        if hashed not in (_NOT_HASHED, _short(status)):
            digest = hashlib.sha256(data).digest()
            if digest != self._hashes[position].tobytes():
                raise UserError(f"{path} changed during the run: run the same command again")
        return data

    def content(self, position: int) -> bytes:
        """The sha256 of the file's bytes, from the memo if the file has not changed since."""
        stamp = _UNSURE
        try:
            digest, stamp = self._hash(self._paths[position])
        except BadImage as bad:
            # An empty or a missing file differs from every picture, and from each other.
            digest = bytes(31) + bytes([bad.code])
        self._stamps[position] = stamp
        self._hashes[position] = np.frombuffer(digest, dtype=np.uint8)
        return digest

    def _hash(self, path: str) -> tuple[bytes, int]:
        """Digest and short stamp of a file. Raises BadImage."""
        now_s = time.time()
        if self._memo is not None:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                known = self._memo.get(path, stamp_of(status))
                if isinstance(known, str) and _SHA256(known):
                    return bytes.fromhex(known), _short(status)
        data, before = read_file(path)
        digest = hashlib.sha256(data)
        if not is_settled(before, now_s):
            return digest.digest(), _UNSURE
        if self._memo is not None:
            with contextlib.suppress(OSError):
                if stamp_of(os.stat(path)) == stamp_of(before):
                    self._memo.put(path, stamp_of(before), digest.hexdigest())
        return digest.digest(), _short(before)

    def finish(self) -> None:
        """Save the memo."""
        if self._memo:
            self._memo.save()


def _short(status: os.stat_result) -> int:
    """A file's stamp in 63 bits, for use within one run."""
    return hash(stamp_of(status)) & (2**63 - 1) | 2


class ArraySource:
    """Pictures that are in memory.

    Args:
        get: Gives the picture at a position; called from several threads.
    """

    def __init__(self, get: Callable[[int], Image.Image]) -> None:
        self._get = get

    def read(self, position: int) -> Image.Image:
        """The picture."""
        return self._get(position)

    def content(self, position: int) -> bytes:
        """The sha256 of mode, size and pixels."""
        image = self._get(position)
        digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
        digest.update(image.tobytes())
        return digest.digest()

    def finish(self) -> None:
        """Nothing to do."""

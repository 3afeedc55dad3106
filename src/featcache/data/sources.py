"""Where images come from: files or memory. An image is checked against its recorded sha256."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from featcache.data.images import MISSING, BadImage, read_file
from featcache.errors import UserError
from featcache.file_hashes import Memo, files_stamp, is_settled, stamp_of

Raw = bytes | Image.Image

_SHA256 = re.compile("[0-9a-f]{64}").fullmatch


class Source(Protocol):
    """Reads the images of a split, by position in the source."""

    def read(self, position: int) -> Raw:
        """The undecoded image. Raises BadImage, and UserError if it changed."""
        ...

    def recall(self, name: str) -> bytes | None:
        """The hashes of all images of the split of this name, if they are remembered together."""
        ...

    def content(self, position: int) -> bytes:
        """The sha256 of the image; 31 zero bytes and a code if it cannot be read."""
        ...

    def record(self, position: int, digest: bytes) -> None:
        """Require from now on that the image has this sha256."""
        ...

    def finish(self) -> None:
        """Called after all contents were hashed."""
        ...


class RecordedSource:
    """Images that may be read more than once and must not change in between.

    The first time an image is hashed or read, its sha256 is recorded; later reads are compared
    with it. Features, labels and fingerprint thus belong to the same content.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Not numpy arrays, whose single rows take four times as long.
        self._hashes = bytearray()
        self._is_known = bytearray()

    def _read(self, position: int) -> tuple[Raw, bytes]:
        """The image and its sha256. Raises BadImage."""
        raise NotImplementedError

    def _digest(self, position: int) -> bytes:
        """The sha256 of an image that is not recorded yet. Raises BadImage."""
        return self._read(position)[1]

    def _name(self, position: int) -> str:
        """The name of an image in messages."""
        return f"image {position}"

    def _forget(self, position: int) -> None:
        """Delete the remembered hash of an image that has changed."""

    def read(self, position: int) -> Raw:
        """The undecoded image, whose sha256 is the recorded one.

        Raises:
            BadImage: It cannot be read, now or when it was recorded.
            UserError: It changed since it was recorded.
        """
        try:
            raw, digest = self._read(position)
        except BadImage as bad:
            self._compare(position, no_content(bad), bad)
            raise
        self._compare(position, digest)
        return raw

    def content(self, position: int) -> bytes:
        """The recorded sha256; if there is none, that of the image now, which is recorded."""
        known = self._recorded(position)
        if known is not None:
            return known
        try:
            digest = self._digest(position)
        except BadImage as bad:
            digest = no_content(bad)
        self._compare(position, digest)
        return digest

    def record(self, position: int, digest: bytes) -> None:
        """Require from now on that the image has this sha256.

        Raises:
            UserError: A different one is recorded.
        """
        self._compare(position, digest)

    def _recorded(self, position: int) -> bytes | None:
        with self._lock:
            known = position < len(self._is_known) and self._is_known[position]
            return bytes(self._hashes[32 * position : 32 * position + 32]) if known else None

    def _compare(self, position: int, digest: bytes, bad: BadImage | None = None) -> None:
        """Compare with the recorded sha256, or record it."""
        place = slice(32 * position, 32 * position + 32)
        with self._lock:
            if position >= len(self._is_known):
                more = max(position + 1, 2 * len(self._is_known)) - len(self._is_known)
                self._hashes.extend(bytes(32 * more))
                self._is_known.extend(bytes(more))
            if not self._is_known[position]:
                self._hashes[place] = digest
                self._is_known[position] = True
                return
            if self._hashes[place] == digest:
                return
        self._forget(position)
        if bad is not None:
            raise UserError(
                f"{self._name(position)} could be read before and cannot be read now ({bad}): fix "
                "that, then run the same command again"
            )
        raise UserError(
            f"{self._name(position)} changed during the run: run the same command again"
        )

    def recall(self, name: str) -> bytes | None:
        """They are not remembered together."""

    def finish(self) -> None:
        """Nothing to save."""


def no_content(bad: BadImage) -> bytes:
    """Stands for the sha256 of a file that cannot be read; different for each reason."""
    return bytes(31) + bytes([bad.code])


class FileSource(RecordedSource):
    """Images in files.

    Args:
        paths: Paths, absolute once they are appended to `prefix`.
        memo: Keeps the files' hashes between runs.
        folder: The dataset's folder; if it is gone, that is an error, not missing files.
        prefix: What all paths begin with, kept once.
    """

    def __init__(
        self, paths: Sequence[str], memo: Memo | None, folder: str | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self._paths = paths
        self._prefix = prefix
        self._memo = memo
        self._folder = folder
        self._split = ""
        self._stamp: tuple[int, ...] | None = None

    def _name(self, position: int) -> str:
        return self._prefix + self._paths[position]

    def _read(self, position: int) -> tuple[bytes, bytes]:
        path, now_s = self._name(position), time.time()
        try:
            data, before = read_file(path)
        except BadImage as bad:
            if bad.code == MISSING and self._folder and not os.path.isdir(self._folder):
                raise UserError(
                    f"the folder {self._folder} is gone: once it is back, run the same command "
                    "again"
                ) from bad
            raise
        sha256 = hashlib.sha256(data)
        if self._memo is not None and self._recorded(position) is None:
            self._remember(self._memo, path, before, now_s, sha256.hexdigest())
        return data, sha256.digest()

    def _digest(self, position: int) -> bytes:
        if self._memo is not None:
            path = self._name(position)
            with contextlib.suppress(OSError):
                known = self._memo.get(path, stamp_of(os.stat(path)))
                if isinstance(known, str) and _SHA256(known):
                    return bytes.fromhex(known)
        return self._read(position)[1]

    @staticmethod
    def _remember(memo: Memo, path: str, before: os.stat_result, now_s: float, sha256: str) -> None:
        """Keep a hash for the next run, if the file did not change while it was read."""
        if is_settled(before, now_s):
            with contextlib.suppress(OSError):
                if stamp_of(os.stat(path)) == stamp_of(before):
                    memo.put(path, stamp_of(before), sha256)

    def _forget(self, position: int) -> None:
        if self._memo is not None:
            for memo, key in ((self._memo, self._name(position)), (self._all, self._split)):
                memo.put(key, (), None)
                memo.save()

    def recall(self, name: str) -> bytes | None:
        """The hashes of all files, if none has changed since they were saved together.

        This takes a third of the time of single lookups, and of their memory.
        """
        if self._memo is None or self._is_known:
            return None
        self._split, self._stamp = name, files_stamp(map(self._prefix.__add__, self._paths))
        known = self._all.get(name, self._stamp) if self._stamp else None
        if not isinstance(known, str):
            return None
        with contextlib.suppress(ValueError):
            hashes = base64.b64decode(known, validate=True)
            if len(hashes) == 32 * len(self._paths):
                self._hashes, self._stamp = bytearray(hashes), None
                self._is_known = bytearray([True]) * len(self._paths)
                return hashes
        return None

    @property
    def _all(self) -> Memo:
        """Remembers the hashes of all files together, by split."""
        assert self._memo is not None
        return self._memo.beside("all")

    def finish(self) -> None:
        """Save the memo, and all hashes together if every file has one."""
        if self._memo is None:
            return
        self._memo.save()
        hashes = bytes(self._hashes[: 32 * len(self._paths)])
        are_read = np.frombuffer(hashes, np.uint8).reshape(-1, 32)[:, :31].any(axis=1).all()
        if self._stamp is not None and self._is_known.count(1) == len(self._paths) and are_read:
            memo = self._all
            memo.put(self._split, self._stamp, base64.b64encode(hashes).decode())
            memo.save()
            self._stamp = None


class ArraySource(RecordedSource):
    """Images in memory.

    Args:
        get: Returns the image at a position; called from several threads.
    """

    def __init__(self, get: Callable[[int], Image.Image]) -> None:
        super().__init__()
        self._get = get

    def _read(self, position: int) -> tuple[Image.Image, bytes]:
        """The image, and the sha256 of mode, size and pixels."""
        image = self._get(position)
        digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
        digest.update(image.tobytes())
        return image, digest.digest()

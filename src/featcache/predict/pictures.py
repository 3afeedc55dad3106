"""Paths and PIL images as a split, so that they take the same way as a dataset's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from PIL import Image

from featcache.data import ImageSplit
from featcache.data.images import decode_opened
from featcache.data.sources import ArraySource, FileSource, Source
from featcache.errors import UserError

Picture = Image.Image | str | os.PathLike[str]


def split_of(pictures: Picture | Iterable[Picture]) -> ImageSplit:
    """Pictures as a split; rows are in the order given, ids are the paths as given.

    Raises:
        UserError: One is neither a path nor a PIL image.
    """
    single = isinstance(pictures, Image.Image | str | os.PathLike)
    many = [cast(Picture, pictures)] if single else list(cast(Iterable[Picture], pictures))
    ids = []
    for place, picture in enumerate(many):
        if isinstance(picture, Image.Image):
            ids.append(f"picture {place}")
        elif isinstance(picture, str | os.PathLike):
            ids.append(os.fspath(picture))
        else:
            raise UserError(
                f"picture {place} is a {type(picture).__name__}: give paths or PIL images"
            )
    return ImageSplit("pictures", ids, np.zeros(len(ids), np.int64), _Pictures(many, ids))


class _Pictures:
    """Where each picture comes from: a file or memory."""

    def __init__(self, pictures: Sequence[Picture], ids: Sequence[str]) -> None:
        self._pictures = pictures
        self._files = FileSource([os.path.abspath(path) for path in ids], None)
        self._opened = ArraySource(self._decoded)

    def _decoded(self, position: int) -> Image.Image:
        return decode_opened(cast(Image.Image, self._pictures[position]))

    def _source(self, position: int) -> Source:
        opened = isinstance(self._pictures[position], Image.Image)
        return self._opened if opened else self._files

    def read(self, position: int) -> bytes | Image.Image:
        """The file's bytes, or the picture upright and in RGB. Raises BadImage."""
        if isinstance(self._pictures[position], Image.Image):
            return self._decoded(position)  # the caller's own object: nothing to compare
        return self._files.read(position)

    def content(self, position: int) -> bytes:
        """The sha256 of what the picture is. Raises BadImage."""
        return self._source(position).content(position)

    def record(self, position: int, digest: bytes) -> None:
        """Demand from now on that the picture has this sha256."""
        self._source(position).record(position, digest)

    def finish(self) -> None:
        """Nothing to do."""

"""Features of pictures kept on disk by the pictures' content, for calls that see them again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.cache import RowSource, SplitRows, begun_with, open_writer, waiting_writer
from featcache.cache.storage import CacheFile
from featcache.config import CacheMeta, Views
from featcache.data import ImageSplit
from featcache.display import progress, say
from featcache.engine.inference import computed_rows
from featcache.errors import CacheError
from featcache.extract.request import differences
from featcache.predict.classifier import readable
from featcache.runtime import StageTimer

if TYPE_CHECKING:
    from featcache.engine import Engine

CLASS = "picture"
"""The class of every row: a cache needs one."""


class FeatureStore:
    """Features by the sha256 of pictures, in a folder of caches that one call each computed.

    Files are added and never changed, so calls may read while others write. A row is found only in
    a file with the same settings: weights by their sha256, preprocessing, layers, versions.

    Args:
        folder: Made when something is added.
        meta: What rows are made with; its dataset does not matter, its engine may be "auto".
    """

    def __init__(self, folder: Path, meta: CacheMeta) -> None:
        self.folder, self.meta = folder, meta

    def features(self, split: ImageSplit, engine: Callable[[int], Engine]) -> NDArray[np.float32]:
        """Features [N, D] of pictures; those that are not kept yet are computed and kept.

        Args:
            split: The pictures.
            engine: Called with the number of pictures to compute, if there are any.

        Raises:
            UserError: A picture cannot be read.
            StorageError: The folder cannot be written to.
        """
        rows, found = self._find(split.content)
        if not found.all():
            # Processes that cross-validate in parallel ask for the same pictures at once.
            with waiting_writer(self.folder / "pictures"):
                _, found = self._find(split.content)
                missing = np.flatnonzero(~found)
                if len(missing):
                    _, first = np.unique(split.content[missing], axis=0, return_index=True)
                    self._add(split.subset(missing[np.sort(first)]), engine(len(first)))
            rows, found = self._find(split.content)
            assert found.all()
        return rows

    def _find(self, content: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows [N, D] of pictures by their sha256 [N, 32], and which of them are known."""
        rows = np.zeros((len(content), self.meta.backbone.feature_dim), np.float32)
        found = np.zeros(len(content), np.bool_)
        for path in sorted(self.folder.glob("*.h5")):
            left = np.flatnonzero(~found)
            if not len(left):
                break
            try:
                with contextlib.closing(CacheFile(path)) as file:
                    file.check_finished()
                    same = dataclasses.replace(file.meta, dataset=self.meta.dataset)
                    if differences(same, self.meta):
                        continue
                    source = RowSource([file], file.meta)
                    places = source.find(content[left])
                    known = left[places >= 0]
                    if len(known):
                        rows[known] = source.fetch(places[places >= 0])[0]
                        found[known] = True
            except CacheError as error:
                say(f"{error}; features in it are computed again")
        return rows, found

    def _add(self, split: ImageSplit, engine: Engine) -> None:
        """Compute the features of different pictures into a file of their own."""
        names = [digest.tobytes().hex() for digest in split.content]
        fingerprint = hashlib.sha256(split.content.tobytes()).hexdigest()
        dataset = dataclasses.replace(self.meta.dataset, fingerprint=fingerprint)
        meta = dataclasses.replace(self.meta, dataset=dataset, engine=engine.recorded)
        path = self.folder / f"{hashlib.sha256(meta.to_json().encode()).hexdigest()[:16]}.h5"
        rows = SplitRows(split.name, names, split.labels, split.content)
        begun = begun_with(path) == meta  # by a killed run: resumed
        with open_writer(path, meta, [CLASS], [rows], force=not begun) as writer:
            blocks, prep = writer.pending(split.name), meta.backbone.preprocessing
            places = chain.from_iterable(blocks)
            stream = computed_rows(engine, split, places, prep, Views(), StageTimer())
            with progress(sum(map(len, blocks)), "pictures") as bar, contextlib.closing(stream):
                for block in blocks:
                    features = [readable(split, *next(stream)) for _ in block]
                    good = np.zeros(len(block), np.uint8)
                    writer.write_block(split.name, block, np.stack(features, axis=1), good)
                    bar.update(len(block))
            writer.finish()

"""Datasets: splits of ordered, labeled images, each with a content hash, loaded one by one."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.config import DataConfig, DatasetInfo, Task
from featcache.data.images import decoded, to_rgb
from featcache.data.sources import Source
from featcache.display import progress
from featcache.errors import UserError
from featcache.runtime import num_cores

Kind = Literal["digits", "torchvision", "folder", "manifest", "tar", "pictures"]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]

MIN_HASH_CHUNK = 32
MAX_HASH_TASKS = 1000
NUM_TOGETHER = 10_000  # names in a fingerprint: singly takes longer, all at once much memory


class ImageSplit:
    """The samples of one split, in a fixed order. Immutable.

    Attributes:
        name: train, test or val.
        ids: Unique names of the samples; sorted, unless the dataset has an order of its own.
        labels: int64 [N], indexes into the dataset's class names.
        weights: float32 [N], or None where no weights were given.
        groups: N names of what the samples belong to (patient, camera), or None.
        targets: What samples have instead of one class, or None: 1 for each of their labels and 0
            for the others, uint8 [N, C], or a number, float64 [N]. Labels are then 0.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        labels: Int64,
        source: Source,
        *,
        positions: Int64 | None = None,
        weights: Float32 | None = None,
        groups: Sequence[str] | None = None,
        targets: NDArray[Any] | None = None,
    ) -> None:
        self.name = name
        self.ids = list(ids)
        self.groups = None if groups is None else list(groups)
        self.labels = np.array(labels, dtype=np.int64)
        self.weights = None if weights is None else np.array(weights, dtype=np.float32)
        self.targets = None if targets is None else np.array(targets)
        self._is_whole = positions is None
        self._positions = np.arange(len(self.ids)) if positions is None else np.array(positions)
        self._source = source
        self._content: UInt8 | None = None
        self._lock = threading.Lock()
        assert len(self.ids) == len(self.labels) == len(self._positions)
        assert self.groups is None or len(self.groups) == len(self.ids)
        for array in (self.labels, self.weights, self.targets, self._positions):
            if array is not None:
                array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ImageSplit({self.name!r}, {len(self)} samples)"

    def read(self, index: int) -> bytes | Image.Image:
        """The undecoded image of row `index`, for `decoded`; its sha256 is the one in `content`.

        Raises:
            BadImage: It cannot be read.
            UserError: It changed since it was read or hashed.
        """
        return self._source.read(int(self._positions[index]))

    @staticmethod
    @contextmanager
    def decoded(raw: bytes | Image.Image, least_px: int | None = None) -> Iterator[Image.Image]:
        """Decode what `read` returned to upright RGB; its memory counts until the block ends.

        Args:
            raw: A file's bytes, or an image in memory, which is as large as it is.
            least_px: See `images.decoded`.

        Raises:
            BadImage: It is not an image, is damaged or too large.
        """
        if isinstance(raw, bytes):
            with decoded(raw, least_px) as image:
                yield image
        else:
            yield to_rgb(raw)

    def load(self, index: int) -> Image.Image:
        """The image of row `index`: 8-bit RGB, rotated as its EXIF says, alpha blended over white.

        Raises:
            BadImage: It cannot be used, with the reason.
        """
        with self.decoded(self.read(index)) as image:
            return image

    @property
    def content(self) -> UInt8:
        """uint8 [N, 32]: the sha256 of every sample, computed in threads on first use.

        Files are hashed by their bytes, images in memory by mode, size and pixels. A file that
        cannot be read has 31 zero bytes and the code of the reason.
        """
        with self._lock:
            if self._content is None:
                digests = self._source.recall(self.name) if self._is_whole else None
                if digests is None:
                    digests = b"".join(_in_chunks(self._hash_range, len(self)))
                    self._source.finish()
                self._content = np.frombuffer(digests, np.uint8).reshape(-1, 32)
            return self._content

    def _hash_range(self, start: int, stop: int) -> bytes:
        return b"".join(self._source.content(int(p)) for p in self._positions[start:stop])

    def subset(self, rows: Int64, *, name: str | None = None) -> ImageSplit:
        """A split of the given rows, in the given order, loading from the same source."""
        split = ImageSplit(
            name or self.name,
            [self.ids[row] for row in rows.tolist()],
            self.labels[rows],
            self._source,
            positions=self._positions[rows],
            weights=None if self.weights is None else self.weights[rows],
            groups=None if self.groups is None else [self.groups[row] for row in rows.tolist()],
            targets=None if self.targets is None else self.targets[rows],
        )
        if self._content is not None:
            split._content = self._content[rows]
            split._content.setflags(write=False)
        return split

    def grouped_by(self, pattern: str) -> ImageSplit:
        """The same samples in the groups that a regular expression finds in their ids.

        Raises:
            UserError: Its first capture group matches nothing in an id, which is named.
        """
        found = [re.search(pattern, sample_id) for sample_id in self.ids]
        groups = [match[1] if match else None for match in found]
        missing = [i for i, name in zip(self.ids, groups, strict=True) if not name]
        if missing:
            raise UserError(
                f"--group-from {pattern!r} finds no group in {len(missing)} of {len(self)} ids, "
                f"such as {missing[0]!r:.200}: change it so that its first (...) matches in each"
            )
        split = self.subset(np.arange(len(self)))
        split.groups = [str(name) for name in groups]
        return split

    def record(self, content: UInt8) -> None:
        """Require from now on that the samples have these hashes, uint8 [N, 32].

        Raises:
            UserError: One was already read or hashed and has a different hash.
        """
        assert content.shape == (len(self), 32)
        for position, digest in zip(self._positions, content, strict=True):
            self._source.record(int(position), digest.tobytes())


def _in_chunks(task: Callable[[int, int], bytes], total: int) -> list[bytes]:
    """Run `task(start, stop)` over all of range(total) in threads; results in order."""
    # Few tasks for many samples: starting one costs as much as looking up ten remembered hashes.
    size = max(MIN_HASH_CHUNK, total // MAX_HASH_TASKS)
    starts = range(0, total, size)
    stops = [min(start + size, total) for start in starts]
    pool = ThreadPoolExecutor(max_workers=max(1, num_cores()), thread_name_prefix="hash")
    found = []
    try:
        with progress(total, "reading", late=True) as bar:
            for done in pool.map(task, starts, stops):
                found.append(done)
                bar.update(min(size, total - bar.n))
        return found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A named set of splits.

    Attributes:
        name: Short enough for a file name.
        kind: digits, torchvision, folder, manifest, tar, or pictures that a Python call was given.
        splits: train and test, and val where the dataset has all three.
        class_names: By label.
        drawn: Whether the seed helped to choose the samples.
        test_fraction: The fraction set aside for testing, if any.
        notes: Remarks for the user, such as ignored files; one line each.
    """

    name: str
    kind: Kind
    splits: dict[str, ImageSplit]
    class_names: list[str]
    drawn: bool = False
    test_fraction: float | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256, as hex, of class names and what every split's samples are, images included.

        Independent of the files' location and modification times.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(json.dumps([name, len(split), split.weights is not None]).encode())
            for start in range(0, len(split), NUM_TOGETHER):
                ids = split.ids[start : start + NUM_TOGETHER]
                sized = [f"{len(i) if i.isascii() else len(i.encode())}:{i}" for i in ids]
                digest.update("".join(sized).encode())
            digest.update(split.labels.astype("<i8").tobytes())
            if split.weights is not None:
                digest.update(split.weights.astype("<f4").tobytes())
            digest.update(split.content.tobytes())
            if split.groups is not None:
                digest.update(json.dumps(["groups", split.groups]).encode())
            if split.targets is not None:
                digest.update(json.dumps(["targets", *split.targets.shape]).encode())
                digest.update(split.targets.astype("<f8").tobytes())
        return digest.hexdigest()

    def info(self, config: DataConfig) -> DatasetInfo:
        """What a cache records of the dataset; the seed is 0 unless it helped to choose samples."""
        return DatasetInfo(
            name=self.name,
            kind=self.kind,
            fingerprint=self.fingerprint,
            num_train=config.num_train,
            num_test=config.num_test,
            test_fraction=self.test_fraction,
            seed=config.seed if self.drawn else 0,
            group_from=config.group_from,
            task=self.task,
        )

    @property
    def task(self) -> Task:
        """What an image has: one class, several labels, or a number."""
        targets = next(iter(self.splits.values())).targets
        if targets is None:
            return "multiclass"
        return "multilabel" if targets.ndim > 1 else "regression"


def short_name(text: str) -> str:
    """`text` for use in a file name: lowercase letters, digits, dots, dashes, underscores."""
    clean = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return clean[:60] or "dataset"

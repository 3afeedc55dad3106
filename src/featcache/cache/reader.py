"""Reading a finished cache: opened and checked in milliseconds, features mapped, never copied."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.fileio import RESUME
from featcache.cache.layout import RECREATE
from featcache.cache.schema import BLOCK_ROWS, SplitRows, block_range, num_blocks
from featcache.cache.storage import CacheFile, texts_of
from featcache.config import weights_text
from featcache.display import Facts
from featcache.errors import CacheError, listed

if TYPE_CHECKING:
    import pandas as pd

FEW = 5
"""A cache's short description names at most this many classes."""


class FeatureCache(Facts):
    """A finished cache.

    Opening reads and checks everything but the features (a sha256 over it); features are checked
    block by block (CRC-32) when they are first used. Example:

        X, y = FeatureCache("cache/NAME.h5").split("train")

    Attributes:
        path: The file.
        meta: What made the features.
        class_names: C names; labels index them.
        splits: Rows of each split by name, skipped ones left out.
        digest: The file's own sha256 of all but the features; differs when anything differs.

    Raises:
        CacheError: Not a cache, unfinished, damaged, or of another version.
        StorageError: The file system failed.
    """

    def __init__(self, path: Path | str, *, _unfinished: bool = False) -> None:
        self.path = Path(path)
        self._file = CacheFile(self.path)
        if self.path.name.endswith(".part") and not _unfinished:
            raise CacheError(f"{self.path} is unfinished: {RESUME}")
        self._file.check_finished()
        self.digest = self._file.array("digest").tobytes()
        if self.digest != self._file.digest():
            parts = ", ".join(self._file.damaged_parts()) or "marks or checksums"
            raise CacheError(
                f"{self.path} is damaged ({parts}): run featcache verify {self.path} for details"
            )
        self.meta = self._file.meta
        self.class_names = self._file.class_names
        self._splits = {
            name: FeatureSplit(self._file, name, len(self.class_names))
            for name in self._file.layout.splits
        }
        self.splits = {name: len(split) for name, split in self._splits.items()}

    def _facts(self) -> dict[str, object]:
        network, first = self.meta.backbone, next(iter(self._splits.values()))
        views = f", {first.num_views} views" if first.num_views > 1 else ""
        weights = weights_text(dataclasses.asdict(network))
        return {
            "file": self.path,
            "dataset": self.meta.dataset.name,
            "rows": ", ".join(f"{num:,} {name}" for name, num in self.splits.items()),
            "features": f"{first.dim}-d {self.meta.dtype}{views}",
            "classes": f"{len(self.class_names)} ({listed(self.class_names, FEW)})",
            "backbone": f"{network.backbone} ({weights}), {network.preprocessing.image_px} px",
        }

    def split(self, name: str, *, check: bool = True) -> FeatureSplit:
        """One split by name.

        Args:
            name: For example "train".
            check: Whether features are checked against their checksums before they are given out.

        Raises:
            CacheError: There is no such split.
        """
        if name not in self._splits:
            raise CacheError(f"{self.path} has no split {name!r}: it has {', '.join(self._splits)}")
        if check:
            return self._splits[name]
        return FeatureSplit(self._file, name, len(self.class_names), check=False)

    @property
    def num_rows(self) -> dict[str, tuple[int, int]]:
        """Samples of each split, skipped ones included, and how many were skipped."""
        sizes = {name: self._file.layout.num_rows(name) for name in self.splits}
        return {name: (num, num - self.splits[name]) for name, num in sizes.items()}

    def rows(self, name: str) -> SplitRows:
        """What was known of a split before extraction, skipped samples included.

        Raises:
            CacheError: There is no such split.
        """
        self.split(name)
        return self._file.rows(name)

    @property
    def file(self) -> CacheFile:
        """The open file, for this package's own use."""
        return self._file

    @property
    def skipped(self) -> list[tuple[str, str, int]]:
        """Samples without features as (split, id, reason code of data.REASONS)."""
        return [(name, *entry) for name, split in self._splits.items() for entry in split.skipped]

    def to_pandas(self) -> pd.DataFrame:
        """All rows with features in one table, splits one after the other; a copy, in memory.

        Returns:
            Columns `id`, `split`, `label` and `class_name` (or `labels`, such as "a|b"; or
            `target`), `group` and `weight` where the cache has them, then `feature_0` to
            `feature_{D-1}` of the plain images, in the cache's dtype. `df.filter(like="feature_")`
            is X.

        Raises:
            UserError: pandas is not installed.
            CacheError: A block is damaged.
        """
        from featcache.cache.interop.tables import to_pandas

        return to_pandas(self)

    def to_parquet(self, path: Path | str) -> Path:
        """Write all rows with features to a Parquet file, in bounded memory.

        The columns are those of `to_pandas`, but the features are one column, `features`: lists of
        fixed size, float32 whatever the cache's dtype, which viewers of embeddings read. The
        cache's metadata is in the file's, under "featcache.meta".

        Args:
            path: The file; one that this method wrote before is replaced, no other.

        Raises:
            UserError: pyarrow is not installed, or the file would replace another kind of file.
            CacheError: A block is damaged.
            StorageError: The file cannot be written.
        """
        from featcache.cache.interop.tables import to_parquet

        return to_parquet(self, Path(path))

    def check(self) -> None:
        """Check every block of every split.

        Raises:
            CacheError: A block is damaged; it is named.
        """
        for split in self._splits.values():
            split.check()


class FeatureSplit(Facts):
    """The rows of one split; skipped samples are left out everywhere.

    Unpacks to its arrays: `X, y = split`; a number, slice, mask or list picks rows of both.

    Attributes:
        name: For example "train".
        y: [n], int64 class numbers; where samples have several labels or a number, `targets`.
        targets: [n, C], uint8: 1 for each label that a sample has; or [n], float64: its number; or
            None where each has one class.
        weights: [n], float32 sample weights, or None.
        rows: [n], int64: each row's place in the dataset's order, skipped samples counted.
        num_views: V.
        dim: D.
    """

    def __init__(self, file: CacheFile, name: str, num_classes: int, *, check: bool = True) -> None:
        self._file, self.name = file, name
        self.num_views, self._num_rows, self.dim = file.layout.features(name).shape
        self._status = file.array(f"{name}/row_status")
        self.rows = np.flatnonzero(self._status == 0)
        labels = file.array(f"{name}/labels")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise CacheError(f"{file.path}: a label of {name} is not a class; {RECREATE}")
        columns = file.layout.columns(name)
        self.targets: npt.NDArray[Any] | None = None
        for column in ("multihot", "targets"):
            if column in columns:
                self.targets = file.array(f"{name}/{column}")[self.rows]
        self.y: npt.NDArray[Any] = (
            labels[self.rows].astype(np.int64) if self.targets is None else self.targets
        )
        self.weights: npt.NDArray[np.float32] | None = None
        if "weights" in columns:
            self.weights = file.array(f"{name}/weights")[self.rows].astype(np.float32)
        self._checked = np.full(num_blocks(self._num_rows), not check)

    def _facts(self) -> dict[str, object]:
        columns = self._file.layout.columns(self.name)
        facts: dict[str, object] = {
            "split": self.name,
            "X": [*((self.num_views,) if self.num_views > 1 else ()), len(self), self.dim],
            "y": f"{[*self.y.shape]} {self.y.dtype}",
        }
        return facts | {name: "yes" for name in ("groups", "weights") if name in columns}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        yield self.X
        yield self.y

    def __getitem__(self, rows: Any) -> tuple[npt.NDArray[Any], Any]:
        """Features [D] and label of a row, or features [m, D] and labels [m] of several."""
        return self.take(np.arange(len(self))[rows]), self.y[rows]

    @functools.cached_property
    def _all_ids(self) -> list[str]:
        return texts_of(self._file.array(f"{self.name}/ids"), self._file.path)

    @property
    def ids(self) -> list[str]:
        """The n samples' names."""
        return [self._all_ids[row] for row in self.rows]

    @functools.cached_property
    def groups(self) -> npt.NDArray[np.str_] | None:
        """[n] names of what each sample belongs to (patient, camera), or None.

        For scikit-learn's `groups`, such as in `GroupKFold`.
        """
        if "groups" not in self._file.layout.columns(self.name):
            return None
        names = texts_of(self._file.array(f"{self.name}/groups"), self._file.path)
        return np.array(names)[self.rows]

    @property
    def content(self) -> npt.NDArray[np.uint8]:
        """[n, 32], uint8: the sha256 of each sample."""
        return self._file.array(f"{self.name}/content")[self.rows]

    @property
    def skipped(self) -> list[tuple[str, int]]:
        """Samples without features as (id, reason code)."""
        bad = np.flatnonzero(self._status)
        return [(self._all_ids[row], int(self._status[row])) for row in bad]

    @property
    def X(self) -> npt.NDArray[Any]:  # noqa: N802
        """View 0, the plain images: features [n, D] as `view` gives them."""
        return self.view(0)

    def view(self, view: int) -> npt.NDArray[Any]:
        """Features [n, D] of one view, read-only, in the cache's dtype: compute in float32.

        Mapped from the file, not copied, unless samples were skipped.

        Raises:
            CacheError: A block is damaged.
        """
        features: npt.NDArray[Any] = self.views[view]
        return features

    @functools.cached_property
    def _mapped(self) -> npt.NDArray[Any]:
        return self._file.map(f"{self.name}/features")

    @functools.cached_property
    def views(self) -> npt.NDArray[Any]:
        """Features [V, n, D] of all views, like `view`."""
        self.check()
        features = self._mapped
        if len(self.rows) < self._num_rows:
            features = np.asarray(features[:, self.rows])
            features.flags.writeable = False
        return features

    def check(self) -> None:
        """Check every block that was not checked before.

        Raises:
            CacheError: A block is damaged; it is named.
        """
        self.check_rows(range(self._num_rows))

    def check_rows(self, rows: range) -> None:
        """Check the blocks that hold `rows` (places in the dataset's order), each once.

        Raises:
            CacheError: A block is damaged; it is named.
        """
        self._check_blocks(np.arange(rows.start // BLOCK_ROWS, num_blocks(rows.stop)))

    def _check_blocks(self, blocks: npt.NDArray[np.int64]) -> None:
        left = blocks[~self._checked[blocks]].tolist()
        if not left:
            return
        crc = self._file.array(f"{self.name}/crc32")
        for block in left:
            if self._file.crc_of(self.name, block) != crc[block]:
                where = block_range(block, self._num_rows)
                raise CacheError(
                    f"{self._file.path} is damaged: rows {where.start} to {where.stop - 1} of "
                    f"{self.name} (from {self._all_ids[where.start]!r}) fail their checksum; run "
                    f"featcache verify {self._file.path} --repair --dataset DATASET"
                )
            self._checked[block] = True

    def take(
        self, indices: npt.ArrayLike, view: int | npt.NDArray[np.integer[Any]] = 0
    ) -> npt.NDArray[Any]:
        """A copy of features [m, D] of some rows, checking only their blocks.

        Args:
            indices: [m] of 0 to n - 1, in any order.
            view: Which view, or which of each row, [m].

        Raises:
            CacheError: A block is damaged.
        """
        rows = self.rows[np.asarray(indices, np.int64)]
        self._check_blocks(np.unique(rows // BLOCK_ROWS))
        features: npt.NDArray[Any] = self._mapped[view, rows]
        return features

    def iter_blocks(
        self, batch_rows: int = 4096, view: int = 0
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Stream the split in order in bounded memory, checking as it goes.

        Args:
            batch_rows: The most rows at a time.
            view: Which view.

        Yields:
            Features [m, D] in the cache's dtype and labels [m]; each row once.

        Raises:
            CacheError: A block is damaged.
        """
        for start in range(0, self._num_rows, batch_rows):
            kept, features = self.read(range(start, min(start + batch_rows, self._num_rows)), view)
            if len(features):
                yield features, self.y[kept]

    @property
    def num_places(self) -> int:
        """Places in the dataset's order, skipped samples counted: what `read` takes ranges of."""
        return self._num_rows

    def read(self, places: range, view: int = 0) -> tuple[slice, npt.NDArray[Any]]:
        """Read some rows from the file, checked; nothing else is kept in memory.

        Args:
            places: A range of `num_places`.
            view: Which view.

        Returns:
            The slice of `y` (and `ids`, `weights`) that they are, and their features [m, D] in the
            cache's dtype, skipped samples left out.

        Raises:
            CacheError: A block is damaged.
        """
        self.check_rows(places)
        low, high = (int(at) for at in np.searchsorted(self.rows, (places.start, places.stop)))
        features = self._file.view_rows(self.name, view, places)
        if high - low < len(places):
            features = features[self.rows[low:high] - places.start]
        return slice(low, high), features

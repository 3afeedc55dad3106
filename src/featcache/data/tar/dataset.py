"""From shards to a dataset: their samples by split, read by offset and size when they are used."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from featcache.config import DataConfig
from featcache.data.dataset import ImageDataset, ImageSplit, Int64, short_name
from featcache.data.folder import counted
from featcache.data.index import unpack
from featcache.data.listing import alike_text, look_alikes
from featcache.data.sampling import split_off_test
from featcache.data.sources import RecordedSource
from featcache.data.tar.places import Shard, find_shards, read_range
from featcache.data.tar.samples import ShardIndex, index_of, lines, memo_key, why_unusable
from featcache.display import progress
from featcache.errors import UserError, listed
from featcache.file_hashes import Memo
from featcache.runtime import num_cores


def load_shards(config: DataConfig, memo: Memo) -> ImageDataset:
    """Read shards as a dataset.

    A word train, test or val in a shard's name or folder says what split it is of; without such
    words, `test_fraction` sets a part aside. Ids are the images' names in the archives, as from
    the unpacked folder: after `train/` and so on where shards have splits, after the shard's name
    where a name occurs in several shards.

    Raises:
        UserError: A shard is missing or damaged, or has a sample that cannot be used; named.
        StorageError: A download failed twice.
    """
    shards = find_shards(config.dataset)
    chosen = _chosen_splits(config, shards)
    indexes = _indexes(shards, memo)
    notes = _left_out(config, shards, indexes)
    source = _ShardSource(shards, indexes, memo)
    labels = [label for index in indexes for label in lines(index.labels)]
    parts, order = {}, {"val": "val" if "test" in chosen else "test"}
    for name, numbers in chosen.items():
        positions = np.flatnonzero(np.isin(source.shard, numbers))
        ids, more = source.ids(name, positions)
        notes += more
        rows = sorted(range(len(ids)), key=ids.__getitem__)
        parts[order.get(name, name)] = [ids[row] for row in rows], positions[rows]
    class_names = _class_names(config, parts, labels)
    number = {class_name: label for label, class_name in enumerate(class_names)}
    splits = {
        name: ImageSplit(
            name,
            ids,
            np.array([number[labels[position]] for position in positions]),
            source,
            positions=positions,
        )
        for name, (ids, positions) in parts.items()
    }
    fraction = config.test_fraction
    if fraction is not None:
        splits = split_off_test(splits["all"], fraction, config.seed, group_from=config.group_from)
    return ImageDataset(
        _name_of(config.dataset),
        "tar",
        splits,
        class_names,
        drawn=fraction is not None,
        test_fraction=fraction,
        notes=notes,
    )


def _name_of(text: str) -> str:
    last = Path(text).resolve().name if os.path.isdir(text) else text.rstrip("/").split("/")[-1]
    return short_name(last.removesuffix(".tar"))


def _chosen_splits(config: DataConfig, shards: list[Shard]) -> dict[str, list[int]]:
    """The numbers of the shards of train, test and val, or of all."""
    found = {
        name: [number for number, shard in enumerate(shards) if shard.split == name]
        for name in ("train", "test", "val", "")
    }
    names = [name for name in ("train", "test", "val") if found[name]]
    if config.test_fraction is not None:
        if len(names) > 1:
            raise UserError(f"{config.dataset} has its own {names[1]}: leave out --test-fraction")
        return {"all": list(range(len(shards)))}
    if len(names) < 2 or names[0] != "train":
        raise UserError(
            f"{config.dataset}: the shards' names say {' and '.join(names) or 'no split'}, needed "
            "are train and test (or val): rename them, or say which fraction to set aside for "
            "testing, for example --test-fraction 0.2"
        )
    if found[""]:
        raise UserError(
            f"{config.dataset}: the name of {shards[found[''][0]].name} says neither train, test "
            "nor val, as those of other shards do: rename it"
        )
    return {name: found[name] for name in names}


def _indexes(shards: list[Shard], memo: Memo) -> list[ShardIndex]:
    """What every shard has, remembered or read now, several at once."""
    pool = ThreadPoolExecutor(max_workers=max(1, num_cores()), thread_name_prefix="shard")
    found = []
    try:
        with progress(len(shards), "indexing", late=True, unit="shard") as bar:
            for index in pool.map(lambda shard: index_of(shard.place, memo), shards):
                found.append(index)
                bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        memo.save()
    return found


def _left_out(
    config: DataConfig, shards: list[Shard], indexes: list[ShardIndex]
) -> tuple[str, ...]:
    """Notes on what the shards have that is not used.

    Raises:
        UserError: A sample cannot be used, and `on_error` is "fail".
    """
    notes = []
    pairs = zip(shards, indexes, strict=True)
    unusable = [f"{shard.name}: {name}" for shard, index in pairs for name in index.unusable]
    if unusable and config.on_error == "fail":
        raise UserError(
            f"samples that cannot be used: {len(unusable)} ({listed(unusable, 1)}); pack the "
            "images themselves under plain names, or leave such samples out with --on-error skip"
        )
    if unusable:
        notes.append(f"left out samples: {len(unusable)} ({listed(unusable, 3)})")
    ignored = sum((Counter(index.ignored) for index in indexes), Counter[str]())
    if ignored:
        notes.append(f"ignored {counted(ignored)}")
    return tuple(notes)


def _class_names(
    config: DataConfig, parts: dict[str, tuple[list[str], Int64]], labels: list[str]
) -> list[str]:
    """The labels of train, numbers in their order; refuses others in other splits."""
    (train, (_, positions)), *others = parts.items()
    names = {labels[position] for position in positions}
    if len(names) < 2:
        raise UserError(
            f"{config.dataset}: the labels of its {len(positions)} {train} images are "
            f"{' and '.join(map(repr, names)) or 'none'}; a classifier needs at least two"
        )
    for _, (ids, positions) in others:
        for sample_id, position in zip(ids, positions, strict=True):
            label = labels[position]
            if label not in names:
                pairs = [pair for pair in look_alikes([*names, label]) if label in pair]
                alike = f" ({alike_text(pairs)})" if pairs else ""
                raise UserError(
                    f"{sample_id}: no train image has its label {label!r}{alike}; add one or "
                    "correct the label"
                )
    return sorted(names, key=lambda n: (int(n) if n.isdecimal() and n.isascii() else math.inf, n))


class _ShardSource(RecordedSource):
    """The images of all shards, one after the other; their hashes are known from the indexes.

    Attributes:
        shard: The number of each image's shard, int64 [N].
    """

    def __init__(self, shards: list[Shard], indexes: list[ShardIndex], memo: Memo) -> None:
        super().__init__()
        self._shards, self._memo = shards, memo
        self._names = [name for index in indexes for name in lines(index.names)]
        offsets = [unpack(index.offsets, "<u8") for index in indexes]
        self.shard = np.repeat(np.arange(len(shards)), [len(of_shard) for of_shard in offsets])
        self._offsets = np.concatenate(offsets)
        self._sizes = np.concatenate([unpack(index.sizes, "<u8") for index in indexes])
        for index in indexes:
            self._hashes += unpack(index.content, "u1").tobytes()
        self._is_known += bytes([True]) * len(self._names)
        assert len(self._names) == len(self._offsets) == len(self._sizes)
        assert len(self._hashes) == 32 * len(self._names)

    def ids(self, split: str, positions: Int64) -> tuple[list[str], tuple[str, ...]]:
        """Ids of the images of a split, and a note if they are unusual."""
        names = [self._names[position] for position in positions]
        shards = [self._shards[self.shard[position]].name for position in positions]
        twice = next((name for name, num in Counter(names).items() if num > 1), None)
        if twice is None:
            return [name if split == "all" else f"{split}/{name}" for name in names], ()
        where = [shard for name, shard in zip(names, shards, strict=True) if name == twice]
        return [f"{shard}/{name}" for name, shard in zip(names, shards, strict=True)], (
            f"names that occur in several shards, such as {twice} in {listed(where, 2)}: ids have "
            "the shard's name before the image's",
        )

    def _place(self, position: int) -> str:
        return self._shards[int(self.shard[position])].place

    def _name(self, position: int) -> str:
        return f"{self._names[position]} in {self._place(position)}"

    def _read(self, position: int) -> tuple[bytes, bytes]:
        size = int(self._sizes[position])
        bad = why_unusable(size)
        if bad is not None:
            raise bad
        data = read_range(self._place(position), int(self._offsets[position]), size)
        return data, hashlib.sha256(data).digest()

    def _forget(self, position: int) -> None:
        self._memo.put(memo_key(self._place(position)), (), None)
        self._memo.save()

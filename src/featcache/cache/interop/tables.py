"""A cache's rows as a pandas DataFrame or a Parquet file, for tools that do not know HDF5."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reader import FeatureCache, FeatureSplit
from featcache.cache.schema import label_texts
from featcache.errors import UserError
from featcache.files import check_outputs, replacing, storage_errors

if TYPE_CHECKING:
    import pandas as pd

META_KEY = "featcache.meta"
PARQUET_MARKS = re.compile(META_KEY.encode())
"""In the footer of every file that `to_parquet` wrote."""
ROW_GROUP_BYTES = 32 << 20
"""About how many bytes of features are in memory at a time."""
Columns = dict[str, npt.NDArray[Any]]


def to_pandas(cache: FeatureCache) -> pd.DataFrame:
    """See `FeatureCache.to_pandas`."""
    pandas = _package("pandas")
    splits = [cache.split(name) for name in cache.splits]
    known = [pandas.DataFrame(_known(cache, split)) for split in splits]
    features = np.empty((sum(map(len, splits)), splits[0].dim), cache.meta.dtype)
    start = 0
    for split in splits:
        for block, _ in split.iter_blocks():
            features[start : start + len(block)] = block
            start += len(block)
    names = [f"feature_{column}" for column in range(features.shape[1])]
    frame = pandas.concat(known, ignore_index=True)
    order = {"split": list(cache.splits), "class_name": cache.class_names}
    for name in order.keys() & set(frame):
        frame[name] = pandas.Categorical(frame[name], categories=order[name])
    return pandas.concat([frame, pandas.DataFrame(features, columns=names, copy=False)], axis=1)


def to_parquet(cache: FeatureCache, path: Path) -> Path:
    """See `FeatureCache.to_parquet`."""
    _package("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    check_outputs({path: PARQUET_MARKS}, [cache.path])
    schema = _schema(cache)
    with storage_errors(path), replacing(path) as draft:
        texts = [field.name for field in schema if field.type == "string"]
        with parquet.ParquetWriter(draft, schema, use_dictionary=texts) as writer:
            for table in _tables(cache, schema):
                writer.write_table(table)
    return path


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs the package {name}, which is not installed: type "
            'pip install "featcache[pandas]"'
        ) from error


def _known(cache: FeatureCache, split: FeatureSplit) -> Columns:
    """Everything but the features, each [n]; columns that a split does not have are left out."""
    names = np.array(cache.class_names, object)
    columns = {"id": np.array(split.ids, object), "split": np.full(len(split), split.name, object)}
    if split.targets is None:
        columns |= {"label": split.y, "class_name": names[split.y]}
    elif split.targets.ndim == 1:
        columns["target"] = split.targets
    else:
        texts = label_texts(cache.class_names, split.y, split.targets)
        columns["labels"] = np.array(texts, object)
    if split.groups is not None:
        columns["group"] = split.groups.astype(object)
    if split.weights is not None:
        columns["weight"] = split.weights
    return columns


def _schema(cache: FeatureCache) -> Any:
    """Columns that any split has, and the cache's metadata."""
    import pyarrow as pa

    kinds = {"O": pa.string(), "i": pa.int64(), "f": pa.float64()}
    splits = [cache.split(name) for name in cache.splits]
    known = {name: a.dtype.kind for split in splits for name, a in _known(cache, split).items()}
    features = pa.list_(pa.float32(), splits[0].dim)
    fields = [*((name, kinds[kind]) for name, kind in known.items()), ("features", features)]
    return pa.schema(fields, metadata={META_KEY: cache.meta.to_json()})


def _tables(cache: FeatureCache, schema: Any) -> Iterator[Any]:
    """The rows in order, as one table for each row group."""
    import pyarrow as pa

    for split in map(cache.split, cache.splits):
        known = _known(cache, split)
        step = max(1, ROW_GROUP_BYTES // (4 * split.dim))
        for start in range(0, split.num_places, step):
            rows, features = split.read(range(start, min(start + step, split.num_places)))
            if len(features):
                flat = pa.array(np.asarray(features, np.float32).ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, split.dim)
                arrays = [
                    pa.array(known[field.name][rows], field.type)
                    if field.name in known
                    else pa.nulls(len(features), field.type)
                    for field in list(schema)[:-1]
                ]
                yield pa.Table.from_arrays([*arrays, vectors], schema=schema)

"""A cache as a pandas DataFrame and as a Parquet file."""

import sys

import numpy as np
import pytest

from cache_helpers import (
    CLASSES,
    begin,
    blobs,
    expected,
    fill,
    make_splits,
    rows_cache,
    synthetic_cache,
)
from featcache.cache import FeatureCache
from featcache.cache.interop import tables
from featcache.errors import UserError

pd = pytest.importorskip("pandas", reason='needs pandas: pip install "featcache[pandas]"')
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")


def full_cache(path, **meta):
    """150 train and 70 test rows with every column; row 3 of train was skipped."""
    with begin(path, splits=make_splits(columns=True), **meta) as writer:
        first = writer.pending("train")[0]
        status = np.zeros(len(first), np.uint8)
        status[3] = 1
        writer.write_block("train", first, expected("train", first), status)
        fill(writer)
        return FeatureCache(writer.finish())


def test_a_dataframe_has_every_row_and_one_column_per_feature(tmp_path):
    cache = full_cache(tmp_path / "c.h5")
    df = cache.to_pandas()
    features = [f"feature_{i}" for i in range(5)]
    assert list(df) == ["id", "split", "label", "class_name", "group", "weight", *features]
    assert len(df) == 149 + 70
    assert list(df["split"].cat.categories) == ["train", "test"]
    assert list(df["class_name"].cat.categories) == CLASSES
    assert df.iloc[3].to_dict() == {
        "id": "train/00004.png",
        "split": "train",
        "label": 1,
        "class_name": "dog",
        "group": "büro 0",
        "weight": 1.0,
        **dict(zip(features, expected("train", range(4, 5))[0, 0], strict=True)),
    }
    X = df[df["split"] == "test"].filter(like="feature_").to_numpy()
    assert X.dtype == np.float32
    assert np.array_equal(X, expected("test", range(70))[0])


def test_a_dataframe_keeps_float16_and_several_labels(tmp_path):
    X, _ = blobs(3)
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    path = rows_cache(tmp_path / "m.h5", {"train": (X, labels)}, "abc", dtype="float16")
    df = FeatureCache(path).to_pandas()
    assert df["labels"].tolist() == ["a|c", "", "b"]
    assert df["feature_0"].dtype == np.float16
    assert not {"label", "class_name", "group", "weight"} & set(df)


def test_parquet_holds_the_same_rows(tmp_path, monkeypatch):
    cache = full_cache(tmp_path / "c.h5")
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 64 * 4 * 5)
    path = cache.to_parquet(tmp_path / "c.parquet")
    file = parquet.ParquetFile(path)
    assert file.metadata.num_row_groups == 3 + 2  # bounded memory: 64 places at a time
    assert str(file.schema_arrow.field("features").type).startswith("fixed_size_list<")
    assert file.schema_arrow.metadata[b"featcache.meta"].decode() == cache.meta.to_json()
    read, df = file.read().to_pandas(), cache.to_pandas()
    assert np.array_equal(np.stack(read.pop("features")), df.filter(like="feature_"))
    known = df.filter(regex="^(?!feature_)").astype({"split": "str", "class_name": "str"})
    assert known.to_dict("list") == read.to_dict("list")


def test_parquet_has_nulls_where_a_split_lacks_a_column(tmp_path):
    X, _ = blobs(4)
    numbers = np.array([0.5, 1, 2, 4])
    groups = {"test": list("ppqq")}
    splits = {"train": (X, numbers), "test": (X, numbers)}
    path = rows_cache(tmp_path / "r.h5", splits, ["target"], groups=groups)
    table = parquet.read_table(FeatureCache(path).to_parquet(tmp_path / "r.parquet"))
    assert table["group"].to_pylist() == [None] * 4 + list("ppqq")
    assert table["target"].to_pylist() == [0.5, 1, 2, 4] * 2
    assert FeatureCache(path).to_pandas()["group"].isna().tolist() == [True] * 4 + [False] * 4


def test_parquet_replaces_its_own_file_only(tmp_path):
    cache = FeatureCache(synthetic_cache(tmp_path / "c.h5", {"train": 70, "test": 10}))
    own = cache.to_parquet(tmp_path / "own.parquet")
    assert cache.to_parquet(str(own)) == own
    with pytest.raises(UserError, match=r"c\.h5 is an input and would be replaced"):
        cache.to_parquet(cache.path)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(other)
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"other\.parquet exists and was not written by this"):
        cache.to_parquet(other)
    assert other.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        *("c.h5", "other.parquet", "own.parquet")
    ]


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_pandas"), ("pyarrow", "to_parquet")])
def test_a_missing_package_is_named_with_what_to_type(tmp_path, monkeypatch, package, call):
    cache = FeatureCache(synthetic_cache(tmp_path / "c.h5", {"train": 1}))
    monkeypatch.setitem(sys.modules, package, None)
    arguments = [tmp_path / "c.parquet"] if call == "to_parquet" else []
    with pytest.raises(UserError) as caught:
        getattr(cache, call)(*arguments)
    assert str(caught.value) == (
        f"this needs the package {package}, which is not installed: type "
        'pip install "featcache[pandas]"'
    )

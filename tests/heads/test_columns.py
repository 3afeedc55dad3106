"""Heads on caches of several stages: which columns they learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache
from featcache import FeatureCache
from featcache.config import StageColumns, TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, summary_lines, train_head

STAGES = StageColumns(pool="avg", names=("layer1.mean", "last"), widths=(64, 8))
NAMES = ["ape", "bee", "cat"]


def stage_cache(path: Path, informative: str) -> Path:
    """64 columns of an earlier stage and eight of the last layer; one of the two is noise."""
    splits = {}
    for seed, (name, num) in enumerate({"train": 150, "test": 90}.items()):
        early, y = blobs(num, dim=64, spread=4, seed=seed)
        last, _ = blobs(num, spread=1, seed=seed)
        noise = np.random.default_rng(seed).normal(size=(num, 72), scale=2).astype(np.float32)
        both = [early, noise[:, :8]] if informative == "layer1" else [noise[:, :64], last]
        splits[name] = (np.concatenate(both, axis=1), y)
    return rows_cache(path, splits, NAMES, stages=STAGES)


@pytest.mark.parametrize("solver", ["logistic", "ridge", "adam"])
@pytest.mark.parametrize(("informative", "chosen"), [("layer1", "all"), ("last", "last")])
def test_held_out_rows_choose_the_columns(
    tmp_path: Path, solver: str, informative: str, chosen: str
) -> None:
    cache = stage_cache(tmp_path / "c.h5", informative)
    report = train_head(TrainHeadConfig(cache=cache, solver=solver, epochs=30))
    assert report["chosen"]["columns"] == chosen
    assert report["trainable_params"] == 3 * (73 if chosen == "all" else 9)
    head = load_head(report["head"])
    assert head.weight.shape == (3, 72)
    assert head.weight[:, :64].any() == (chosen == "all")
    test = FeatureCache(cache).split("test")
    assert head.score(test.X, test.y) == report["test_top1"] > 0.6
    assert any(f"columns {chosen}" in line for line in summary_lines(report))


def test_a_head_on_the_last_layer_is_that_of_a_plain_cache(tmp_path: Path) -> None:
    path = stage_cache(tmp_path / "c.h5", "last")
    cache = FeatureCache(path)
    splits = {n: (cache.split(n).X[:, 64:], cache.split(n).y) for n in ("train", "test")}
    plain = rows_cache(tmp_path / "plain.h5", splits, NAMES)
    given = {"C": 0.1, "standardize": "on"}
    one, other = (
        load_head(train_head(TrainHeadConfig(cache=each, columns=columns, **given))["head"])
        for each, columns in ((path, "last"), (plain, "auto"))
    )
    assert np.allclose(one.weight[:, 64:], other.weight, atol=1e-5)
    assert np.allclose(one.bias, other.bias, atol=1e-5)
    assert np.allclose(one.mean[64:], other.mean)


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    cache = stage_cache(tmp_path / "c.h5", "layer1")
    for columns, nonzero in (("layer1", slice(0, 64)), ("layer1.mean", slice(0, 64))):
        report = train_head(TrainHeadConfig(cache=cache, columns=columns, C=0.1))
        weight = load_head(report["head"]).weight
        assert weight[:, nonzero].all()
        assert not weight[:, 64:].any()
        assert report["trainable_params"] == 3 * 65
        assert report["chosen"]["columns"] == columns
    with pytest.raises(UserError, match=r"no columns 'layer4'; did you mean layer1\?"):
        train_head(TrainHeadConfig(cache=cache, columns="layer4"))
    plain = rows_cache(tmp_path / "plain.h5", {n: blobs(60) for n in ("train", "test")}, NAMES)
    with pytest.raises(UserError, match="no columns 'layer1'; known: all, last"):
        train_head(TrainHeadConfig(cache=plain, columns="layer1"))


def test_without_the_last_layer_every_layer_is_tried(tmp_path: Path) -> None:
    splits = {name: blobs(150, dim=24, seed=seed) for seed, name in enumerate(("train", "test"))}
    names = ("blocks.2.cls", "blocks.2.mean", "mean")
    stages = StageColumns(pool="avg", names=names, widths=(8, 8, 8))
    cache = rows_cache(tmp_path / "c.h5", splits, NAMES, stages=stages)
    report = train_head(TrainHeadConfig(cache=cache, solver="ridge"))
    tried = {candidate["columns"] for candidate in report["chosen"]["candidates"]}
    assert tried == {"blocks.2", "mean", "all"}
    with pytest.raises(UserError, match=r"no columns 'last'; known: blocks\.2, blocks\.2\.cls"):
        train_head(TrainHeadConfig(cache=cache, columns="last"))


def test_what_takes_all_columns(tmp_path: Path) -> None:
    cache = stage_cache(tmp_path / "c.h5", "last")
    for settings in ({"solver": "knn"}, {"stream": "on"}):
        report = train_head(TrainHeadConfig(cache=cache, **settings))
        assert "columns" not in report["chosen"]
        with pytest.raises(UserError, match="--columns last needs a linear solver"):
            train_head(TrainHeadConfig(cache=cache, columns="last", **settings))

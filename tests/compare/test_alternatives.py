"""A head on the best of several caches: held-out train rows choose, and one head is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache
from featcache.compare.alternatives import Network, train_best_head
from featcache.config import StageColumns, TrainHeadConfig
from featcache.heads import load_head, train_head_report
from featcache.results import RunReport

NAMES = ["ape", "bee", "cat"]


def settings(tmp_path: Path, good: Network, **stages: object) -> dict[Network, TrainHeadConfig]:
    """A cache of each network; the features of one can be learned, those of the other are noise."""
    configs: dict[Network, TrainHeadConfig] = {}
    for network in ("frozen", "adapt"):
        splits = {}
        for seed, (name, num) in enumerate({"train": 150, "test": 90}.items()):
            X, y = blobs(num, spread=1, seed=seed)
            noise = np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)
            splits[name] = (X if network == good else noise, y)
        cache = rows_cache(tmp_path / f"{network}.h5", splits, NAMES, **stages)
        output = tmp_path / "best.safetensors"
        configs[network] = TrainHeadConfig(cache=cache, solver="ridge", output=output)
    return configs


@pytest.mark.parametrize(
    ("good", "features"), [("frozen", "last layer"), ("adapt", "last layer, adapted BatchNorm")]
)
def test_the_better_on_held_out_rows_is_written(
    tmp_path: Path, good: Network, features: str
) -> None:
    configs = settings(tmp_path, good)
    report = train_best_head(configs)
    assert (report.more["network"], report.more["features"]) == (good, features)
    assert [each["features"] for each in report.more["alternatives"]] == [
        "last layer", "last layer, adapted BatchNorm",
    ]  # fmt: skip
    held_out = [each["val_top1"] for each in report.more["alternatives"]]
    assert report.more["val_top1"] == max(held_out) > 0.8 > 0.6 > min(held_out)
    saved = RunReport.load(tmp_path / "best.json")
    assert saved.more["alternatives"] == report.more["alternatives"]
    alone = train_head_report(configs[good])
    assert alone.test == report.test
    assert load_head(tmp_path / "best.safetensors").provenance["cache"] == f"{good}.h5"


def test_the_first_of_two_equals_wins_and_given_rows_alone_count(tmp_path: Path) -> None:
    one = settings(tmp_path, "frozen")["frozen"]
    rows = np.arange(60)
    report = train_best_head({"frozen": one, "adapt": one}, rows)
    assert report.more["network"] == "frozen"
    assert report.more["num_train"] == 60
    alternatives = report.more["alternatives"]
    assert alternatives[0]["val_top1"] == alternatives[1]["val_top1"] == report.more["val_top1"]


def test_all_stages_are_named_if_they_were_chosen(tmp_path: Path) -> None:
    stages = StageColumns(pool="avg", names=("layer1.mean", "last"), widths=(6, 2))
    report = train_best_head(settings(tmp_path, "adapt", stages=stages))
    assert report.more["chosen"]["columns"] == "all"
    assert report.more["features"] == "all stages, adapted BatchNorm"

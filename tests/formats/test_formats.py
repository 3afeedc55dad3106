"""Files that earlier versions wrote still load and mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import TESTS
from featcache import FeatureCache, cli, runtime
from featcache.cache import verify
from featcache.heads import load_head

FILES = TESTS / "formats" / "v0.1.0"


def test_a_cache_of_0_1_0_is_sound_and_has_its_rows() -> None:
    assert verify(FILES / "digits.h5").ok
    cache = FeatureCache(FILES / "digits.h5")
    assert cache.class_names == [str(digit) for digit in range(10)]
    X, y = cache.split("train").X, cache.split("train").y
    assert X.shape == (40, 512)
    assert X.dtype == np.float16
    assert np.bincount(y).tolist() == [4] * 10
    assert len(cache.split("test").y) == 20


def test_a_cache_of_0_1_0_is_not_taken_for_todays_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = FeatureCache(shutil.copy(FILES / "digits.h5", tmp_path / "old.h5"))
    libraries = old.meta.versions  # the libraries that made the cache, so that only we differ
    monkeypatch.setattr(runtime, "version_of", lambda name: libraries.get(name, "1.0"))
    ask = ["extract-features", "digits", "--weights", "bundled", "--dtype", "float16"]
    ask += ["--num-train", "40", "--num-test", "20", "--cache-dir", str(tmp_path), "--json"]
    assert cli.main([*ask, "--output", str(old.path)]) == 2
    assert capsys.readouterr().err == (
        f"featcache extract-features: {old.path} was made with different settings: "
        "versions.featcache is 0.1 in the cache, 0.2 now. "
        "Add --force to replace it, or --output FILE to keep both\n"
    )
    assert cli.main([*ask, "--output", str(tmp_path / "new.h5")]) == 0
    assert not json.loads(capsys.readouterr().out)["hit"]
    new = FeatureCache(tmp_path / "new.h5")
    for split in ("train", "test"):
        assert new.split(split).y.tolist() == old.split(split).y.tolist()
        # Other versions of torch round differently, by less than this.
        np.testing.assert_allclose(new.split(split).X, old.split(split).X, atol=0.01)


@pytest.mark.parametrize("solver", ["logistic", "ridge", "knn", "adam"])
def test_a_head_of_0_1_0_scores_as_it_did(solver: str) -> None:
    head = load_head(FILES / f"{solver}.safetensors")
    test = FeatureCache(FILES / "digits.h5").split("test")
    assert head.score(test.X, test.y) == head.scores["test_top1"]


def test_a_cache_and_a_head_of_0_1_0_serve_todays_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FILES / "digits.h5", tmp_path)
    again = ["train-head", str(tmp_path / "digits.h5"), "--solver", "ridge", "--json"]
    assert cli.main([*again, "--output", str(tmp_path / "new.safetensors")]) == 0
    old = json.loads((FILES / "ridge.json").read_text())
    assert json.loads(capsys.readouterr().out)["test_top1"] == old["test_top1"]


def test_reports_of_0_1_0_make_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    runs = [str(path) for path in sorted(FILES.glob("*.json"))]
    assert cli.main(["report", *runs, str(FILES / "compare"), "--output", str(page)]) == 0
    text = page.read_text()
    assert "0.750" in text  # the cached head's accuracy with all images, from compare.json

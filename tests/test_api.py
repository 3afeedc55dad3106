"""The package as Python sees it: names, types, notebooks."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from conftest import REPO
from data_helpers import make_folder
from featcache import (
    Classifier,
    ExtractConfig,
    TrainHeadConfig,
    UserError,
    extract_features,
    train_head,
    write_report,
)
from featcache.display import bar_hidden
from featcache.heads import load_head
from featcache.results import RunReport
from featcache.runtime import environment
from trained_helpers import extracted_cache

SCRIPT = """
from featcache import Classifier, ExtractConfig, FeatureCache, Prediction, extract_features

config = ExtractConfig(dataset="digits", image_px=64)
report = extract_features(config)
X, y = FeatureCache(report["cache"]).split("train")
found = Classifier.load("x.safetensors").predict(["a.png", b"", X])
reveal_type(config.image_px)
reveal_type(found[0])
reveal_type(FeatureCache("x.h5").split("train").y)
ExtractConfig(dataset="digits", image_px="64")
ExtractConfig(dataset="digits", imagepx=64)
from featcache import extract_feature
"""
TOLD = {
    8: 'Revealed type is "int | None"',
    9: 'Revealed type is "featcache.predict.classifier.Prediction"',
    10: 'Revealed type is "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]',
    11: 'Argument "image_px" to "ExtractConfig" has incompatible type "str"; expected "int | None"',
    12: 'Unexpected keyword argument "imagepx" for "ExtractConfig"',
    13: 'Module "featcache" has no attribute "extract_feature"',
}


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse(Path(featcache.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and len(node.body) > 1)
    homes = {node.names[0].asname: node.module for node in block.body}
    assert homes == {name: f"featcache.{home}" for name, home in featcache._HOMES.items()}
    assert sorted(homes) == featcache.__all__


def test_help_lists_every_public_name_with_one_line() -> None:
    lines = re.findall(r"^    (\w+)(?:\((\w+)\))? +\S", featcache.__doc__ or "", re.MULTILINE)
    assert sorted(name for line in lines for name in line if name) == featcache.__all__


def test_the_version_has_one_place_and_an_entry_in_the_changelog() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "featcache.__version__"}
    versions = re.findall(r"^## \[(.+?)\]", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == featcache.__version__
    assert environment()["featcache"] == featcache.__version__


@pytest.mark.slow
def test_mypy_sees_types_in_a_users_script(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["--python-version", "3.11", "--ignore-missing-imports", "script.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, "--cache-dir", tmp_path / "cache"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(REPO / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("script.py:")]
    for number, told in TOLD.items():
        assert [line for line in lines if line.startswith(f"script.py:{number}:") and told in line]
    assert {int(line.split(":")[1]) for line in lines} == set(TOLD)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: kernel)
    monkeypatch.setitem(sys.modules, "IPython", ipython)


def settings(tmp_path: Path) -> ExtractConfig:
    folder = make_folder(tmp_path / "pets", train=8, test=2)
    options = {"weights": "random", "image_px": 32, "cache_dir": tmp_path, "workers": 1}
    return ExtractConfig(dataset=str(folder), **options)


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_a_bar_and_the_summary(tmp_path: Path, capsys) -> None:
    report = extract_features(settings(tmp_path))
    shown = capsys.readouterr()
    assert "train: 100%" in shown.err
    assert "cached 16 train, 4 test images of 2 classes, resnet18 (random)" in shown.err
    assert f"cache: {report['cache']}\n" in shown.err
    assert shown.out == ""


def test_a_script_shows_neither(tmp_path: Path, capsys) -> None:
    assert bar_hidden() is None
    extract_features(settings(tmp_path))
    assert capsys.readouterr().err == ""


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in (None, types.SimpleNamespace()):
        ipython = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert bar_hidden() is None


def test_every_command_is_a_function(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        write_report(featcache.ReportConfig(runs=[tmp_path / "none.json"]))
    cache = extract_features(settings(tmp_path))["cache"]
    trained = featcache.train_head(featcache.TrainHeadConfig(cache=cache, cache_dir=tmp_path))
    config = featcache.PredictConfig(
        model=trained["head"], inputs=[tmp_path / "pets"], json=True, seed=42
    )
    found = featcache.predict_images(config)["predictions"]
    assert len(found) == 20
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png := io.BytesIO(), "png")
    assert featcache.Classifier.load(trained["head"]).predict(png.getvalue())[0].label in (
        trained_names(cache)
    )


def trained_names(cache: str) -> list[str]:
    return featcache.FeatureCache(cache).class_names


def test_objects_describe_themselves_in_a_line_and_in_notebooks(tmp_path) -> None:
    cache = extracted_cache(tmp_path, seed=42)
    report = train_head(TrainHeadConfig(cache=cache.path, solver="ridge"))
    path = Path(report["head"])
    assert repr(cache) == (
        f"<FeatureCache file: {cache.path}; dataset: pets; rows: 16 train, 4 test; features: "
        "512-d float32; classes: 2 (cat, dog); backbone: resnet18 (random), 32 px>"
    )
    assert repr(cache.split("test")) == "<FeatureSplit split: test; X: [4, 512]; y: [4] int64>"
    head = repr(load_head(path))
    assert head.startswith(
        "<LinearHead solver: ridge; classes: 2 (cat, dog); features: 512-d, from"
    )
    assert f"test_top1 {report['test_top1']:.3f}" in head
    run, top1 = repr(RunReport.load(path.with_suffix(".json"))), report["test_top1"]
    assert run.startswith(f"<RunReport command: train-head; found: accuracy {top1:.3f} [")
    classifier = repr(Classifier.load(path))
    assert classifier.startswith(f"<Classifier file: {path}; what: ridge head on resnet18 (random)")
    assert '<td style="text-align:left">2 (cat, dog)</td>' in cache._repr_html_()

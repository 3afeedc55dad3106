"""Settings given from Python: brought to their types, or refused as on the command line."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from featcache import UserError
from featcache.config import (
    BackboneConfig,
    ExportConfig,
    ExtractConfig,
    FinetuneConfig,
    InfoConfig,
    PredictConfig,
    ReportConfig,
    TrainHeadConfig,
    VerifyConfig,
)


def test_text_and_paths_stand_for_each_other() -> None:
    config = ExtractConfig(dataset=Path("pets"), cache_dir="there", output="there/x.h5")
    assert config == ExtractConfig(
        dataset="pets", cache_dir=Path("there"), output=Path("there/x.h5")
    )
    assert isinstance(config.dataset, str)
    assert TrainHeadConfig(cache="x.h5").cache == Path("x.h5")
    assert isinstance(InfoConfig(cache=PurePosixPath("x.h5")).cache, Path)
    assert VerifyConfig(cache="x.h5").cache == Path("x.h5")
    assert ReportConfig(runs=["a", Path("b")]).runs == (Path("a"), Path("b"))
    assert PredictConfig(model="m", inputs=[Path("a.png"), "b"]).inputs == ("a.png", "b")


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = ExtractConfig(dataset="~/pets", weights="~/w.pth", cache_dir="~/c", output="~/x.h5")
    assert (config.dataset, config.weights) == ("/home/me/pets", "/home/me/w.pth")
    assert (config.cache_dir, config.output) == (Path("/home/me/c"), Path("/home/me/x.h5"))
    assert PredictConfig(model="~/m", inputs=("~/a", "./~", "-")).inputs == (
        "/home/me/a",
        "./~",
        "-",
    )
    assert ReportConfig(runs=("~/a",), title="~/x").runs == (Path("/home/me/a"),)
    assert ReportConfig(runs=("a",), title="~/x").title == "~/x"
    assert TrainHeadConfig(cache="~nobody-here/x.h5").cache == Path("~nobody-here/x.h5")


def test_numbers_of_every_kind_are_numbers() -> None:
    config = FinetuneConfig(
        dataset="digits", lr=1, weight_decay=np.float32(0.5), epochs=np.int64(3), seed=np.uint8(7)
    )
    assert (config.lr, config.weight_decay, config.epochs, config.seed) == (1.0, 0.5, 3, 7)
    assert [type(v) for v in (config.lr, config.weight_decay, config.epochs)] == [float, float, int]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: ExtractConfig(dataset="digits", precision="bf16"),
            "--precision: no choice 'bf16'",
        ),
        (lambda: TrainHeadConfig(cache="x.h5", solver="logistik"), "did you mean logistic"),
        (lambda: TrainHeadConfig(cache="x.h5", select="foo"), "--select: no choice 'foo'"),
        (
            lambda: TrainHeadConfig(cache="x.h5", standardize=True),
            "--standardize: no choice 'True'",
        ),
        (
            lambda: TrainHeadConfig(cache="x.h5", batch_size="x"),
            "--batch-size: 'x' is no whole num",
        ),
        (lambda: TrainHeadConfig(cache="x.h5", epochs=2.5), "--epochs: '2.5' is no whole number"),
        (lambda: TrainHeadConfig(cache="x.h5", epochs=True), "--epochs: 'True' is no whole number"),
        (lambda: TrainHeadConfig(cache="x.h5", tta=1), "--tta: '1' is no True or False"),
        (lambda: TrainHeadConfig(cache=None), "--cache: 'None' is no path"),
        (lambda: BackboneConfig(resize=["squash"]), "--resize: no choice"),
        (lambda: ExtractConfig(dataset=3), "--dataset: '3' is no text"),
        (lambda: PredictConfig(model="m", inputs="a.png"), "--inputs: 'a.png' is no list"),
        (lambda: ReportConfig(runs=[3]), "--runs: '3' is no path"),
        (lambda: ExportConfig(model="m", input="int4"), "--input: no choice 'int4'"),
    ],
)
def test_what_does_not_fit_is_refused(make, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ExtractConfig(dataset="digits", output="photo.jpg"), "ends in .h5"),
        (lambda: PredictConfig(model="m", inputs=("a",), output="photo.jpg"), "ends in .csv"),
        (lambda: PredictConfig(model="m", inputs=("a",), output="m.safetensors"), "ends in .csv"),
        (lambda: VerifyConfig(cache="x.h5", dataset="digits"), "--dataset is for --repair"),
        (
            lambda: FinetuneConfig(dataset="digits", freeze_backbone=True, backbone_lr=5.0),
            "leave --backbone-lr out",
        ),
    ],
)
def test_names_and_flags_that_cannot_be_meant_are_refused(make, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert told in str(caught.value)

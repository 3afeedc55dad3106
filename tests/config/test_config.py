"""Settings given from Python: brought to their types, or refused in Python's own words."""

from __future__ import annotations

import dataclasses
import pydoc
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from featcache import UserError, cli, extract_features
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
from featcache.config.settings import in_python


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
            "precision: no choice 'bf16'",
        ),
        (lambda: TrainHeadConfig(cache="x.h5", solver="logistik"), "did you mean logistic"),
        (lambda: TrainHeadConfig(cache="x.h5", select="foo"), "select: no choice 'foo'"),
        (
            lambda: TrainHeadConfig(cache="x.h5", standardize=True),
            "standardize: no choice 'True'",
        ),
        (
            lambda: TrainHeadConfig(cache="x.h5", batch_size="x"),
            "batch_size: 'x' is not a whole num",
        ),
        (lambda: TrainHeadConfig(cache="x.h5", epochs=2.5), "epochs: '2.5' is not a whole number"),
        (
            lambda: TrainHeadConfig(cache="x.h5", epochs=True),
            "epochs: 'True' is not a whole number",
        ),
        (lambda: TrainHeadConfig(cache="x.h5", tta=1), "tta: '1' is not True or False"),
        (lambda: TrainHeadConfig(cache=None), "cache: 'None' is not a path"),
        (lambda: BackboneConfig(resize=["squash"]), "resize: no choice"),
        (lambda: ExtractConfig(dataset=3), "dataset: '3' is not text"),
        (lambda: PredictConfig(model="m", inputs="a.png"), "inputs: 'a.png' is not a list"),
        (lambda: ReportConfig(runs=[3]), "runs: '3' is not a path"),
        (lambda: ExportConfig(model="m", input="int4"), "input: no choice 'int4'"),
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
        (lambda: VerifyConfig(cache="x.h5", dataset="digits"), "leave it out, or add repair=True"),
        (
            lambda: FinetuneConfig(dataset="digits", freeze_backbone=True, backbone_lr=5.0),
            "leave backbone_lr out",
        ),
    ],
)
def test_names_and_flags_that_cannot_be_meant_are_refused(make, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert told in str(caught.value)


def test_errors_name_fields_in_python_and_flags_on_the_command_line(capsys) -> None:
    with pytest.raises(UserError, match=r"^image_px 4 is out of range: give a number between 8 "):
        ExtractConfig(dataset="digits", image_px=4)
    with pytest.raises(UserError, match=r"^force=True starts over and update=True keeps rows"):
        extract_features(ExtractConfig(dataset="digits", force=True, update=True))
    assert cli.main(["extract-features", "digits", "--image-px", "4"]) == 2
    assert "--image-px 4 is out of range" in capsys.readouterr().err


def test_errors_of_the_work_name_fields_too(tmp_path: Path) -> None:
    config = VerifyConfig(cache="x.h5")
    with pytest.raises(UserError, match=r"^device=\"mps\": .* use device=\"cpu\" or auto"):
        extract_features(
            ExtractConfig(dataset="digits", weights="bundled", device="mps", cache_dir=tmp_path)
        )
    told = in_python("give --repair, or run featcache verify x.h5 --repair --seed 3", type(config))
    assert told == "give repair=True, or run featcache verify x.h5 --repair --seed 3"
    assert in_python("add --no-repair or --other x", type(config)) == (
        "add repair=False or --other x"
    )


def test_help_explains_every_field() -> None:
    text = pydoc.render_doc(ExtractConfig, renderer=pydoc.plaintext)
    assert "Run the frozen backbone once over every split" in text
    assert "image_px: Side of the network's square input in pixels. By default" in text
    for kind in (ExtractConfig, PredictConfig, ReportConfig, FinetuneConfig, TrainHeadConfig):
        for field in dataclasses.fields(kind):
            assert f"    {field.name}: " in kind.__doc__


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("IMG_", "'IMG_': give a regular expression of at most 500 characters with a capture "),
        ("(a" * 300 + ")" * 300, "give a regular expression of at most 500 characters"),
        ("(\n)", "give a regular expression of at most 500 characters"),
        ("(", "'(' is not a regular expression: missing ), unterminated subpattern"),
    ],
)
def test_an_expression_for_groups_has_a_capture_group(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        ExtractConfig(dataset="digits", group_from=pattern)
    assert ExtractConfig(dataset="digits", group_from=r"(\d)").group_from == r"(\d)"

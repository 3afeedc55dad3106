"""Export: the file computes what torch computes, says what it is, or is not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_helpers import picture
from featcache import cli
from featcache.cache import FeatureCache
from featcache.config import ExportConfig
from featcache.data import to_pixels
from featcache.errors import FeatcacheError, StorageError, UserError
from featcache.export import command as export_run
from featcache.export import export
from featcache.export.graph import ClassifierGraph, head_layer
from featcache.files import check_outputs
from featcache.heads import Decision
from featcache.predict import Classifier, load_classifier
from trained_helpers import knn_head, linear_head, make_model, write_head

NUMBERS = (3, 300, 700, 1001, 5000, 9, 77)


@pytest.fixture(scope="module")
def classifier(head_file: Path) -> Classifier:
    return Classifier.load(head_file, workers=0)


@pytest.fixture(scope="module")
def exported(head_file: Path) -> dict[str, Any]:
    """The head and its backbone as ONNX, under the name that is chosen where none is given."""
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    return export(ExportConfig(model=head_file))


def pixels_of(classifier: Classifier) -> np.ndarray:
    return np.stack([to_pixels(picture(n), classifier.preprocessing) for n in NUMBERS])


def onnx_session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


class TestOnnx:
    def test_report(self, exported: dict[str, Any], head_file: Path) -> None:
        assert exported["output"] == str(head_file.with_suffix(".onnx"))
        assert 0 <= exported["max_difference"] < 1e-4
        assert exported["max_relative_difference"] < 1e-5
        assert exported["file_bytes"] == head_file.with_suffix(".onnx").stat().st_size
        assert exported["input"]["shape"] == ["batch", 32, 32, 3]
        assert json.loads(json.dumps(exported))["num_checked"] == 9
        text = "\n".join(export_run.summary_lines(exported))
        assert "worst difference from torch" in text
        assert "pixels uint8 [batch, 32, 32, 3] to logits and probabilities" in text

    @pytest.mark.parametrize("num", [1, 2, 7])
    def test_it_predicts_as_featcache_does(
        self, exported: dict[str, Any], classifier: Classifier, num: int
    ) -> None:
        wanted = classifier.predict_proba([picture(n) for n in NUMBERS[:num]])
        session = onnx_session(exported["output"])
        logits, got = session.run(None, {"pixels": pixels_of(classifier)[:num]})
        assert got.shape == logits.shape == (num, 2)
        assert np.abs(got - wanted).max() < 1e-5
        assert np.ptp(logits) > 0.5 or num == 1

    def test_it_says_what_it_is(self, exported: dict[str, Any], classifier: Classifier) -> None:
        session = onnx_session(exported["output"])
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["class_names"]) == classifier.class_names == ["cat", "dog"]
        prep = json.loads(about["preprocessing"])
        assert prep == json.loads(json.dumps(classifier.preprocessing.to_dict()))
        provenance = json.loads(about["provenance"])
        assert provenance["trained_on"] == classifier.provenance
        assert provenance["solver"] == "logistic"
        assert "already resized" in json.loads(about["input"])["what"]
        assert about["featcache_version"]
        check_outputs({Path(exported["output"]): export_run.MARKS})  # may be written again
        (taken,) = session.get_inputs()
        assert (taken.name, taken.type, taken.shape) == (
            "pixels", "tensor(uint8)", ["batch", 32, 32, 3]
        )  # fmt: skip
        assert [(o.name, o.shape) for o in session.get_outputs()] == [
            ("logits", ["batch", 2]),
            ("probabilities", ["batch", 2]),
        ]

    def test_it_is_sound_and_holds_no_source_paths(self, exported: dict[str, Any]) -> None:
        import onnx

        onnx.checker.check_model(exported["output"], full_check=True)
        data = Path(exported["output"]).read_bytes()
        assert os.path.dirname(torch.__file__).encode() not in data
        assert b"featcache/export/graph.py" not in data


def test_a_model_as_torch_export(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, file = make_model(root / "model.safetensors"), tmp_path / "out.pt2"
    words = ["export", str(model), "--output", str(file), "--input", "float", "--json"]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_difference"] < 1e-5
    assert report["input"]["shape"] == ["batch", 3, 32, 32]
    assert os.listdir(tmp_path) == ["out.pt2"]
    check_outputs({file: export_run.MARKS})  # may be written again
    about = {"featcache.json": ""}
    module = torch.export.load(file, extra_files=about).module()
    assert json.loads(about["featcache.json"])["class_names"] == ["cat", "dog", "eel"]
    classifier = Classifier.load(model, workers=0)
    prep = classifier.preprocessing
    scaled = torch.from_numpy(pixels_of(classifier)).permute(0, 3, 1, 2) / 255
    images = (scaled - prep.mean[0]) / prep.std[0]
    with torch.inference_mode():
        _, got = module(images)
    wanted = classifier.predict_proba([picture(n) for n in NUMBERS])
    assert np.abs(got.numpy() - wanted).max() < 1e-5


class TestGraph:
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_neighbours_vote_as_the_head_says(
        self, cache: FeatureCache, metric: str, weighted: bool
    ) -> None:
        head = knn_head(cache, metric)
        if weighted:
            head = head.replace(row_weights=np.linspace(0.5, 2, len(head.rows)))
        X = np.concatenate([cache.split("test").X, head.rows[:3], np.zeros((1, 512), np.float32)])
        got = head_layer(head)(torch.from_numpy(X)).softmax(1).numpy()
        assert np.abs(got - head.predict_proba(X)).max() < 1e-4

    def test_a_head_in_double_precision(self, cache: FeatureCache) -> None:
        head = linear_head(cache)
        double = head.replace(weight=head.weight.astype(float), bias=head.bias.astype(float))
        X = cache.split("test").X
        got = head_layer(double)(torch.from_numpy(np.array(X))).detach().numpy()
        wanted = head.decision_function(X)
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()

    def test_probabilities_have_the_heads_temperature(
        self, cache: FeatureCache, head_file: Path
    ) -> None:
        decision = Decision(temperature=2.5)
        for head in (linear_head(cache), knn_head(cache, "cosine")):
            trained = dataclasses.replace(
                load_classifier(head_file), head=head.replace(decision=decision)
            )
            graph = ClassifierGraph(trained, takes_pixels=True)
            classifier = Classifier(trained, workers=0)
            with torch.inference_mode():
                _, got = graph(torch.from_numpy(pixels_of(classifier)))
            wanted = classifier.predict_proba([picture(n) for n in NUMBERS])
            assert np.abs(got.numpy() - wanted).max() < 1e-5
            about = export_run.describe(trained, ExportConfig(model=head_file))
            assert about["provenance"]["decision"]["temperature"] == 2.5

    def test_differences_are_found(self, classifier: Classifier) -> None:
        graph = ClassifierGraph(classifier.trained, takes_pixels=True)
        batch = torch.from_numpy(pixels_of(classifier))
        with torch.inference_mode():
            logits, probabilities = (out.numpy() for out in graph(batch))
        off = logits.copy()
        off[2, 1] += 0.5
        worst, relative = export_run.differences(graph, lambda _: [off, probabilities], [batch])
        assert worst == pytest.approx(0.5, abs=1e-5)
        assert relative == pytest.approx(0.5 / np.abs(logits).max(), rel=1e-4)
        for broken in (logits * np.nan, logits[:3]):
            bad = export_run.differences(graph, lambda _, b=broken: [b, probabilities], [batch])
            assert bad == (float("inf"), float("inf"))


class TestRefusals:
    def settings(self, head_file: Path, tmp_path: Path, name: str = "x.pt2") -> ExportConfig:
        return ExportConfig(model=head_file, output=tmp_path / name)

    @pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
    def test_missing_packages(
        self,
        missing: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        assert cli.main(["export", "head.safetensors", "--output", str(tmp_path / "x.onnx")]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert f"needs the package {missing}" in err
        assert 'pip install "featcache[export]"' in err

    def test_a_file_that_is_off_is_not_kept(
        self, head_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.settings(head_file, tmp_path)
        config.output.write_text("the stranger's")
        with pytest.raises(UserError, match=r"x\.pt2 exists and was not written by this"):
            export(config)
        older = "featcache_version: the older one"
        config.output.write_text(older)
        for name in ("capture", "pt2_runner"):
            monkeypatch.setattr(export_run, name, lambda *args: None)
        monkeypatch.setattr(export_run, "pt2_bytes", lambda *args: b"graph")
        monkeypatch.setattr(export_run, "differences", lambda *args: (0.3, 0.1))
        with pytest.raises(FeatcacheError, match=r"was not kept: .* off by 3\.0e-01 \(1\.0e-01 of"):
            export(config)
        assert config.output.read_text() == older
        assert os.listdir(tmp_path) == ["x.pt2"]

    def test_a_network_that_defeats_the_exporter(
        self, head_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise ValueError("no such operator\nand a long story")

        monkeypatch.setattr(export_run, "capture", fail)
        with pytest.raises(FeatcacheError) as caught:
            export(self.settings(head_file, tmp_path))
        assert str(caught.value).startswith(
            "resnet18 cannot be exported (ValueError: no such operator)"
        )
        assert caught.value.exit_code == 1

    def test_a_disk_that_is_full(
        self, head_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(export_run, "capture", lambda *args: None)
        monkeypatch.setattr(export_run, "pt2_bytes", lambda *args: b"graph")
        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(StorageError, match="No space left"):
            export(self.settings(head_file, tmp_path))
        assert os.listdir(tmp_path) == []

    def test_other_names_of_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"ends in \.onnx, or in \.pt2"):
            ExportConfig(model=tmp_path, output=tmp_path / "x.pb")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "euclidean", "model", "squeezenet1_1"])
def test_every_kind_of_classifier_as_onnx(kind: str, cache: FeatureCache, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    file = tmp_path / "x.safetensors"
    if kind in ("cosine", "euclidean"):
        write_head(file, knn_head(cache, kind))
    else:
        make_model(file, backbone="resnet18" if kind == "model" else kind)
    report = export(ExportConfig(model=file, input="float"))
    assert report["max_relative_difference"] < 1e-4
    classifier = Classifier.load(file, workers=0)
    session = onnx_session(report["output"])
    from featcache.data import normalize

    images = normalize(torch.from_numpy(pixels_of(classifier)), classifier.preprocessing)
    _, got = session.run(None, {"images": images.contiguous().numpy()})
    wanted = classifier.predict_proba([picture(n) for n in NUMBERS])
    assert np.abs(got - wanted).max() < 1e-4

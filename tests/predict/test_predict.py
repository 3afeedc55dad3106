"""Prediction: the trained network and no other, every picture accounted for, files that parse."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_helpers import HUES, draw, encoded, picture
from featcache import Classifier, cli
from featcache.backbone import build_classifier, file_sha256
from featcache.cache import FeatureCache
from featcache.config import BackboneConfig, ExtractConfig, Format, PredictConfig, TrainHeadConfig
from featcache.data import normalize, to_pixels
from featcache.errors import CacheError, StorageError, UserError, visible
from featcache.extract import extract
from featcache.files import check_outputs
from featcache.heads import Decision, check_head_fits, load_head, train_head
from featcache.heads.linear import KnownRows, Threshold, nearest_distance, unit_rows
from featcache.predict import predict
from featcache.predict.classifier import Prediction
from featcache.predict.load import load_classifier
from featcache.predict.pictures import find_pictures
from featcache.predict.writers import MARKS, prediction_writer
from featcache.tensor_files import read_tensor_file
from trained_helpers import (
    PREP,
    knn_head,
    linear_head,
    make_model,
    write_head,
)


@pytest.fixture(scope="module")
def classifier(head_file: Path) -> Classifier:
    return Classifier.load(head_file, workers=1)


@pytest.fixture(scope="module")
def by_file(root: Path, cache: FeatureCache) -> tuple[Path, Path]:
    """A head on weights by file, with the file beside it."""
    folder = root / "by_file"
    folder.mkdir()
    network = build_classifier(BackboneConfig(weights="random"), 1000, 42)
    save_file(network.state_dict(), folder / "mine.safetensors")
    sha256 = file_sha256(folder / "mine.safetensors")
    head = write_head(
        folder / "head.safetensors",
        linear_head(cache),
        weights="mine.safetensors",
        weights_sha256=sha256,
    )
    return head, folder / "mine.safetensors"


@pytest.fixture
def loaded(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """Let the command use the classifier that is there instead of loading it again."""
    monkeypatch.setattr(Classifier, "load", lambda *args, **settings: classifier)
    return classifier


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["predict", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


class TestSamePath:
    def test_a_train_picture_scores_as_its_cached_row(
        self,
        root: Path,
        cache: FeatureCache,
        head_file: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        split = cache.split("train")
        wanted = linear_head(cache).predict_proba(split.X)
        code, out, err = run(capsys, head_file, root / "pets" / "train", "--topk", 2, "--json")
        assert code == 0
        report = json.loads(out)
        assert "16 of 16 images classified" in err
        assert [p["path"] for p in report["predictions"]] == [
            str(root / "pets" / name) for name in split.ids
        ]
        names = cache.class_names
        got = [[{t["label"]: t["probability"] for t in p["topk"]}[n] for n in names]
               for p in report["predictions"]]  # fmt: skip
        assert np.abs(np.array(got) - wanted).max() < 1e-5
        assert np.ptp(wanted) > 0.5  # the pictures do differ
        for prediction, row in zip(report["predictions"], wanted, strict=True):
            assert prediction["label"] == names[row.argmax()]
            assert prediction["probability"] == prediction["topk"][0]["probability"]

    def test_from_train_head_to_prediction(self, cache: FeatureCache, root: Path) -> None:
        settings = {"C": 1.0, "output": root / "fitted.safetensors"}
        report = train_head(TrainHeadConfig(cache=cache.path, **settings))
        test, head = cache.split("test"), load_head(report["head"])
        classifier = Classifier.load(report["head"])
        got = classifier.predict_proba([root / "pets" / name for name in test.ids])
        assert np.abs(got - head.predict_proba(test.X)).max() < 1e-5
        assert classifier.provenance["dataset"]["fingerprint"] == cache.meta.dataset.fingerprint

    def test_a_threshold_decides(self, cache: FeatureCache, root: Path, head_file: Path) -> None:
        threshold = Threshold(
            positive=0, probability=0.01, wanted="recall", level=0.9, precision=0.5, recall=0.9
        )
        head = linear_head(cache).replace(decision=Decision(threshold=threshold))
        trained = dataclasses.replace(load_classifier(head_file), head=head)
        pictures = [root / "pets" / name for name in cache.split("train").ids]
        found = Classifier(trained, workers=0).predict(pictures, topk=2)
        shares = head.predict_proba(cache.split("train").X)[:, 0]
        assert 0 < np.sum(shares < 0.01) < np.sum(shares < 0.5)  # the threshold matters
        for prediction, share in zip(found, shares, strict=True):
            first = 0 if share >= 0.01 else 1
            assert prediction.label == cache.class_names[first]
            wanted = share if first == 0 else 1 - share
            assert prediction.probability == pytest.approx(wanted, abs=1e-5)
            assert prediction.topk[1][0] == cache.class_names[1 - first]

    def test_strange_images_are_unknown(
        self,
        cache: FeatureCache,
        root: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """The head knows train images only: those are usual, noise is not."""
        train = cache.split("train")
        head = linear_head(cache)
        sure = head.predict_proba(train.X).max(axis=1)
        known = KnownRows.ranking(unit_rows(train.X), sure, np.full(16, 1e-3))
        path = write_head(tmp_path / "known.safetensors", head.replace(known=known))
        classifier = Classifier.load(path, workers=0)
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        usual = classifier.predict([root / "pets" / name for name in train.ids], reject=0.06)
        assert [found.unknown for found in usual].count(True) <= 1
        found = classifier.predict(noise, reject=0.5)[0]
        plain = classifier.predict(noise)[0]
        assert (found.label, found.unknown) == ("unknown", True)
        assert found.probability == plain.probability
        assert found.topk == plain.topk
        assert plain.p_value is None
        distance = nearest_distance(known.rows.astype(np.float32), classifier.features(noise))
        assert distance > 1e-3
        Image.fromarray(noise).save(tmp_path / "noise.png")
        ask = [path, tmp_path / "noise.png", "--reject", 0.5]
        code, out, err = run(capsys, *ask, "--format", "csv")
        assert code == 0
        assert "1 of 1 images classified, 1 of them unknown, in" in err
        header, row = csv.reader(out.splitlines())
        assert header == ["path", "label", "probability", "likeliest", "p_value"]
        assert row[1] == "unknown"
        assert row[3] == plain.label
        assert float(row[4]) == found.p_value
        assert re.search(rf"unknown +\(p 0\.\d+\), else +{plain.label} ", run(capsys, *ask)[1])
        report = json.loads(run(capsys, *ask, "--json")[1])
        assert report["num_unknown"] == 1
        assert report["predictions"][0]["p_value"] == found.p_value

    def test_rejecting_needs_what_the_head_may_lack(
        self, cache: FeatureCache, head_file: Path, tmp_path: Path
    ) -> None:
        picture = np.zeros((8, 8), np.uint8)
        with pytest.raises(UserError, match=r"reject: .* kept no held-out rows and cannot tell"):
            Classifier.load(head_file).predict(picture, reject=0.05)
        model = make_model(tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"reject: .* is a fine-tuned model and cannot tell"):
            Classifier.load(model).predict(picture, reject=0.05)
        known = KnownRows.ranking(
            unit_rows(cache.split("train").X), np.linspace(0.5, 1, 9), np.linspace(0, 1, 9)
        )
        few = write_head(tmp_path / "few.safetensors", linear_head(cache).replace(known=known))
        with pytest.raises(UserError, match="has 9 held-out rows to compare with: give a share fr"):
            Classifier.load(few).predict(picture, reject=0.05)
        called = linear_head(cache).replace(known=known, class_names=["cat", "unknown"])
        path = write_head(tmp_path / "called.safetensors", called)
        with pytest.raises(UserError, match="has a class 'unknown': leave"):
            Classifier.load(path).predict(picture, reject=0.2)

    def test_features_are_rounded_as_the_cache_rounded_them(
        self, cache: FeatureCache, classifier: Classifier, root: Path
    ) -> None:
        half = Classifier(dataclasses.replace(classifier.trained, dtype="float16"), workers=0)
        half._engine = classifier.engine(1)
        paths = [root / "pets" / name for name in cache.split("train").ids]
        rounded = cache.split("train").X.astype(np.float16)
        wanted = linear_head(cache).predict_proba(rounded)
        assert np.abs(half.predict_proba(paths) - wanted).max() < 1e-3

    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_neighbours_vote(
        self, cache: FeatureCache, classifier: Classifier, metric: str
    ) -> None:
        head = knn_head(cache, metric)
        voting = Classifier(dataclasses.replace(classifier.trained, head=head), workers=1)
        voting._engine = classifier.engine(1)
        pictures = [cache.path.parents[1] / "pets" / name for name in cache.split("test").ids]
        wanted = head.predict_proba(cache.split("test").X)
        assert np.abs(voting.predict_proba(pictures) - wanted).max() < 1e-4

    def test_a_model_scores_as_its_network(self, root: Path) -> None:
        file = make_model(root / "model.safetensors")
        network = build_classifier(BackboneConfig(weights="random"), 3, 0).eval()
        network.load_state_dict(read_tensor_file(file).tensors())
        pictures = [picture(n) for n in (3, 700)]
        pixels = np.stack([to_pixels(p, PREP) for p in pictures])
        with torch.inference_mode():
            wanted = network(normalize(torch.from_numpy(pixels), PREP)).softmax(1).numpy()
        classifier = Classifier.load(file)
        assert np.abs(classifier.predict_proba(pictures) - wanted).max() < 1e-5
        assert [p.label for p in classifier.predict(pictures)] == [
            classifier.class_names[row.argmax()] for row in wanted
        ]
        assert classifier.preprocessing == PREP


class TestLibrary:
    def test_one_or_many_paths_or_pictures(self, root: Path, classifier: Classifier) -> None:
        path = root / "pets" / "train" / "cat" / "000.png"
        (row,) = classifier.predict_proba(path)
        assert row.shape == (2,)
        assert row.dtype == np.float32
        assert abs(row.sum() - 1) < 1e-6
        with Image.open(path) as opened:
            for same in (str(path), [path], (p for p in [path]), opened, [opened, opened, path]):
                assert np.abs(classifier.predict_proba(same) - row).max() < 1e-6
        assert classifier.predict_proba([]).shape == (0, 2)
        (best,) = classifier.predict(path, topk=9)
        assert best.probability == max(best.topk[0][1], best.topk[1][1]) == row.max()
        assert [name for name, _ in best.topk] == [
            classifier.class_names[i] for i in (-row).argsort()
        ]

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
    def test_an_opened_picture_counts_as_its_file(
        self, kind: str, tmp_path: Path, classifier: Classifier
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        image = Image.fromarray(np.arange(40 * 24 * 3, dtype=np.uint8).reshape(24, 40, 3))
        (tmp_path / "x").write_bytes(encoded(image, kind, exif=exif))
        (by_path,) = classifier.predict_proba(tmp_path / "x")
        with Image.open(tmp_path / "x") as opened:
            assert np.abs(classifier.predict_proba(opened)[0] - by_path).max() < 1e-6
        upright = image.transpose(Image.Transpose.ROTATE_270)
        if kind != "JPEG":
            assert np.abs(classifier.predict_proba(upright)[0] - by_path).max() < 1e-6

    def test_any_mode_is_accepted(self, classifier: Classifier) -> None:
        rgb = picture(9).convert("L").convert("RGB")
        pictures = [rgb, rgb.convert("L"), rgb.convert("RGBA")]
        first, *rest = classifier.predict_proba(pictures)
        assert all(np.abs(row - first).max() < 1e-6 for row in rest)

    def test_every_form_of_a_picture_counts_the_same(
        self, root: Path, classifier: Classifier
    ) -> None:
        path = root / "pets" / "train" / "cat" / "000.png"
        data, array = path.read_bytes(), np.asarray(Image.open(path).convert("RGB"))
        (row,) = classifier.predict_proba(path)
        with path.open("rb") as opened:
            forms = [data, bytearray(data), memoryview(data), io.BytesIO(data), array, opened]
            rows = [classifier.predict_proba(form) for form in forms]
        opaque = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
        rows.append(classifier.predict_proba(opaque))
        assert all(len(one) == 1 and np.abs(one - row).max() < 1e-6 for one in rows)
        many = classifier.predict_proba(np.stack([array, array[:, ::-1]]))
        assert np.abs(many - classifier.predict_proba([array, array[:, ::-1]])).max() < 1e-6
        gray = array[..., 0]
        first, second = classifier.predict_proba([gray, gray[..., None]])
        assert np.abs(first - second).max() < 1e-6

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            (
                np.zeros((3, 4, 4), np.float32),
                r"picture 0 is an array float32 \[3, 4, 4\]: give uint8",
            ),
            (np.zeros((3, 4, 5), np.uint8), r"an array uint8 \[3, 4, 5\]"),
            (io.StringIO("x"), "picture 0 is a str: give a path"),
            (7, "not an image but int: give a path"),
            (b"no picture", "picture 0: not an image"),
        ],
    )
    def test_other_forms_are_refused(
        self, wrong: object, told: str, classifier: Classifier
    ) -> None:
        with pytest.raises(UserError, match=told):
            classifier.predict(wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_features_are_those_of_the_cache(
        self, dtype: str, cache: FeatureCache, classifier: Classifier, root: Path
    ) -> None:
        split = cache.split("train")
        one = Classifier(dataclasses.replace(classifier.trained, dtype=dtype), workers=1)
        with Image.open(root / "pets" / split.ids[0]) as opened:
            found = one.features(opened)
        assert (found.shape, found.dtype) == ((1, split.dim), np.float32)
        wanted, _ = split[0]
        assert np.abs(found[0] - wanted.astype(dtype)).max() < 1e-5 * np.abs(wanted).max()

    def test_a_head_decodes_as_its_cache_did(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                draw(folder := tmp_path / "pets" / split / name, 3, HUES[name], seed=1)
                for path in folder.iterdir():
                    image = Image.open(path).resize((160, 120), Image.Resampling.BICUBIC)
                    image.save(path.with_suffix(".jpg"), quality=90)
                    path.unlink()
        options = {"weights": "random", "image_px": 32, "cache_dir": tmp_path, "workers": 1}
        ask = ExtractConfig(dataset=str(tmp_path / "pets"), **options)
        plain, fast = (
            FeatureCache(Path(extract(dataclasses.replace(ask, fast_decode=on))["cache"]))
            for on in (False, True)
        )
        assert plain.path != fast.path
        one = Classifier.load(write_head(tmp_path / "h.safetensors", linear_head(fast)), workers=1)
        for row in range(3):
            found = one.features(tmp_path / "pets" / fast.split("train").ids[row])[0]
            np.testing.assert_allclose(found, fast.split("train")[row][0], rtol=1e-4, atol=1e-5)
            assert np.abs(found - plain.split("train")[row][0]).max() > 1e-3
        with pytest.raises(CacheError, match=r"preprocessing\.fast_decode True, these have None"):
            check_head_fits(linear_head(fast), plain.meta)

    def test_a_model_has_no_features_to_give(self, tmp_path: Path) -> None:
        model = Classifier.load(make_model(tmp_path / "m.safetensors"))
        with pytest.raises(UserError, match="is a fine-tuned model, which gives classes only"):
            model.features(picture(1))

    def test_errors_name_what_python_calls_it(self, head_file: Path) -> None:
        with pytest.raises(UserError, match=r"^device=.mps.: this machine has none; use"):
            Classifier.load(head_file, device="mps")

    def test_what_cannot_be_read_raises(self, tmp_path: Path, classifier: Classifier) -> None:
        (tmp_path / "bad.png").write_bytes(encoded(picture(1))[:60])
        with pytest.raises(UserError, match=r"bad\.png: truncated"):
            classifier.predict([picture(1), tmp_path / "bad.png"])
        with pytest.raises(UserError, match=r"no\.png: missing"):
            classifier.predict(tmp_path / "no.png")
        with Image.open(io.BytesIO(encoded(picture(1))[:60])) as cut:
            with pytest.raises(UserError, match="picture 0: truncated"):
                classifier.predict(cut)
        with pytest.raises(UserError, match="picture 1 is a int: give a path, a PIL image"):
            classifier.predict([picture(1), 3])  # type: ignore[list-item]
        with pytest.raises(UserError, match="0x0 px"):
            classifier.predict(Image.new("RGB", (0, 0)))

    def test_torchs_threads_stay_the_callers(self, classifier: Classifier) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            Classifier(classifier.trained).predict(picture(1))
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("shared", [True, False])
    def test_eight_threads_beside_another_network(
        self, shared: bool, head_file: Path, classifier: Classifier
    ) -> None:
        pictures = [picture(i) for i in range(20)]
        wanted = classifier.predict_proba(pictures)
        other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        x, done = torch.ones(1, 3, 8, 8), threading.Event()
        usual = other(x)
        one = Classifier.load(head_file, workers=1)

        def beside() -> bool:
            return all(torch.equal(other(x), usual) for _ in iter(done.is_set, True))

        def classify(_: int) -> np.ndarray:
            mine = one if shared else Classifier.load(head_file, workers=1)
            return mine.predict_proba(pictures)

        with ThreadPoolExecutor(9) as pool:
            undisturbed = pool.submit(beside)
            try:
                found = list(pool.map(classify, range(8)))
            finally:
                done.set()
            assert undisturbed.result()
        assert all(np.abs(rows - wanted).max() < 1e-6 for rows in found)

    def test_a_used_classifier_pickles(self, classifier: Classifier) -> None:
        wanted = classifier.predict_proba(picture(1))
        copy = pickle.loads(pickle.dumps(classifier))
        assert np.abs(copy.predict_proba(picture(1)) - wanted).max() < 1e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["loky", "threading"])
    def test_joblib_spreads_predictions(self, backend: str, classifier: Classifier) -> None:
        wanted = classifier.predict([picture(1), picture(2)])
        jobs = (joblib.delayed(classifier.predict)(picture(i)) for i in (1, 2))
        found = joblib.Parallel(n_jobs=2, backend=backend)(jobs)
        assert [p.label for (p,) in found] == [p.label for p in wanted]

    @pytest.mark.parametrize("precision", ["amp", "int8"])
    def test_features_in_another_precision_are_told_of(
        self, precision: str, classifier: Classifier, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Classifier(dataclasses.replace(classifier.trained, precision=precision), device="cpu")
        assert f"in {precision}; they are computed in float32 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 is out of range: give a number between 1 and 65536"),
        ({"workers": -1}, "workers -1 is out of range: give a number between 0 and 1024"),
        ({"device": "gpu"}, "device: .*gpu"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    classifier: Classifier, how: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Classifier(classifier.trained, **how)


class TestCommand:
    def test_unreadable_pictures_are_named_and_left_out(
        self, tmp_path: Path, loaded: Classifier, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.png").write_bytes(encoded(picture(1)))
        (tmp_path / "b.png").write_bytes(b"no picture")
        (tmp_path / "c.png").write_bytes(encoded(picture(2)))
        words = ("head", tmp_path, tmp_path / "gone.png", "--format", "jsonl")
        code, out, err = run(capsys, *words)
        assert code == 1
        rows = [json.loads(line) for line in out.splitlines()]
        assert [Path(row["path"]).name for row in rows] == ["a.png", "c.png"]
        assert f"skipped {tmp_path / 'b.png'}: not an image" in err
        assert f"skipped {tmp_path / 'gone.png'}: missing" in err
        assert "2 of 4 images classified, 2 unreadable and left out" in err
        code, out, err = run(capsys, *words, "--on-error", "fail")
        assert code == 2
        assert "b.png: not an image; repair or remove it" in err
        assert "Traceback" not in err
        code, out, err = run(capsys, *words, "--json")
        report = json.loads(out)
        assert [s["reason"] for s in report["skipped"]] == ["not an image", "missing"]
        assert (report["num_images"], report["num_skipped"], len(report["predictions"])) == (
            4,
            2,
            2,
        )

    def test_table_csv_and_json_lines(
        self, tmp_path: Path, loaded: Classifier, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        names = ['a,"b"\n.png', "plain.png", os.fsdecode(b"\xff\xe9.png"), "\x1b[31mred.png"]
        for number, name in enumerate(names):
            (tmp_path / name).write_bytes(encoded(picture(number)))
        paths = sorted(str(tmp_path / name) for name in names)
        (tmp_path / "notes.txt").write_text("no picture")
        out = {}
        for kind in ("table", "csv", "jsonl"):
            words = ["predict", "head", str(tmp_path), "--format", kind, "--topk", "2"]
            assert cli.main(words) == 0
            out[kind] = capsysbinary.readouterr().out
        lines = [json.loads(line) for line in out["jsonl"].splitlines()]
        assert [line["path"] for line in lines] == paths
        text = io.StringIO(os.fsdecode(out["csv"]), newline="")
        header, *rows = csv.reader(text)
        assert header == ["path", "label", "probability", "label_2", "probability_2"]
        assert [row[0] for row in rows] == paths
        for line, row in zip(lines, rows, strict=True):
            assert row[1:3] == [line["label"], str(line["probability"])]
            assert row[3] == line["topk"][1]["label"]
        table = out["table"].decode().splitlines()
        assert table[0].split() == ["picture", "label", "probability"]
        assert len(table) == 5
        assert b"\x1b" not in out["table"]
        assert any(r"\x1b[31mred.png" in row for row in table)

    def test_json_is_one_object_whatever_the_names(
        self, tmp_path: Path, loaded: Classifier, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = os.fsencode(tmp_path) + b"/caf\xe9.png"
        Path(os.fsdecode(name)).write_bytes(encoded(picture(1)))
        code, out, _ = run(capsys, "head", os.fsdecode(name), "--json")
        assert code == 0
        assert out.isascii()
        report = json.loads(out)
        assert os.fsencode(report["predictions"][0]["path"]) == name
        assert report["exit_code"] == 0
        assert report["provenance"]["trained_on"]["backbone"]["weights"] == "random"
        assert report["provenance"]["preprocessing"]["image_px"] == 32
        assert report["engine"]["device"] == "cpu"

    def test_a_file_appears_whole_or_not_at_all(
        self,
        tmp_path: Path,
        root: Path,
        loaded: Classifier,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, output = root / "pets" / "test", tmp_path / "new" / "out.csv"
        code, out, err = run(capsys, "head", folder, "--output", output)
        assert (code, out) == (0, "")
        assert f"predictions: {output}" in err
        first = output.read_bytes()
        assert first.startswith(b"path,label,probability\n")
        assert first.count(b"\n") == 5
        (tmp_path / "bad.png").write_bytes(b"")
        words = ("head", folder, tmp_path / "bad.png", "--on-error", "fail", "--output", output)
        assert run(capsys, *words)[0] == 2
        assert output.read_bytes() == first

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("featcache.files.os.fsync", full)
        code, _, err = run(capsys, "head", folder, "--output", output)
        assert code == 1
        assert "cannot write" in err
        assert "No space left" in err
        assert output.read_bytes() == first
        assert os.listdir(output.parent) == ["out.csv"]

    def test_what_is_read_is_not_written_over(
        self, tmp_path: Path, root: Path, loaded: Classifier, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture = tmp_path / "picture"
        picture.write_bytes(next((root / "pets" / "test").rglob("*.png")).read_bytes())
        before = picture.read_bytes()
        code, _, err = run(capsys, "head", picture, "--output", picture)
        assert code == 2
        assert "is an input and would be replaced" in err
        assert picture.read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("Makefile", "all:\n\ttrue\n"),
            ("pets.csv", "path,label,split\na.png,cat,train\n"),
            ("captions.jsonl", '{"path": "a.png", "label": "a cat"}\n'),
        ],
    )
    def test_strangers_files_are_not_written_over(
        self, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
    ) -> None:
        output = tmp_path / name
        output.write_text(text)
        code, _, err = run(capsys, "head", root / "pets" / "test", "--output", output)
        assert code == 2
        assert f"{name} exists and was not written by this command" in err
        assert output.read_text() == text

    @pytest.mark.parametrize("output", ["/dev/null", "/dev/stdout"])
    def test_devices_are_not_written_over(
        self, root: Path, capsys: pytest.CaptureFixture[str], output: str
    ) -> None:
        code, _, err = run(capsys, "head", root / "pets" / "test", "--output", output)
        assert code == 2
        assert re.search(r"cannot replace /dev/null: it is not|/dev/stdout is a link", err)

    @pytest.mark.parametrize("kind", ["table", "csv", "jsonl"])
    @pytest.mark.parametrize("topk", [1, 2])
    def test_own_files_are_written_again(
        self, tmp_path: Path, loaded: Classifier, kind: Format, topk: int
    ) -> None:
        output = tmp_path / "out"
        for name in ("a.png", "b,é\n.png"):
            with prediction_writer(kind, output, [name], ["ca", "do"], topk) as write:
                write(name, Prediction(label="ca", probability=0.9, topk=(("ca", 0.9),) * topk))
            check_outputs({output: MARKS})

    def test_a_pipe_as_classifier_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "head.safetensors")
        with pytest.raises(UserError, match="is not an ordinary file"):
            Classifier.load(tmp_path / "head.safetensors")

    def test_broken_disk_names_the_output(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot write"):
            with prediction_writer("csv", tmp_path / "file" / "x.csv", [], ["a"], 1):
                pass

    def test_settings_out_of_range(self, tmp_path: Path) -> None:
        for wrong in ({"topk": 0}, {"batch_size": 0}, {"inputs": ()}, {"inputs": ("",)}):
            with pytest.raises(UserError):
                PredictConfig(**{"model": tmp_path, "inputs": ("x",), **wrong})

    def test_a_spreadsheet_runs_no_cell(self, tmp_path: Path) -> None:
        names = ["=1+1", "+x", "-x", "@x", "\t=1", "a=1", "-1", "+1.5"]
        with prediction_writer("csv", tmp_path / "x.csv", names, names, 1) as write:
            for name in names:
                write(name, Prediction(name, 1.0, [(name, 1.0)]))
        with (tmp_path / "x.csv").open(newline="") as file:
            _, *rows = csv.reader(file)
        quoted = ["'=1+1", "'+x", "'-x", "'@x", "'\t=1", "a=1", "-1", "+1.5"]
        assert rows == [[name, name, "1.0"] for name in quoted]

    @pytest.mark.parametrize("kind", ["table", "csv", "jsonl"])
    def test_a_terminal_gets_no_control_characters(
        self,
        kind: str,
        capsysbinary: pytest.CaptureFixture[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name = "a\x1b[2J\x9b\u202e\n.png"
        for on_terminal in (True, False):
            monkeypatch.setattr(sys.stdout, "isatty", lambda answer=on_terminal: answer)
            with prediction_writer(kind, None, [name], ["x"], 1) as write:
                write(name, Prediction("x", 1.0, [("x", 1.0)]))
            out = capsysbinary.readouterr().out.decode()
            raw = kind == "csv" and not on_terminal
            assert ("\x1b" in out, "\u202e" in out) == (raw, raw)
            assert len(out.splitlines()) == {"jsonl": 1}.get(kind, 2) + 1 * raw

    def test_characters_that_are_none(self) -> None:
        assert visible("früh.png") == "früh.png"
        assert visible("a\nb\udcff") == r"a\nb\udcff"


class TestInputs:
    def test_what_may_not_be_looked_at_is_not_called_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(path: str) -> object:
            raise PermissionError(13, "Permission denied", path)

        with pytest.raises(UserError, match=r"there is no .*gone\.png: give images, folders"):
            find_pictures([f"{tmp_path}/gone.png"])
        monkeypatch.setattr(os, "lstat", denied)
        assert find_pictures(["/secret/a.png"]) == ["/secret/a.png"]

    def test_lists_on_standard_input(self) -> None:
        long = [f"{'x' * 100}/{i}.jpg" for i in range(2000)]
        for names, text in (
            (["a b.jpg", "ü.jpg"], "a b.jpg\r\n\nü.jpg\r\n"),
            (["a\nb.jpg", "c.jpg"], "a\nb.jpg\0c.jpg\0"),
            (long, "\n".join(long)),
            (long, "\0".join(long)),
        ):
            assert find_pictures(["-"], io.BytesIO(text.encode())) == names

    @pytest.mark.parametrize("chunk", [b"x", b"\0"])
    def test_standard_input_without_end_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, chunk: bytes
    ) -> None:
        class Endless(io.BytesIO):
            def read1(self, size: int | None = -1) -> bytes:
                return chunk * (size or 0)

        monkeypatch.setattr("featcache.predict.pictures.MAX_LIST_BYTES", 1 << 20)
        with pytest.raises(
            UserError, match="standard input is not a list of paths: give one a line"
        ):
            find_pictures(["-"], Endless())

    def test_folders_are_walked_in_order(self, tmp_path: Path) -> None:
        wanted = ["a/1.jpg", "a/b/2.PNG", "a.jpg", "z.webp"]
        for name in [*wanted, "a/.hidden.jpg", ".h/3.jpg", "@eaDir/4.jpg", "a/notes.txt"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "a" / "loop").symlink_to(tmp_path)
        top = str(tmp_path)
        assert find_pictures([top]) == sorted(os.path.join(top, name) for name in wanted)
        (tmp_path / "a" / "loop").unlink()
        assert find_pictures([f"{top}/a.jpg", f"{top}/a"]) == [
            f"{top}/{name}" for name in ("a.jpg", "a/1.jpg", "a/b/2.PNG")
        ]

    def test_a_list_on_standard_input(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "y.png").touch()
        listed = b"one.jpg\r\n\n two .jpg\n" + os.fsencode(tmp_path / "d") + b"\ncaf\xe9.png"
        found = find_pictures(["x.jpg", "-"], io.BytesIO(listed))
        assert found == [
            "x.jpg", "one.jpg", " two .jpg", str(tmp_path / "d" / "y.png"), "caf\udce9.png"
        ]  # fmt: skip

    def test_a_list_separated_by_nul(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "y.png").touch()
        listed = b"a\nb.jpg\0c\r\0\0" + os.fsencode(tmp_path / "d") + b"\0~/e.png\0"
        assert find_pictures(["-"], io.BytesIO(listed)) == [
            "a\nb.jpg", "c\r", str(tmp_path / "d" / "y.png"), "~/e.png"
        ]  # fmt: skip

    def test_a_standard_input_that_cannot_be_read(self, tmp_path: Path) -> None:
        with os.fdopen(os.open(os.devnull, os.O_WRONLY), "wb", buffering=0) as file:
            closed = io.FileIO(file.fileno(), "rb", closefd=False)
            with pytest.raises(UserError, match="cannot read standard input: Bad file descriptor"):
                find_pictures(["-"], closed)

    def test_nothing_to_do_is_the_users_mistake(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(UserError, match="no image in"):
            find_pictures([str(tmp_path)])
        with pytest.raises(UserError, match=r"there is no a\.jpg, nor any of 1 others"):
            find_pictures(["a.jpg", "b.jpg"])
        feed(monkeypatch, b"\n")
        code, _, err = run(capsys, "head", "-")
        assert code == 2
        assert "standard input named no image" in err
        assert run(capsys, "head")[0] == 2

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_each_line_is_answered_before_the_next_is_read(
        self,
        root: Path,
        loaded: Classifier,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
    ) -> None:
        pictures = [str(path) for path in sorted((root / "pets" / "train").rglob("*.png"))[:3]]
        coming = [*pictures, str(root / "gone.png")]
        answers: list[tuple[str, str]] = []

        class Dialog(io.BytesIO):
            def read1(self, size: int | None = -1) -> bytes:
                answers.append(capsys.readouterr())
                return coming.pop(0).encode() + b"\n" if coming else b""

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Dialog()))
        code, out, err = run(capsys, "head", "-", "--format", kind)
        assert (code, out) == (1, "")
        assert "3 of 4 images classified, 1 unreadable and left out" in err
        lines = [out.splitlines()[-1] for out, _ in answers[1:4]]
        paths = [json.loads(t)["path"] if kind == "jsonl" else t.split(",")[0] for t in lines]
        assert paths == pictures
        assert answers[4] == ("", f"skipped {root}/gone.png: missing\n")
        at_once = run(capsys, "head", *pictures, "--format", kind)[1]
        assert at_once == "".join(out for out, _ in answers)

    def test_a_dialog_without_a_line(
        self,
        loaded: Classifier,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        feed(monkeypatch, b"")
        code, _, err = run(capsys, "head", "-", "--format", "csv")
        assert code == 2
        assert "standard input named no image" in err

    def test_the_command_reads_the_list(
        self,
        tmp_path: Path,
        loaded: Classifier,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "a.png").write_bytes(encoded(picture(1)))
        feed(monkeypatch, os.fsencode(tmp_path / "a.png") + b"\n")
        code, out, _ = run(capsys, "head", "-", "--format", "csv")
        assert code == 0
        assert out.splitlines()[1].startswith(f"{tmp_path / 'a.png'},")


class TestWeights:
    def test_found_beside_the_head_here_or_where_given(
        self, by_file: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        head, weights = by_file
        monkeypatch.chdir(tmp_path)
        load_classifier(head)
        alone = Path(shutil.copy(head, tmp_path / "moved.safetensors"))
        load_classifier(alone, weights=str(weights))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        sha256 = file_sha256(weights)
        with pytest.raises(UserError, match=rf"mine\.safetensors \(sha256 {sha256}\).*--weights"):
            load_classifier(alone)
        shutil.copy(weights, tmp_path / "here" / "mine.safetensors")
        load_classifier(alone)

    def test_other_weights_are_refused_with_both_hashes(
        self, by_file: tuple[Path, Path], tmp_path: Path
    ) -> None:
        head, weights = by_file
        other = tmp_path / "mine.safetensors"
        save_file({"x": torch.zeros(1)}, other)
        with pytest.raises(CacheError) as caught:
            load_classifier(head, weights=str(other))
        assert file_sha256(weights) in str(caught.value)
        assert file_sha256(other) in str(caught.value)
        alone = Path(shutil.copy(head, tmp_path / "head.safetensors"))
        with pytest.raises(CacheError, match="was trained on weights"):
            load_classifier(alone)

    def test_random_weights_need_their_seed(
        self, head_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(capsys, head_file, head_file, "--seed", 7)
        assert (code, out) == (2, "")
        assert "give extract-features' --seed" in err
        assert len(err.splitlines()) == 1

    def test_bundled_weights_and_a_foreign_hash(self, cache: FeatureCache, tmp_path: Path) -> None:
        head = write_head(tmp_path / "h.safetensors", linear_head(cache), weights="bundled")
        with pytest.raises(CacheError, match="but that of --weights bundled is"):
            load_classifier(head)
        from featcache.backbone import BUNDLED_FILE

        sha256 = file_sha256(BUNDLED_FILE)
        write_head(head, linear_head(cache), weights="bundled", weights_sha256=sha256)
        assert load_classifier(head).describe() == "logistic head on resnet18 (bundled), 32 px crop"


class TestForeignFiles:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "there is no such file"),
            (b"", "is not a safetensors file"),
            (b"hello, world, this is text", "is not a safetensors file"),
        ],
    )
    def test_not_a_classifier(
        self,
        content: bytes | None,
        said: str,
        tmp_path: Path,
        head_file: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if content is not None:
            (tmp_path / "x.safetensors").write_bytes(content)
        code, out, err = run(capsys, tmp_path / "x.safetensors", head_file)
        assert (code, out) == (2, "")
        assert said in err
        assert len(err.splitlines()) == 1

    def test_other_kinds_of_file(self, cache: FeatureCache, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a cache, not a classifier: type train-head"):
            load_classifier(cache.path)
        with pytest.raises(UserError, match="it is a folder; check the path"):
            load_classifier(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="neither a head nor a fine-tuned model"):
            load_classifier(tmp_path / "x.safetensors")

    def test_a_cut_file_is_refused(self, head_file: Path, tmp_path: Path) -> None:
        data = head_file.read_bytes()
        file = tmp_path / "cut.safetensors"
        for size in (9, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            with pytest.raises(UserError):
                load_classifier(file)

    @pytest.mark.parametrize(
        ("backbone", "said"),
        [
            ({"backbone": "resnet81"}, "no backbone 'resnet81'"),
            ({"feature_dim": 7}, "7 features by its provenance, 512 by its tensors"),
            ({"backbone": "resnet50"}, "random weights that --seed 42 draws here"),
            ({"weights": 5}, "does not say which backbone"),
            ({"preprocessing": {"image_px": 32}}, "does not say which backbone"),
            ({"extra": 1}, "does not say which backbone"),
        ],
    )
    def test_provenance_that_does_not_hold(
        self, backbone: dict[str, object], said: str, cache: FeatureCache, tmp_path: Path
    ) -> None:
        file = write_head(tmp_path / "h.safetensors", linear_head(cache), **backbone)
        with pytest.raises(UserError, match=said):
            load_classifier(file)

    def test_a_model_that_does_not_hold(self, tmp_path: Path) -> None:
        file = make_model(tmp_path / "m.safetensors", class_names=["cat", "dog"])
        with pytest.raises(UserError, match="not those of a resnet18 with 2 classes"):
            load_classifier(file)

    def test_a_model_takes_no_weights(self, tmp_path: Path) -> None:
        file = make_model(tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=r"which has its own: leave --weights out$"):
            load_classifier(file, weights="bundled")


def test_the_library_gives_what_the_command_reports(root: Path, loaded: Classifier) -> None:
    config = PredictConfig(model=Path("head"), inputs=(str(root / "pets"),), json=True)
    report = predict(config)
    paths = [p["path"] for p in report["predictions"]]
    assert [p["label"] for p in report["predictions"]] == [p.label for p in loaded.predict(paths)]
    assert json.loads(json.dumps(report))["predictions"] == report["predictions"]

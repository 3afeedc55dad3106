"""Several labels per image, and a number per image, from manifest to predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache import cli
from featcache.cache import FeatureCache
from featcache.config import (
    CompareConfig,
    ExtractConfig,
    FinetuneConfig,
    ReportConfig,
    TrainHeadConfig,
)
from featcache.errors import UserError
from featcache.extract import extract, summary_lines
from featcache.finetune import finetune
from featcache.heads import train_head
from featcache.html_report import write_report
from featcache.predict import Classifier

NAMES = ["blue", "lines", "red"]
NETWORK = {"weights": "random", "image_px": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images with any of three marks, listed with their labels and with their brightness."""
    root = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    lists = {"labels": ["path,labels,split"], "target": ["path,target,split"]}
    for i in range(40):
        pixels = rng.integers(60, 160, (32, 32, 3))
        marks = rng.random(3) < 0.5
        pixels[..., 2] += 90 * marks[0]
        pixels[::4] -= 60 * marks[1]
        pixels[..., 0] += 90 * marks[2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02d}.png")
        split = "test" if i % 4 == 3 else "train"
        names = "|".join(name for name, has in zip(NAMES, marks, strict=True) if has)
        lists["labels"].append(f"{i:02d}.png,{names},{split}")
        lists["target"].append(f"{i:02d}.png,{pixels.mean():.2f},{split}")
    for name, lines in lists.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def caches(folder):
    """The reports of both extractions, by manifest."""
    return {name: extract(config_of(folder, name)) for name in ("labels", "target")}


def config_of(folder, name):
    dataset = str(folder / f"{name}.csv")
    return ExtractConfig(dataset=dataset, cache_dir=folder / "cache", **NETWORK)


def heads(caches, name, **settings):
    return train_head(TrainHeadConfig(cache=caches[name]["cache"], **settings))


def test_the_cache_holds_what_the_manifest_says(folder, caches):
    cache = FeatureCache(caches["labels"]["cache"])
    assert cache.class_names == NAMES
    ids, targets = cache.split("test").ids, cache.split("test").targets
    lines = (folder / "labels.csv").read_text().splitlines()
    listed = dict(line.split(",")[:2] for line in lines)
    for name, row in zip(ids, targets, strict=True):
        assert "|".join(label for label, has in zip(NAMES, row, strict=True) if has) == listed[name]
    assert cache.meta.dataset.task == "multilabel"
    assert FeatureCache(caches["target"]["cache"]).split("train").y.dtype == np.float64
    assert "10 test images with any of 3 labels" in "\n".join(summary_lines(caches["labels"]))
    assert "10 test images with a number each" in "\n".join(summary_lines(caches["target"]))


def test_the_same_again_is_a_hit_and_other_labels_are_not(folder, caches):
    assert extract(config_of(folder, "labels"))["hit"]
    header, first, *rest = (folder / "labels.csv").read_text().splitlines()
    other = folder / "other"
    other.mkdir()
    changed = "00.png,,train" if first != "00.png,,train" else "00.png,red,train"
    (other / "labels.csv").write_text("\n".join([header, changed, *rest]))
    with pytest.raises(UserError, match=r"1 relabeled \(train:00\.png\)"):
        extract(
            ExtractConfig(
                dataset=str(other / "labels.csv"),
                image_root=folder,
                output=caches["labels"]["cache"],
                **NETWORK,
            )
        )


def test_predict_gives_labels(folder, caches, tmp_path, capsys):
    report = heads(caches, "labels", output=tmp_path / "h.safetensors")
    pictures = [str(folder / f"{i:02d}.png") for i in range(3)]
    found = Classifier.load(report["head"], weights="random").predict(pictures)
    assert all(one.label == "|".join(one.labels) for one in found)
    assert all(len(one.topk) == 3 for one in found)
    command = ["predict", report["head"], *pictures, "--weights", "random"]
    assert cli.main([*command, "--format", "csv", "--output", str(tmp_path / "p.csv")]) == 0
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "path,labels,blue,lines,red"
    assert [line.split(",")[1] for line in lines[1:]] == [one.label for one in found]
    assert cli.main([*command, "--format", "csv", "--output", str(tmp_path / "p.csv")]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--format", "jsonl"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["labels"] == list(found[0].labels)
    assert first["probabilities"] == dict(found[0].topk)
    assert cli.main([*command]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["picture", "labels", "probabilities"]
    assert cli.main([*command, "--topk", "2"]) == 2
    assert "--topk is for one class per image" in capsys.readouterr().err


def test_predict_gives_numbers(folder, caches, tmp_path, capsys):
    report = heads(caches, "target", output=tmp_path / "h.safetensors")
    picture = str(folder / "03.png")
    classifier = Classifier.load(report["head"], weights="random")
    (found,) = classifier.predict(picture)
    with pytest.raises(UserError, match=r"^reject is for one class per image: leave it out for"):
        classifier.predict(picture, reject=0.1)
    cache = FeatureCache(caches["target"]["cache"])
    expected = classifier.trained.head.predict(cache.split("test").X[:1])
    assert found.value == pytest.approx(float(expected[0]), rel=1e-4)
    assert cli.main(["predict", report["head"], picture, "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "path,value"


def test_finetune_learns_labels_and_predicts_them(folder, tmp_path):
    config = FinetuneConfig(
        dataset=str(folder / "labels.csv"),
        cache_dir=tmp_path,
        epochs=6,
        batch_size=10,
        output=tmp_path / "m.safetensors",
        **NETWORK,
    )
    report = finetune(config)
    assert report["task"] == "multilabel"
    assert report["test_top1"] is None
    losses = [epoch["train_loss"] for epoch in report["epochs"]]
    assert losses[-1] < losses[0]
    assert 0 < report["target_scores"]["mean_average_precision"] <= 1
    assert report["epochs"][-1]["test_map"] == pytest.approx(
        report["target_scores"]["mean_average_precision"]
    )
    (found,) = Classifier.load(report["model"]).predict(str(folder / "00.png"))
    assert [name for name, p in found.topk if p >= 0.5] == list(found.labels)
    assert finetune(config)["hit"]


def test_what_needs_one_class_says_so(folder, tmp_path):
    target, labels = str(folder / "target.csv"), str(folder / "labels.csv")
    with pytest.raises(UserError, match="finetune is for classes and labels; run extract-features"):
        finetune(FinetuneConfig(dataset=target, cache_dir=tmp_path, **NETWORK))
    from featcache.compare import compare

    with pytest.raises(UserError, match="compare is for one class"):
        compare(CompareConfig(dataset=labels, cache_dir=tmp_path, **NETWORK))


def test_the_page_has_a_table_of_each_kind(caches, tmp_path):
    runs = [
        Path(heads(caches, name, output=tmp_path / f"{name}.safetensors")["head"]).with_suffix(
            ".json"
        )
        for name in ("labels", "target")
    ]
    places = {"output": tmp_path / "page.html", "cache_dir": tmp_path}
    report = write_report(ReportConfig(runs=tuple(runs), **places))
    page = Path(report["html"]).read_text()
    for text in ("Several labels per image", "A number per image", "R squared"):
        assert text in page
    for text in ("Labels of cached head, logistic", '<td data-name="mode">cached head, ridge</td>'):
        assert text in page
    assert "There is no feature map" not in page  # the caches are where the reports say
    assert "train-head" in page

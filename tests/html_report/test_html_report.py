"""`featcache report`: what the page shows, whose words are escaped, and which files are refused."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import featcache.html_report.charts as charts_module
import featcache.html_report.report_files as report_files_module
from featcache import cli
from featcache.config import (
    CompareConfig,
    DataConfig,
    FinetuneConfig,
    ReportConfig,
    TrainHeadConfig,
    config_json,
)
from featcache.data import load_dataset
from featcache.errors import UserError
from featcache.html_report import summary_lines, write_report
from featcache.html_report.compared_runs import compared_runs
from featcache.html_report.mistakes import confidently_wrong, confused_pairs
from featcache.html_report.page import make_page
from featcache.html_report.provenance import command_line
from featcache.html_report.render import plain, to_html, to_markdown
from featcache.html_report.report_files import read_report_files
from featcache.results.curve_advice import curve_advice
from featcache.results.curve_json import curve_to_json
from featcache.results.learning_curve import curve_points
from featcache.results.plots import Svg, log_ticks
from run_helpers import (
    HEAD,
    IDS,
    NAMES,
    PROVENANCE,
    TUNE,
    cell_report,
    extraction_json,
    head_report,
    pair,
    predictions,
    save_pair,
    tune_report,
    two_class_report,
)

VOID = {"meta", "link", "img", "br"}


class Outline(HTMLParser):
    """Checks that tags close as they open; collects texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def count(self, tag: str, **attrs: str) -> int:
        wanted = attrs.items()
        return sum(t == tag and wanted <= a.items() for t, a in self.tags)


def report(tmp_path: Path, *runs: Path, **settings: Any) -> tuple[Outline, str, dict[str, Any]]:
    config = ReportConfig(
        runs=runs, output=tmp_path / "page" / "r.html", cache_dir=tmp_path / "c", **settings
    )
    result = write_report(config)
    html = config.output.read_text()
    return Outline(html), config.output.with_suffix(".md").read_text(), result


def test_table_figures_scores_and_origin(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "runs")
    extraction_json(folder / "extract.json")
    (folder / "notes.json").write_text('{"shopping": ["milk"]}')
    page, markdown, result = report(tmp_path, folder)
    assert result["num_files"] == 2
    assert [Path(path).name for path in result["ignored"]] == ["notes.json"]
    for text in (
        "1,539",
        "0.800 [0.49, 0.94]",
        "11,178,051",
        "0.900 [0.60, 0.98]",
        "5.5 s",
        "6.0 s",
    ):
        assert text in page.cells, text
        assert plain(text) in markdown, text
    assert page.count("svg", role="img") == 2  # one figure, wide and narrow
    assert page.count("table", **{"class": "matrix"}) == 2
    assert "cat – dog" in page.cells
    assert "2 (1 + 1)" in page.cells
    assert "28.6%" in page.cells  # 2 of 4 cats and 3 dogs
    for text in ("resnet18, bundled (sha256 abababababab…), 64 px squash", "abacus"):
        assert text in page.cells
    assert "train-head cache/pets.h5" in page.text
    assert "finetune pets --weights bundled --recipe notebook --epochs 2 --lr 0.0001" in page.text
    assert result["advice"][0].startswith("Faster: the cached head, 6.0 s")
    assert "No clear winner on accuracy" in result["advice"][1]
    assert summary_lines(result)[-1].endswith("r.md")


def test_scores_by_class_reliability_and_curves(tmp_path: Path) -> None:
    two_class_report().save(tmp_path / "two.json")
    page, markdown, _ = report(tmp_path, tmp_path / "two.json")
    for cell in (
        "macro F1",
        "calibration error",
        "average precision",
        "share correct",
        "precision",
    ):
        assert cell in page.cells, cell
        assert cell in markdown, cell
    # Of 5 "yes" 4 are found, and one "no" is taken for "yes".
    wanted = ["yes", "5", "0.800", "0.800", "0.800"]
    assert any(page.cells[i : i + 5] == wanted for i in range(len(page.cells)))
    assert page.count("svg", role="img") == 2 * 3  # reliability, ROC, precision-recall
    assert "without the temperature of 1.50, fitted on a held-out 20% of train." in page.text
    place = page.cells.index("predict --reject")
    assert page.cells[place + 3 : place + 6] == ["0.05", "10.0%", "0.889"]
    for title in (
        "Scores by class",
        "Unknown images",
        "Reliability",
        "ROC curve",
        "Precision-recall curve",
    ):
        assert title in page.text
        assert f"**{title}**" in markdown


def test_figures_have_their_numbers_as_tables(tmp_path: Path) -> None:
    page, _, _ = report(tmp_path, save_pair(tmp_path / "runs"))
    folded = ["Parameters and times", "Recall by class", "Show the numbers"]
    assert page.count("details") == len(folded) + 2  # two modes
    assert all(title in page.text for title in folded)
    tune = [c for c in page.cells if c in ("49.5 s", "90.0 s")]  # 9 s before the first epoch
    assert tune[-2:] == ["49.5 s", "90.0 s"] or {"49.5 s", "90.0 s"} <= set(page.cells)


def test_times_are_not_compared_without_the_extraction(tmp_path: Path) -> None:
    page, _, result = report(tmp_path, save_pair(tmp_path / "runs"))
    assert "add the output of extract-features --json" in result["advice"][0]
    assert {"not known", "0.500 s + extraction", "–"} <= set(page.cells)


EXTRACTION = {"seconds": 5.5, "config": {"dataset": "pets", "image_px": 64, "weights": "bundled"}}


def test_extraction_comes_from_the_head_itself(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "runs")
    head_report(more={**head_report().more, "extraction": EXTRACTION}).save(folder / "head.json")
    page, _, result = report(tmp_path, folder)
    row = page.cells[page.cells.index("cached head, logistic") :][:4]
    assert row == ["cached head, logistic", "0.800 [0.49, 0.94]", "6.0 s", "15×"]
    assert page.cells[page.cells.index("1,539") :][:3] == ["1,539", "no epochs", "5.5 s"]
    assert result["advice"][0].startswith("Faster: the cached head, 6.0 s with its extraction")
    commands = page.text[page.text.index("Commands that reproduce these numbers") :].split("\n")
    assert "extract-features pets --weights bundled --image-px 64" in commands


def test_a_hit_or_another_cache_tells_nothing_of_the_extraction(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "runs")
    printed = {"command": "extract-features", "cache": "cache/pets.h5", "seconds_total": 0.2}
    (folder / "hit.json").write_text(json.dumps({**printed, "hit": True}))
    (folder / "other.json").write_text(json.dumps({**printed, "cache_digest": "ab"}))
    page, _, _ = report(tmp_path, folder)
    assert "0.500 s + extraction" in page.cells
    provenance = {**head_report().provenance, "cache_digest": "ab"}
    head_report(provenance=provenance).save(folder / "head.json")
    page, _, _ = report(tmp_path, folder)
    assert "0.200 s" in page.cells


def test_the_best_of_each_kind_comes_first_and_equal_ones_are_folded(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for number in range(7):
        top1 = 0.1 + number / 100
        path = folder / f"a{number}.json"
        head_report(test_top1=top1, test=predictions([number % 3] * 10)).save(path)
        tune = [*TUNE[:number], *[2] * (10 - number)]
        tune_report(test_top1=top1 + 0.1, test=predictions(tune)).save(folder / f"b{number}.json")
    page, markdown, _ = report(tmp_path, folder)
    titles = re.findall("### (.*)", markdown)
    assert titles[0] == plain("cached head, logistic, number 7")
    assert titles[1] == plain("fine-tune (notebook, lr 0.0001), number 7")
    assert titles[2] == plain("fine-tune (notebook, lr 0.0001), number 6")
    assert len(titles) == 6
    same = "Identical predictions: cached head, logistic, number 4; cached head, logistic."
    assert same in page.text
    modes = [attrs for tag, attrs in page.tags if tag == "details" and "name" in attrs]
    assert [mode["name"] for mode in modes] == ["mode"] * 6  # the browser keeps one of them open
    assert ["open" in mode for mode in modes] == [True] + [False] * 5
    assert "the most accurate of each kind" in page.text


def test_lines_of_a_chart_differ_in_colour_and_marker(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for number in range(9):
        tune_report(test_top1=number / 10, test=None).save(folder / f"t{number}.json")
    page, _, _ = report(tmp_path, folder)
    html = (tmp_path / "page" / "r.html").read_text()
    signs = re.findall(r'<svg class="sign".*?</svg>', html, flags=re.DOTALL)
    assert len(signs) == 8
    assert len({re.search(r"var\(--s\d\)", sign)[0] for sign in signs}) == 8
    assert len({re.search(r'<path d="([^"]*Z)"', sign)[1] for sign in signs}) == 8
    assert "The chart shows the first 8 of 9 modes" in page.text
    assert len(re.findall(r"fine-tune \(notebook, lr 0.0001\), number 9", html)) >= 2


def test_runs_are_named_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    config = config_json(TrainHeadConfig(cache=Path("cache/pets.h5")))
    changes = {"a": {}, "b": {"seed": 7, "tta": True}, "c": {"tta": True, "output": "c"}}
    for name, change in changes.items():
        head_report(config={**config, **change}).save(folder / f"{name}.json")
    network = {
        **head_report().provenance["backbone"],
        "preprocessing": {"image_px": 96, "resize": "squash"},
    }
    head_report(provenance={**PROVENANCE, "backbone": network}).save(folder / "d.json")
    page, _, _ = report(tmp_path, folder)
    for text in ("64 px, seed 42", "64 px, tta, seed 7", "64 px, tta, seed 42", "96 px, seed 42"):
        assert f"cached head, logistic, {text}" in page.cells


def test_the_baseline_and_balanced_accuracy_are_lines_of_tables(tmp_path: Path) -> None:
    page, _, _ = report(tmp_path, save_pair(tmp_path / "runs"))
    places = [i for i, c in enumerate(page.cells) if c.startswith("always answering the most")]
    assert [page.cells[place + 1] for place in places] == ["0.400", "0"]
    place = page.cells.index("mean over classes")
    assert page.cells[place + 1 : place + 4] == ["10", "0.806", "0.889"]


def test_no_table_of_pairs_of_classes_is_made(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(100_000)]  # of whose pairs a table takes 80 GB
    head_report(class_names=names).save(tmp_path / "h.json")
    page, _, _ = report(tmp_path, tmp_path / "h.json")
    assert "class 0 – class 1" in page.cells


def test_runs_on_other_test_images_are_not_compared(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "runs")
    others = predictions(HEAD, [f"other/{name}" for name in IDS])
    head_report(test=others).save(folder / "head.json")
    _, _, result = report(tmp_path, folder)
    assert result["advice"] == [
        "These runs were not scored on the same test images, so their accuracies are not compared "
        "here."
    ]


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path: Path) -> None:
    page, _, _ = report(tmp_path, save_pair(tmp_path / "runs"))
    html = (tmp_path / "page" / "r.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert page.count("script") == 0
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("data:", "#"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    targets = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert targets <= set(ids)


EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b`c\n# d & ' </td>"]


def test_words_of_strangers_stay_words(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    ids = [f"{EVIL[i % 3]}{i}" for i in range(10)]
    evil = {
        "class_names": EVIL,
        "test": predictions(HEAD, ids),
        "scored_on": EVIL[0],
        "chosen_on": EVIL[1],
        "environment": {"processor": EVIL[0], "platform": EVIL[1]},
        "provenance": {"dataset": {"name": EVIL[0]}, "backbone": {"weights": EVIL[1]}},
        "config": {"cache": EVIL[0], "solver": EVIL[1]},
        "more": {"solver": EVIL[0], "num_train": 3, "num_test": 10},
    }
    head_report(**evil).save(folder / "a.json")
    tune_report(test=predictions(HEAD, ids)).save(folder / "b.json")
    page, markdown, _ = report(tmp_path, folder, title=EVIL[1])
    html = (tmp_path / "page" / "r.html").read_text()
    assert page.count("script") == page.count("img") == 0
    assert "<script" not in html
    assert "<img" not in html
    assert EVIL[0] in page.cells
    outside_code = re.sub(r"```.*?\n```", "", markdown, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|img)", outside_code)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows
    assert all(line.endswith("|") for line in rows)


def comparison_json(folder: Path, *, finished: bool = True) -> Path:
    for mode in ("cached", "finetune"):
        for size, num in (("2", 6), ("all", 30)):
            path = folder / "runs" / f"{mode}-{size}-draw0.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            cell_report(mode, size, num).save(path)
    if finished:
        points = curve_points([*pair("5", 50, 200, 100), *pair("all", 2000, 350, 450)])
        values = {
            "command": "compare",
            "points": curve_to_json(points),
            "advice": curve_advice(points),
            "notes": ["Mind the gap."],
            "dataset": "pets",
            "config": config_json(CompareConfig(dataset="pets", budget=30.0)),
            "runs": [
                f"runs/{m}-{s}-draw0.json" for m in ("cached", "finetune") for s in ("2", "all")
            ],
        }
        (folder / "compare.json").write_text(json.dumps(values))
    return folder


def test_learning_curve_with_its_modes(tmp_path: Path) -> None:
    folder = comparison_json(tmp_path / "cmp")
    page, markdown, result = report(tmp_path, folder)
    assert result["advice"][1].startswith("The curves cross between 5 per class and all 2,000")
    assert result["sections"][:2] == ["Summary", "Learning curve"]
    assert "Mind the gap." in page.text
    assert "0.900 [0.871, 0.923]" in page.cells
    assert plain("0.900 [0.871, 0.923]") in markdown
    assert page.count("svg", role="img") == 4
    # Of the runs, the two with most images are modes; extraction comes from the comparison.
    assert page.count("table", **{"class": "matrix"}) == 2
    assert "5.5 s" in page.cells
    assert "featcache compare pets --budget 30.0" in page.text


def test_the_comparison_alone_finds_its_runs(tmp_path: Path) -> None:
    folder = comparison_json(tmp_path / "cmp")
    _, _, result = report(tmp_path, folder / "compare.json")
    assert result["num_files"] == 5


def test_a_comparison_names_no_files_elsewhere(tmp_path: Path) -> None:
    folder = comparison_json(tmp_path / "cmp")
    head_report().save(tmp_path / "secret.json")
    values = json.loads((folder / "compare.json").read_text())
    values["runs"] = ["../secret.json", "runs/../../secret.json", str(tmp_path / "secret.json"), 7]
    (folder / "compare.json").write_text(json.dumps(values))
    _, _, result = report(tmp_path, folder / "compare.json")
    assert result["num_files"] == 1


def test_an_unfinished_comparison_is_put_together(tmp_path: Path) -> None:
    folder = comparison_json(tmp_path / "cmp", finished=False)
    head_report().save(folder / "runs" / "mine.json")  # not a run of the comparison
    page, _, result = report(tmp_path, folder)
    assert "Learning curve so far: cmp" in result["sections"]
    assert "This comparison is unfinished: rerun the same compare command" in page.text


def benchmark_json(folder: Path) -> Path:
    row = {
        "mode": "head only (cached features)", "approach": "cached", "trainable_params": 1539,
        "test_top1": 0.8, "test_interval": [0.49, 0.94], "num_test": 10, "seconds_total": 6.0,
        "seconds_per_epoch": 0.1, "images_per_s": 300.0, "extract_seconds": 5.5, "num_epochs": 3,
        "points": [[5.7, 0.7], [5.8, 0.75], [6.0, 0.8]],
    }  # fmt: skip
    tune = {
        **row, "mode": "full fine-tune (lr 0.001)", "approach": "finetune", "test_top1": 0.9,
        "seconds_total": 90.0, "extract_seconds": 0.0, "points": [[45.0, 0.7], [90.0, 0.9]],
    }  # fmt: skip
    values = {
        "command": "benchmark", "rows": [row, tune], "speedup": {}, "dataset": "pets",
        "advice": ["Faster: the cached head."], "notes": ["Seconds are wall time."],
        "typed": "python scripts/benchmark.py pets", "environment": {},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(values))
    head_report().save(folder / "cached-head.json")
    tune_report().save(folder / "finetune-0.001.json")
    return folder


def test_a_benchmark_takes_predictions_from_the_reports_beside_it(tmp_path: Path) -> None:
    """Written by 0.1.0, whose runs have no ids: rows and reports are matched by their figures."""
    page, _, result = report(tmp_path, benchmark_json(tmp_path / "bench"))
    assert result["advice"] == ["Faster: the cached head."]
    assert page.cells.count("head only (cached features)") >= 2
    assert page.count("table", **{"class": "matrix"}) == 2  # and no third and fourth mode
    assert "python scripts/benchmark.py pets" in page.text
    assert page.text.count("5.700 s") + page.cells.count("5.7 s") == 1


def test_a_benchmark_finds_its_runs_by_their_ids(tmp_path: Path) -> None:
    folder = benchmark_json(tmp_path / "bench")
    values = json.loads((folder / "benchmark.json").read_text())
    for row, run in zip(values["rows"], ("a1", "b2"), strict=True):
        row["run"] = run
        row["seconds_total"] += 1  # figures no longer agree
    (folder / "benchmark.json").write_text(json.dumps(values))
    head_report(more={**head_report().more, "run": "a1"}).save(folder / "cached-head.json")
    tune_report(more={**tune_report().more, "run": "c3"}).save(folder / "finetune-0.001.json")
    compared = compared_runs(read_report_files([folder]))
    assert [(run.name, run.report and run.report.more["run"]) for run in compared] == [
        ("head only (cached features)", "a1"),
        ("full fine-tune (lr 0.001)", None),
        ("fine-tune (notebook, lr 0.0001)", "c3"),
    ]
    assert [run.source.name for run in compared] == [
        "benchmark.json",
        "benchmark.json",
        "finetune-0.001.json",
    ]


def test_an_error_names_the_field(tmp_path: Path) -> None:
    folder = benchmark_json(tmp_path / "bench")
    values = json.loads((folder / "benchmark.json").read_text())
    values["rows"][1]["points"][0] = [45.0, 1.5]
    (folder / "benchmark.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"\(rows: points: 1\.5 is not a number from 0 to 1\)"):
        report(tmp_path, folder / "benchmark.json")
    head_report(test_interval=(0.5, 1.5)).save(tmp_path / "h.json")
    with pytest.raises(UserError, match=r"\(test_interval: 1\.5 is not a number from 0 to 1\)"):
        report(tmp_path, tmp_path / "h.json")


def test_runs_on_different_numbers_of_images_say_so(tmp_path: Path) -> None:
    """Of a comparison that ran out of time, fine-tuning may have seen fewer images."""
    cell_report("cached", "all", 300).save(tmp_path / "head.json")
    cell_report("finetune", "5", 50).save(tmp_path / "tune.json")
    names = [run.name for run in compared_runs(read_report_files([tmp_path]))]
    assert names == [
        "cached head, logistic, 300 train images",
        "fine-tune (notebook, lr 0.0001), 50 train images",
    ]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "runs")
    head_report(test_top1=0.7).save(folder / "other.json")
    digits = {**PROVENANCE, "dataset": {"name": "digits"}}
    page, _, _ = report(tmp_path, folder)
    assert {"cached head, logistic", "cached head, logistic, number 2"} <= set(page.cells)
    head_report(provenance=digits).save(folder / "other.json")
    page, _, _ = report(tmp_path, folder)
    assert {"cached head, logistic, pets", "cached head, logistic, digits"} <= set(page.cells)


def test_many_classes_and_perfect_runs(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    names = [f"class {i}" for i in range(60)]
    head_report(class_names=names).save(folder / "many.json")
    right = predictions([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    tune_report(class_names=names, test=right).save(folder / "right.json")
    page, _, _ = report(tmp_path, folder)
    assert "The confusion matrix of 60 classes is too large to show here." in page.text
    assert "Every test image was classified correctly." in page.text


def test_runs_without_predictions_have_no_details(tmp_path: Path) -> None:
    head_report(test=None, class_names=None).save(tmp_path / "h.json")
    page, _, result = report(tmp_path, tmp_path / "h.json")
    assert "Mistakes" not in result["sections"]
    assert page.count("table", **{"class": "matrix"}) == 0


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for index, name in enumerate(IDS):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((24, 40, 3), 25 * index, np.uint8)
        Image.fromarray(pixels).save(path)
        train = root / name.replace("test/", "train/")
        train.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(train)
    return root


def pictures_in(page: Outline) -> list[Image.Image]:
    found = []
    for tag, attrs in page.tags:
        if tag == "img":
            kind, data = (attrs["src"] or "").split(";base64,")
            assert kind == "data:image/jpeg"
            assert attrs["alt"]
            found.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return found


def made_with(folder: Path, images: Path) -> Path:
    """The runs in a folder, as if they had been made with these images."""
    config = DataConfig(dataset=str(images), cache_dir=images.parent / "cache")
    fingerprint = load_dataset(config).fingerprint
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace("cd" * 32, fingerprint))
    return folder


def test_pictures_of_confidently_wrong_images(tmp_path: Path, pets: Path) -> None:
    runs = made_with(save_pair(tmp_path / "runs"), pets)
    page, markdown, _ = report(tmp_path, runs, dataset=str(pets))
    pictures = pictures_in(page)
    # The head's two mistakes, the surer one (image 6) first; then the fine-tune's.
    greys = [int(np.asarray(picture).mean()) for picture in pictures]
    assert greys == pytest.approx([150, 75, 225], abs=3)
    assert all(picture.size == (112, 67) for picture in pictures)
    assert "Test image test/dog/6.png: dog, predicted as cat" in {
        a.get("alt") for _, a in page.tags
    }
    assert plain("cat (0.74); true: dog; test/dog/6.png") in markdown


def test_without_the_dataset_a_sentence_names_them(tmp_path: Path) -> None:
    page, _, _ = report(tmp_path, save_pair(tmp_path / "runs"))
    assert "Most confident mistakes: test/dog/6.png (dog, predicted as cat, 0.74);" in page.text
    assert "Add --dataset to see the images." in page.text


def test_another_dataset_is_refused(tmp_path: Path, pets: Path) -> None:
    shutil.move(pets / IDS[3], pets / "test" / "cat" / "renamed.png")
    with pytest.raises(UserError, match=r"has no test image 'test/cat/3.png'.*omit --dataset"):
        report(tmp_path, save_pair(tmp_path / "runs"), dataset=str(pets))


def test_a_dataset_that_changed_since_the_runs_is_refused(tmp_path: Path, pets: Path) -> None:
    runs = made_with(save_pair(tmp_path / "runs"), pets)
    (pets / IDS[3]).write_bytes((pets / IDS[4]).read_bytes())
    with pytest.raises(UserError, match=r"pets has changed since the runs: .*or omit --dataset"):
        report(tmp_path, runs, dataset=str(pets))


def test_only_pages_are_replaced(tmp_path: Path) -> None:
    runs, readme = save_pair(tmp_path / "runs"), tmp_path / "README.md"
    readme.write_text("# Mine\n")
    config = ReportConfig(runs=(runs,), output=tmp_path / "README.html", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match=r"README\.md exists and was not written by this"):
        write_report(config)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "runs"]
    readme.unlink()
    for _ in range(2):
        write_report(config)
    config.output.write_text("<html>mine</html>")
    with pytest.raises(UserError, match=r"README\.html exists and was not written"):
        write_report(config)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    runs = save_pair(tmp_path / "runs")
    os.mkfifo(runs / "pipe.json")
    (runs / "zero.json").symlink_to("/dev/zero")
    _, _, result = report(tmp_path, runs)
    assert result["num_files"] == 2
    assert [Path(path).name for path in result["ignored"]] == ["pipe.json", "zero.json"]
    with pytest.raises(UserError, match=r"zero\.json: it is not an ordinary file"):
        report(tmp_path, runs / "zero.json")


def refused(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "given.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        report(tmp_path, file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", '"text"', "{}", '{"command": "dance"}', '{"rows": [1]}',
     b"\xff\xfe\x00", '{"command": "compare"}', '{"command": "finetune"}',
     '{"rows": [{"mode": "x"}]}', '{"command": "extract-features"}', "[" * 100_000,
     '{"command": ["finetune"]}'],
)  # fmt: skip
def test_files_that_are_no_reports(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text)


def test_missing_empty_and_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no file or folder .*gone\.json"):
        report(tmp_path, tmp_path / "gone.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no report of a training run in .*empty"):
        report(tmp_path, tmp_path / "empty")
    monkeypatch.setattr(report_files_module, "MAX_BYTES", 10)
    assert "it has more than 10 bytes" in refused(tmp_path, '{"command": "finetune"}')


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value, lists by their first item only."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        found += leaves(value[0], (*path, 0))
    return found


JUNK = [
    "\ud800\0",
    None,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    "x" * 50,
    "",
    [],
    {},
    [[]],
    True,
    10**400,
]


KINDS = ["head", "tune", "scored", "cell", "compare", "benchmark"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, which takes half a second; test_report.py draws the extremes."""
    monkeypatch.setattr(charts_module, "as_svg", lambda make, salt: Svg("0 0 1 1", ""))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("undrawn")
def test_any_value_may_be_junk(tmp_path: Path, kind: str) -> None:
    try_junk(tmp_path, kind, most=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("undrawn")
def test_any_value_may_be_any_junk(tmp_path: Path, kind: str) -> None:
    try_junk(tmp_path, kind, most=len(JUNK))


def try_junk(tmp_path: Path, kind: str, most: int) -> None:
    """A page is made or the file is refused in one line; nothing else happens.

    Every value is replaced by `most` kinds of junk, others for the next value.
    """
    sources = {
        "head": lambda: head_report().save(tmp_path / "s.json"),
        "tune": lambda: tune_report().save(tmp_path / "s.json"),
        "scored": lambda: two_class_report().save(tmp_path / "s.json"),
        "cell": lambda: cell_report("finetune", "2", 6).save(tmp_path / "s.json"),
        "compare": lambda: shutil.copy(
            comparison_json(tmp_path / "x") / "compare.json", tmp_path / "s.json"
        ),
        "benchmark": lambda: shutil.copy(
            benchmark_json(tmp_path / "x") / "benchmark.json", tmp_path / "s.json"
        ),
    }
    sources[kind]()
    values = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "in").mkdir()
    for number, path in enumerate(leaves(values)):
        for junk in (JUNK * 2)[number % len(JUNK) :][:most]:
            changed = copy.deepcopy(values)
            target = changed
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = junk
            file = tmp_path / "in" / "given.json"
            file.write_text(json.dumps(changed))
            try:
                page = make_page(read_report_files([file]), ReportConfig(runs=(file,)))
                Outline(to_html(page))
                to_markdown(page, "r.html")
            except UserError as error:
                assert str(file) in str(error), (path, junk)  # noqa: PT017


def test_confused_pairs_by_hand() -> None:
    counts = np.array([[5, 3, 0], [1, 6, 0], [2, 0, 8]])
    labels, predicted = np.repeat(np.indices((3, 3)).reshape(2, 9), counts.ravel(), axis=1)
    assert confused_pairs(labels, predicted, NAMES) == [
        ["cat – dog", "4 (3 + 1)", "26.7%"],
        ["cat – eel", "2 (0 + 2)", "11.1%"],
    ]


def test_confidently_wrong_by_hand() -> None:
    assert confidently_wrong(predictions(HEAD), 9) == [6, 3]
    assert confidently_wrong(predictions(HEAD), 1) == [6]


def test_ticks_are_round() -> None:
    assert log_ticks(0.9, 30, 8) == pytest.approx([1, 2, 5, 10, 20])
    assert log_ticks(0.001, 100000, 5) == pytest.approx([0.001, 0.1, 10, 1000, 100000])
    assert log_ticks(3.1, 3.2, 5) == pytest.approx([3.1, 3.15, 3.2])
    assert log_ticks(4.9, 16, 8) == pytest.approx([6, 8, 10, 12, 14, 16])


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train-head", TrainHeadConfig(cache=Path("a b.h5"), solver="adam", lr=0.1, tta=True)),
        ("finetune", FinetuneConfig(dataset="pets", resume=False, flip=False, num_train=5)),
        ("compare", CompareConfig(dataset="x", sizes="5,all", weights="bundled", budget=0.5)),
    ],
)
def test_the_command_line_means_the_recorded_settings(command: str, config: Any) -> None:
    import shlex

    words = shlex.split(command_line(command, config_json(config)))
    words = words[words.index(command) + 1 :]
    assert cli.parse(command, type(config), words) == config


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_pair(tmp_path / "runs")
    words = ["report", str(folder), str(folder / "head.json"), "--output", str(tmp_path / "o.html")]
    assert cli.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_files"] == 2
    assert "page: " in err
    assert cli.main(["report", str(folder), "--output", "page.pdf"]) == 2
    assert cli.main(["report"]) == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--enable-logging=stderr --v=0"
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "look"), [(1000, 1), (390, 0)])
def test_in_a_browser(tmp_path: Path, pets: Path, width: int, look: int) -> None:
    """Opens without a complaint, light and dark, and is not an empty sheet."""
    assert CHROMIUM is not None
    folder = made_with(comparison_json(tmp_path / "cmp"), pets)
    report(tmp_path, folder, dataset=str(pets))
    picture = tmp_path / "shot.png"
    out = subprocess.run(
        [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={look}",
         f"--screenshot={picture}", (tmp_path / "page" / "r.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    complaints = [line for line in out.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    pixels = np.asarray(Image.open(picture).convert("RGB"), np.int64)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    assert (ground.mean() < 60) == (look == 0)
    assert (np.abs(pixels - ground).max(axis=2) > 40).mean() > 0.02

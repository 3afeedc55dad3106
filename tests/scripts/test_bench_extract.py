"""The extraction benchmark: its arithmetic by hand, and one tiny run of each mode that is quick."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from conftest import REPO
from data_helpers import make_folder
from featcache.errors import FeatcacheError, UserError


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "scripts")  # as python scripts/bench_extract.py does
        yield importlib.import_module("bench_extract")


def test_a_row_says_how_near_the_bound_is(script: ModuleType) -> None:
    readings = [
        script.Reading(per_s=40.0, per_cpu_s=55.0, detail={"round": 1}),
        script.Reading(per_s=50.0, per_cpu_s=52.0, detail={"round": 2}),
    ]
    row = script._row("bare network", readings, (4e11, 4.4e11), 4e9)
    assert row["images_per_s"] == 50
    assert row["gflops"] == pytest.approx(200)
    assert row["share_of_bound"] == pytest.approx(0.5)
    assert row["share_of_bound_per_cpu_s"] == pytest.approx(0.5)
    assert row["round"] == 2
    product = script._row(
        "matrix product", [script.Reading(per_s=4e11, per_cpu_s=4e11)], (4e11, 4e11), None
    )
    assert (product["images_per_s"], product["gflops"], product["share_of_bound"]) == (None, 400, 1)


def test_a_network_beyond_the_bound_fails(script: ModuleType) -> None:
    rows = [
        {"name": "loop", "share_of_bound": 1.0, "is_direct": True},
        {"name": "torch", "share_of_bound": 1.04, "is_direct": True},
        {"name": "int8", "share_of_bound": 4.0, "is_direct": False},
    ]
    script.check_bound(rows, {"loop": 1.0})
    rows[1]["share_of_bound"] = 1.06
    with pytest.raises(FeatcacheError, match=r"torch reached 1\.06 of the bound, more than noise"):
        script.check_bound(rows, {"loop": 1.0})


def test_the_loop_counts_its_operations(script: ModuleType, tmp_path: Path) -> None:
    import bench_bound

    loop = bench_bound.fma_loop(tmp_path)
    if loop is None:
        pytest.skip("no C compiler")
    assert loop() / bench_bound.TURNS in (128, 256, 512)  # 16 sums of 4, 8 or 16 numbers


def test_layers_add_up(script: ModuleType, tmp_path: Path) -> None:
    import bench_layers

    report = bench_layers.compare_layers(script.BenchConfig(image_px=32, rounds=1, folder=tmp_path))
    convolutions = [row for row in report["layers"] if "flops" in row]
    assert len(convolutions) == 20  # of ResNet18
    assert sum(row["flops"] for row in convolutions) == pytest.approx(3.63e9 / 49, rel=0.01)
    assert all(row["share_of_bound"] > 0 for row in convolutions)
    assert report["summary"][-1].startswith("all")


def test_resnet18_has_its_known_operations(script: ModuleType) -> None:
    from featcache.backbone import load_backbone
    from featcache.config import BackboneConfig

    network = load_backbone(BackboneConfig(weights="random"), 0)
    # 1.814e9 multiply-adds without the head, as its paper's table has it (1.8e9)
    assert script.flops_of(network, 224) == pytest.approx(2 * 1.814e9, rel=0.01)


def test_shares_of_time_add_up(script: ModuleType) -> None:
    report = {
        "engine": {"threads": 2},
        "stage_seconds": {"read": 1.0, "decode": 4.0, "resize": 1.0, "network": 12.0, "wait": 9.0},
    }
    told = script._time_shares(report, seconds=10.0, images=100)
    assert told["thread_shares"] == {
        "read": 0.05,
        "decode": 0.2,
        "resize": 0.05,
        "network": 0.6,
        "idle": pytest.approx(0.1),
    }
    assert told["main_thread_shares"] == {"write": 0.0, "wait": 0.9}
    assert told["milliseconds_per_image"]["decode"] == 40


def test_photographs_have_a_photographs_size_and_differ(script: ModuleType, tmp_path: Path) -> None:
    one, other = script.photograph(0), script.photograph(1)
    assert one.size == (1024, 768)
    assert not np.array_equal(np.asarray(one), np.asarray(other))
    file = io.BytesIO()
    one.save(file, "JPEG", quality=88)
    assert 150_000 < len(file.getvalue()) < 300_000


def test_figures_replace_what_stood_between_their_markers(
    script: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end a -->\nafter\n")
    report = {"environment": {"processor": "P", "num_cores": 2}}
    for _ in range(2):
        script.fill(page, "a", script.as_text(["new"], report))
    text = page.read_text()
    assert text.startswith("before\n<!-- a -->\n```text\nnew\n\nP, 2 cores; torch ")
    assert text.endswith("```\n<!-- end a -->\nafter\n")
    assert "old" not in text
    with pytest.raises(UserError, match="no markers <!-- b -->"):
        script.fill(page, "b", ["new"])


def test_the_documentation_has_a_place_for_every_figure(script: ModuleType) -> None:
    text = (REPO / "docs" / "performance.md").read_text()
    for name in (
        "bench-extract-auto-float32",
        "bench-extract-openvino-float32",
        "bench-extract-auto-int8",
        "bench-notebook",
        "bench-memory",
        "bench-choices",
        "bench-layers",
        "bench-pixels",
    ):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end {name} -->") == 1


@pytest.mark.slow
def test_a_tiny_roofline(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--image-px 32 --num-images 40 --rounds 1 --json --folder"
    assert script.main([*words.split(), str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows[report["bound"]]["share_of_bound"] == pytest.approx(1)
    assert rows[report["bound"]]["gflops"] == max(report["bounds_gflops"].values())
    assert len(report["bounds_gflops"]) >= 3
    for way in ("", ", Pillow", ", fast"):
        assert rows[f"extract-features, JPEG{way}"]["num_images"] == 42
    assert rows["extract-features, memory"]["images_per_s"] > 0
    assert report == json.loads((tmp_path / "bench-extract.json").read_text())
    assert "extract-features, JPEG: read" in "\n".join(script.summary_lines(report))


@pytest.mark.slow
def test_choices_are_compared_with_fixed_ones(script: ModuleType, tmp_path: Path) -> None:
    config = script.BenchConfig(
        choices=True, image_px=32, num_images=20, rounds=1, folder=tmp_path
    )  # fmt: skip
    report = script.bench(config)
    assert report["images_per_s"].keys() >= {"automatic", "torch batch 8", "torch batch 16"}
    assert report["share_of_best_fixed"] > 0


@pytest.mark.slow
def test_the_notebooks_job_both_ways(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_notebook

    monkeypatch.setattr(bench_notebook, "EPOCHS", 1)
    folder = make_folder(tmp_path / "set", train=8, test=2)
    config = script.BenchConfig(notebook=folder, rounds=1, folder=tmp_path / "bench")
    ways = bench_notebook.variants()[:2]  # int8 wants more images
    monkeypatch.setattr(bench_notebook, "variants", lambda: ways)
    report = script.bench(config)
    assert [len(run["epochs"]) for run in report["notebook"]] == [1]
    for way in ways:
        runs = report["featcache"][way.name]
        assert [len(run["epochs"]) for run in runs] == [1, 1]
        assert report["speedup"][way.name]["total"] > 0
    assert len(report["summary"]) == 3
    with pytest.raises(UserError, match="train/ and test/"):
        script.bench(script.BenchConfig(notebook=tmp_path, folder=tmp_path / "bench"))

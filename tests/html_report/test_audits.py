"""The section of the page about a cache's audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featcache.audit import audit
from featcache.config import AuditConfig, ReportConfig
from featcache.errors import UserError
from featcache.html_report import write_report
from trained_helpers import extracted_cache


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An audit of pets, with one test image copied from train, under another label."""
    root = tmp_path_factory.mktemp("audits")
    cache = extracted_cache(root)
    pets = root / "pets"
    shutil.copy(pets / "train" / "cat" / "000.png", pets / "test" / "dog" / "seen.png")
    cache = extracted_cache(root, update=True)
    return audit(AuditConfig(cache=cache.path, near=0.5))


def page_of(audited: dict[str, Any], tmp_path: Path, **settings: Any) -> str:
    output = tmp_path / "page.html"
    report = write_report(ReportConfig(runs=(Path(audited["report"]),), output=output, **settings))
    assert report["sections"] == ["Audit", "Where the numbers come from"]
    return output.read_text(encoding="utf-8")


def test_the_page_shows_what_was_found(audited: dict[str, Any], tmp_path: Path) -> None:
    pets = Path(audited["cache"]).parent.parent / "pets"
    page = page_of(audited, tmp_path, dataset=str(pets), cache_dir=tmp_path / "cache")
    assert "<h1>pets: audit</h1>" in page
    assert "Identical images with different labels: at most one label is right." in page
    assert "like train/cat/000.png (train, cat)" in page
    assert '<td data-name="class">cat</td>' in page
    assert "featcache audit" in page
    assert page.count("data:image/jpeg;base64,") >= 2
    markdown = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "- dog; test/dog/seen.png; like train/cat/000.png" in markdown.replace("\\", "")


def test_without_the_dataset_it_says_how_to_see_the_images(
    audited: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(audited, tmp_path)
    assert "Add --dataset to see the images." in page
    assert "data:image/jpeg" not in page


def test_another_dataset_is_refused(audited: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset digits is not what .* is about"):
        page_of(audited, tmp_path, dataset="digits", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("classes", [], "is not a list of 1 to"),
        ("findings", [{"kind": 3}], "findings: kind: 3 is not text"),
        ("provenance", {}, "provenance: dataset: None is not an object"),
    ],
)
def test_a_damaged_report_is_refused(
    audited: dict[str, Any], tmp_path: Path, field: str, value: Any, said: str
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({**audited, field: value}))
    with pytest.raises(UserError, match=said):
        page_of({"report": broken}, tmp_path)


def test_markup_in_names_is_text(audited: dict[str, Any], tmp_path: Path) -> None:
    odd = tmp_path / "odd.json"
    finding = {**audited["findings"][0], "id": "<script>x</script>"}
    odd.write_text(json.dumps({**audited, "findings": [finding], "num_findings": {"x": "y"}}))
    page = page_of({"report": odd}, tmp_path)
    assert "<script>" not in page
    assert "&lt;script&gt;x" in page

"""`featcache audit`: planted mistakes are found, named and ranked; a clean cache has none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cache_helpers import rows_cache
from featcache import cli
from featcache.audit import audit, summary_lines
from featcache.audit.labels import confident_learning
from featcache.audit.neighbors import Neighborhood, near_threshold, outliers
from featcache.config import AuditConfig
from featcache.errors import UserError

NAMES = ["ape", "bee", "cat"]
FLIPPED = [4, 40, 77]


def clean(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes far apart, in directions of their own."""
    y = np.arange(num) % 3
    X = np.random.default_rng(seed).normal(size=(num, 40)).astype(np.float32)
    X[np.arange(num), y] += 12
    return X, y


def planted(path: Path, **options: object) -> Path:
    """A cache with three wrong labels, an identical and a near-duplicate test image, an outlier."""
    (X, y), (tested, labels) = clean(120, 1), clean(45, 2)
    y[FLIPPED] = (y[FLIPPED] + 1) % 3
    tested[6], labels[6] = X[9], y[9]
    tested[7], labels[7] = X[10] * 1.01 + 0.01, y[10]
    X[60] = -X[60]
    return rows_cache(path, {"train": (X, y), "test": (tested, labels)}, NAMES, **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return audit(AuditConfig(cache=planted(tmp_path_factory.mktemp("audit") / "c.h5")))


def of_kind(report: dict, kind: str) -> list[dict]:
    return [finding for finding in report["findings"] if finding["kind"] == kind]


def test_wrong_labels_are_found_with_the_right_class(found: dict) -> None:
    wrong = {row["id"]: row["suggested"] for row in of_kind(found, "wrong-label")}
    for row in FLIPPED:
        assert wrong.pop(f"train/{row:05d}") == NAMES[row % 3]
    assert set(wrong) <= {"train/00060"}  # the outlier
    assert found["num_findings"]["doubtful-label"] == 0
    assert found["labels"]["num_checked"] == 165
    assert found["labels"]["train_top1"] > 0.95


def test_copies_and_near_copies_of_train_images_are_found(found: dict) -> None:
    (same,) = of_kind(found, "identical-across-splits")
    assert (same["split"], same["id"]) == ("test", "test/00006")
    assert same["other"] == {"split": "train", "id": "train/00009", "label": "ape"}
    (near,) = of_kind(found, "near-duplicate-across-splits")
    assert (near["id"], near["other"]["id"]) == ("test/00007", "train/00010")
    assert near["score"] > 0.99 > found["near_duplicates"]["threshold"] > 0.8
    assert of_kind(found, "near-duplicate") == []


def test_the_image_unlike_all_others_is_found(found: dict) -> None:
    assert [row["id"] for row in of_kind(found, "outlier")] == ["train/00060"]


def test_the_list_and_the_report_are_written(found: dict) -> None:
    with Path(found["list"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "rank", "kind", "split", "id", "label", "suggested", "score", "other_split", "other_id",
        "other_label", "group",
    ]  # fmt: skip
    assert [row["rank"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    assert kinds == [
        "identical-across-splits", "wrong-label", "near-duplicate-across-splits", "outlier",
    ]  # fmt: skip
    assert sum(found["num_findings"].values()) == len(rows)
    saved = json.loads(Path(found["report"]).read_text())
    assert saved == json.loads(json.dumps(found))
    lines = summary_lines(found)
    assert lines[0] == "120 train, 45 test images of 3 classes, no groups"
    assert "test images that are also in train: 1 of 45 (such as test/00006 and" in lines[2]
    assert lines[-2:] == [
        f"list: {found['list']}",
        f"next: featcache report {found['report']} --dataset DATASET",
    ]


def test_a_clean_cache_has_no_copies_and_no_outliers(tmp_path: Path) -> None:
    splits = {"train": clean(120, 1), "test": clean(45, 2)}
    report = audit(AuditConfig(cache=rows_cache(tmp_path / "c.h5", splits, NAMES)))
    assert set(report["num_findings"].values()) == {0}
    assert report["findings"] == []


def test_identical_images_with_two_labels_come_first(tmp_path: Path) -> None:
    X, y = clean(120, 1)
    X[31], y[31] = X[30], (y[30] + 1) % 3
    X[50], y[50] = X[47], y[47]
    cache = rows_cache(tmp_path / "c.h5", {"train": (X, y), "test": clean(45, 2)}, NAMES)
    report = audit(AuditConfig(cache=cache, output=tmp_path / "list.csv"))
    kinds = [finding["kind"] for finding in report["findings"]]
    assert kinds[0] == "identical-two-labels"
    assert kinds[-1] == "identical"
    assert report["list"] == str(tmp_path / "list.csv")
    assert "identical images with different labels: 1" in "\n".join(summary_lines(report))


def test_groups_stay_together_and_small_classes_are_named(tmp_path: Path) -> None:
    X, y = clean(120, 1)
    keep = (y != 2) | (np.arange(120) < 12)
    X, y = X[keep], y[keep]
    assert y[16] == y[18]
    X[18] = X[16]
    groups = [f"s{i // 8}" for i in range(len(y))]
    alone = np.flatnonzero(y == 2)
    for row in alone:
        groups[row] = "only"
    cache = rows_cache(
        tmp_path / "g.h5",
        {"train": (X, y), "test": clean(45, 2)},
        NAMES,
        groups={"train": groups, "test": ["only"] + [f"t{i}" for i in range(44)]},
    )
    report = audit(AuditConfig(cache=cache))
    lines = "\n".join(summary_lines(report))
    assert "classes with fewer than 10 train images: 1 (cat (4))" in lines
    assert "classes with one group in train, so that nothing can be held out: 1 (cat)" in lines
    assert "class sizes: 4 (cat) to 40 (ape) train images: look at balanced accuracy" in lines
    assert "groups of test that are also in train: 1 (only); keep each in one split" in lines
    assert report["labels"]["num_unchecked"] == 4
    assert report["classes"][2]["num_groups"] == 1
    assert [row["group"] for row in of_kind(report, "identical")] == ["s2"]


def test_confident_learning_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9], [np.nan, np.nan]])
    labels = np.array([0, 0, 1, 1, 0, 1])
    suspects, suggested, odds = confident_learning(p, labels, len(p))
    # Thresholds: the means of 0.9, 0.8, 0.1 and of 0.9, 0.8. Only row 4 reaches another's.
    assert (suspects.tolist(), suggested.tolist()) == ([4], [1])
    assert odds[4] == pytest.approx((0.9 / 0.85) / (0.1 / 0.6))
    assert np.isnan(odds[5])
    assert (odds[:4] < 1).all()


def test_the_threshold_ignores_the_duplicates_themselves() -> None:
    random = np.random.default_rng(0)
    usual = np.exp(np.log(0.2) + 0.25 * random.normal(size=4000))
    near = Neighborhood(index=np.zeros((4000, 1), int), cosine=(1 - usual)[:, None])
    bound = near_threshold(near)
    assert 1 - bound == pytest.approx(0.2 * np.exp(-4 * 0.25), rel=0.15)
    usual[:200] = 0.001  # five percent near-duplicates
    copies = Neighborhood(index=near.index, cosine=(1 - usual)[:, None])
    assert near_threshold(copies) == pytest.approx(bound, abs=0.01)
    far, distance = outliers(copies)
    assert distance == pytest.approx(usual)
    assert len(far) < 5


def test_wrong_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, said in (
        ({"folds": 1}, "folds 1 is out of range: give a number between 2 and"),
        ({"near": 1.5}, "near 1.5 is out of range"),
        ({"output": tmp_path / "x.txt"}, "the list's name ends in .csv"),
    ):
        with pytest.raises(UserError, match=said):
            AuditConfig(cache=tmp_path / "c.h5", **settings)
    cache = planted(tmp_path / "c.h5")
    theirs = tmp_path / "c.audit.csv"
    theirs.write_text("mine\n")
    with pytest.raises(UserError, match=r"c\.audit\.csv exists and was not written by this"):
        audit(AuditConfig(cache=cache))
    theirs.unlink()
    assert cli.main(["audit", str(cache), "--near", "0.9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["near_duplicates"] == {"threshold": 0.9, "found": False}
    assert report["num_findings"]["near-duplicate"] > 0
    assert cli.main(["audit", str(cache)]) == 0  # one of ours is replaced

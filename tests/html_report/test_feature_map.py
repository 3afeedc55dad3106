"""The map of test images by their features: where from, how drawn, what it says."""

from pathlib import Path

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache
from data_helpers import picture
from featcache.cache import FeatureCache
from featcache.config import ReportConfig
from featcache.data import ImageSplit
from featcache.data.sources import ArraySource
from featcache.html_report import feature_map as module
from featcache.html_report import write_report
from featcache.html_report.feature_map import FeatureMap, feature_map
from featcache.html_report.report_files import Run
from featcache.results import Predictions
from run_helpers import PROVENANCE, head_report

CLASSES = ["cat", "dog", "eel"]


def cached_run(folder: Path, splits=None, classes=CLASSES, *, test=None, **changes) -> Run:
    """A head's report beside its cache, of 30 train and 12 test rows of three classes."""
    folder.mkdir(exist_ok=True)
    splits = splits or {"train": blobs(30), "test": blobs(12, seed=1)}
    cache = FeatureCache(rows_cache(folder / "pets.h5", splits, classes))
    made_from = {**PROVENANCE, "cache": "pets.h5", "cache_digest": cache.digest.hex()}
    report = head_report(provenance=made_from, test=test, class_names=list(classes), **changes)
    report.save(folder / "head.json")
    return Run(path=folder / "head.json", report=report)


def guesses(wrong: set[int]):
    """Predictions of the twelve test rows, with the next class for wrong ones."""
    labels = np.arange(12) % 3
    predicted = [(y + (i in wrong)) % 3 for i, y in enumerate(labels.tolist())]
    ids = [f"test/{i:05d}" for i in range(12)]
    fields = {"ids": ids, "labels": labels.tolist(), "predicted": predicted}
    return Predictions(**fields, confidence=[0.5] * 12)


def drawn(tmp_path: Path, run: Run, images=None, **settings) -> FeatureMap:
    config = ReportConfig(runs=(run.path,), cache_dir=tmp_path / "memo", **settings)
    found, notes = feature_map([], [run], config, images)
    assert notes == []
    return found


def test_points_are_the_first_two_principal_components(tmp_path):
    run = cached_run(tmp_path, test=guesses({1, 4}))
    found = drawn(tmp_path, run)
    X = FeatureCache(tmp_path / "pets.h5").split("test").X.astype(np.float64)
    _, _, axes = np.linalg.svd(X - X.mean(0), full_matrices=False)
    wanted = (X - X.mean(0)) @ axes[:2].T
    places = np.array([(point.x, point.y) for point in found.points])
    for got, component in zip(places.T, wanted.T, strict=True):
        assert abs(np.corrcoef(got, component)[0, 1]) == pytest.approx(1, abs=1e-4)
    assert np.ptp(places, axis=0)[0] / np.ptp(places, axis=0)[1] == pytest.approx(
        np.ptp(wanted[:, 0]) / np.ptp(wanted[:, 1]), rel=1e-2
    )  # both axes by the same factor
    assert places.min() >= 0
    assert (places <= (640, 460)).all()
    assert [point.wrong for point in found.points] == [i in {1, 4} for i in range(12)]
    assert found.points[4].text == "test/00004: dog, predicted as eel"
    assert [found.markers[point.marker].name for point in found.points] == CLASSES * 4


def test_coordinates_are_computed_once_for_each_cache(tmp_path, monkeypatch):
    run = cached_run(tmp_path)
    first = drawn(tmp_path, run)
    assert drawn(tmp_path, run, map="tsne").method == "t-SNE"
    monkeypatch.setattr(module, "_projected", None)
    again = drawn(tmp_path, run)
    for axis in ("x", "y"):
        places = [[getattr(point, axis) for point in m.points] for m in (first, again)]
        assert places[0] == pytest.approx(places[1], abs=0.1)
    run = cached_run(tmp_path / "other", {"test": blobs(12, seed=2)})
    with pytest.raises(TypeError):
        drawn(tmp_path, run)


def test_of_many_rows_a_seeded_sample_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_POINTS", 10)
    run = cached_run(tmp_path, {"test": blobs(40)})
    found, again = drawn(tmp_path, run), drawn(tmp_path, run)
    assert (found.num_rows, len(found.points)) == (40, 10)
    assert [p.text for p in found.points] == [p.text for p in again.points]


def test_the_most_frequent_classes_have_markers_of_their_own(tmp_path):
    X, _ = blobs(60)
    y = np.concatenate([np.arange(25), np.full(35, 3)])
    run = cached_run(tmp_path, {"test": (X, y)}, [f"c{i:02d}" for i in range(25)])
    found = drawn(tmp_path, run)
    assert [marker.name for marker in found.markers] == [f"c{i:02d}" for i in range(20)] + [
        "other images"
    ]
    assert len(set(found.markers)) == len({(m.path, m.color) for m in found.markers}) == 21
    assert [point.marker for point in found.points[18:26]] == [18, 19, 20, 20, 20, 20, 20, 3]


def test_several_labels_and_numbers(tmp_path):
    X, _ = blobs(4)
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    found = drawn(tmp_path, cached_run(tmp_path / "m", {"test": (X, labels)}, ["a", "b"]))
    names = [found.markers[point.marker].name for point in found.points]
    assert names == ["a", "b", "other images", "other images"]
    assert found.points[2].text == "test/00002: a|b"
    numbers = np.array([0.5, 1.0, 2.0, 4.0])
    found = drawn(tmp_path, cached_run(tmp_path / "r", {"test": (X, numbers)}, ["target"]))
    assert [marker.name for marker in found.markers] == ["images"]
    assert found.points[0].text == "test/00000: 0.5"


def test_one_row_and_equal_rows_are_drawn_in_the_middle(tmp_path):
    X, y = np.ones((3, 4), np.float32), np.zeros(3, int)
    for name, rows in (("one", 1), ("equal", 3)):
        run = cached_run(tmp_path / name, {"test": (X[:rows], y[:rows])})
        for how in ("pca", "tsne"):
            points = drawn(tmp_path, run, map=how).points
            assert {(point.x, point.y) for point in points} == {(320, 230)}


@pytest.mark.parametrize("change", ["gone", "other"])
def test_without_the_cache_the_page_says_so(tmp_path, change):
    run = cached_run(tmp_path / "runs")
    if change == "gone":
        (tmp_path / "runs" / "pets.h5").unlink()
    else:
        rows_cache(tmp_path / "runs" / "other.h5", {"test": blobs(5)}, CLASSES)
        (tmp_path / "runs" / "other.h5").replace(tmp_path / "runs" / "pets.h5")
    found, notes = feature_map([], [run], ReportConfig(runs=(run.path,)), None)
    assert found is None
    assert notes == [
        "There is no feature map: pets.h5, from which head.json was trained, is not beside that "
        "file, or has changed since."
    ]


def test_the_page_shows_pictures_on_hover_and_escapes_words(tmp_path):
    evil = '"><script>x</script>'
    run = cached_run(tmp_path / "runs", classes=["cat", "dog", evil], test=guesses({0}))
    images = ImageSplit(
        "test", [f"test/{i:05d}" for i in range(12)], np.zeros(12, int), ArraySource(picture)
    )
    found = drawn(tmp_path, run, images)
    assert all(point.jpeg for point in found.points)
    assert all(
        0 <= p.picture[0] <= 640 - 96 and 0 <= p.picture[1] <= 460 - 96 for p in found.points
    )
    page = tmp_path / "r.html"
    write_report(ReportConfig(runs=(run.path,), output=page, cache_dir=tmp_path / "memo"))
    html = page.read_text()
    assert "<script" not in html
    assert html.count('<use href="#marker-') == 12
    assert html.count('<use href="#ring"') == 1
    assert "Those that cached head, logistic predicts wrongly have a ring (1)." in html
    assert "<image" not in html  # no dataset was named
    markdown = page.with_suffix(".md").read_text()
    assert "The 12 images of the test split of pets.h5 by their features, in two" in markdown


def test_pictures_are_of_wrong_points_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PICTURES", 3)
    ids = [f"test/{i:05d}" for i in range(12)]
    images = ImageSplit("test", ids, np.zeros(12, int), ArraySource(picture))
    found = drawn(tmp_path, cached_run(tmp_path, test=guesses({2, 9})), images)
    shown = {at for at, point in enumerate(found.points) if point.jpeg}
    assert {2, 9} < shown
    assert len(shown) == 3

"""A picture of the feature map: test images as points, near each other where their features are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache, FeatureSplit, label_texts
from featcache.config import ReportConfig
from featcache.errors import FeatcacheError
from featcache.file_hashes import Memo
from featcache.html_report.compared_runs import ComparedRun, target_names
from featcache.html_report.mistakes import thumbnail
from featcache.html_report.report_files import Run
from featcache.results import RunReport
from featcache.results.plots import STYLES, outline_of

if TYPE_CHECKING:
    from featcache.data import ImageSplit

MAX_POINTS = 2000
MAX_PICTURES = 200
MAX_CLASSES = 20
"""The most frequent classes, at most this many, have a marker and a color of their own."""
PICTURE_PX = 48
SHOWN_PX = 96
WIDTH, HEIGHT, MARGIN = 640, 460, 10
TSNE_COLUMNS = 50
SEED = 0


class Marker(NamedTuple):
    """How the points of one class look: an SVG path, and a color of the page."""

    name: str
    path: str
    color: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """A test image: where it is in px, which marker it has, whether the head is wrong about it."""

    x: float
    y: float
    marker: int
    wrong: bool
    text: str
    jpeg: str | None

    @property
    def picture(self) -> tuple[float, float]:
        """The corner of its picture on hover: beside the point, inside the drawing."""
        beside = 8 if self.x < WIDTH - SHOWN_PX - 8 else -8 - SHOWN_PX
        return self.x + beside, min(max(self.y - SHOWN_PX / 2, 0), HEIGHT - SHOWN_PX)


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """What the macro `feature_map` shows.

    Attributes:
        head: The run's name.
        cache: The file's name.
        split: Its split.
        num_rows: How many images that has.
        method: PCA or t-SNE.
        predicted: Whether a run's predictions are known, so that wrong ones can be marked.
        markers: Of classes; the last one is for all other images, where there are any.
        points: Some images, all if there are few.
    """

    head: str
    cache: str
    split: str
    num_rows: int
    method: str
    predicted: bool
    markers: list[Marker]
    points: list[Point]

    @property
    def num_wrong(self) -> int:
        """Points that the head is wrong about."""
        return sum(point.wrong for point in self.points)


def feature_map(
    compared: Sequence[ComparedRun],
    others: Sequence[Run],
    config: ReportConfig,
    images: ImageSplit | None,
) -> tuple[FeatureMap | None, list[str]]:
    """The map of the first head whose cache is at hand.

    Args:
        compared: Runs with one class per image, the most accurate first.
        others: Runs on several labels or a number.
        config: Says how to draw; coordinates are remembered in `cache_dir`.
        images: The test images, if they are at hand: some are shown on hover.

    Returns:
        The map, or None with a sentence why there is none; neither if no head is among the runs.
    """
    runs = [(run.name, run.source, run.report) for run in compared if run.report]
    named = zip(target_names(others), others, strict=True)
    runs += [(name, run.path, run.report) for name, run in named]
    heads = [run for run in runs if run[2].command == "train-head"]
    for name, path, report in heads:
        cache = _cache_of(path, report)
        if cache is not None:
            return _drawn(name, cache, report, config, images), []
    if not heads:
        return None, []
    _, path, report = heads[0]
    cache_name = Path(str(report.provenance.get("cache", "?"))).name[:80]
    return None, [
        f"There is no feature map: {cache_name}, from which {path.name[:80]} was trained, is not "
        "beside that file, or has changed since."
    ]


def _cache_of(path: Path, report: RunReport) -> FeatureCache | None:
    """The cache that a head was trained on, beside its report or where it was then."""
    named = (report.provenance.get("cache"), report.config.get("cache"))
    name, place = (text if isinstance(text, str) else "" for text in named)
    for file in (path.parent / Path(name).name, Path(place)):
        try:
            cache = FeatureCache(file)
            if cache.digest.hex() == report.provenance.get("cache_digest"):
                return cache
        except (FeatcacheError, ValueError):  # another file, or not a file's name
            continue
    return None


def _drawn(
    head: str,
    cache: FeatureCache,
    report: RunReport,
    config: ReportConfig,
    images: ImageSplit | None,
) -> FeatureMap:
    split = cache.split("test" if "test" in cache.splits else next(iter(cache.splits)))
    rows = np.arange(len(split))
    if len(rows) > MAX_POINTS:
        rows = np.sort(np.random.default_rng(SEED).choice(rows, MAX_POINTS, replace=False))
    places = _fitted(_coordinates(cache, split, rows, config))
    names = split.ids
    ids = [names[row] for row in rows]
    targets = None if split.targets is None else split.targets[rows]
    truths = label_texts(cache.class_names, split.y[rows], targets)
    markers, kinds = _markers(truths, cache.class_names)
    wrong = _wrong(ids, report)
    pictures = dict(_pictures(images, ids, wrong))
    return FeatureMap(
        head=head,
        cache=cache.path.name,
        split=split.name,
        num_rows=len(split),
        method="t-SNE" if config.map == "tsne" else "PCA",
        predicted=report.test is not None,
        markers=markers,
        points=[
            Point(
                x=round(float(x), 1),
                y=round(float(y), 1),
                marker=kinds[at],
                wrong=at in wrong,
                text=f"{ids[at]}: {truths[at]}"
                + (f", predicted as {wrong[at]}" if at in wrong else ""),
                jpeg=pictures.get(at),
            )
            for at, (x, y) in enumerate(places)
        ],
    )


def _coordinates(
    cache: FeatureCache, split: FeatureSplit, rows: NDArray[np.int64], config: ReportConfig
) -> NDArray[np.float64]:
    """Two coordinates of each row, computed once for each cache."""
    memo, key = Memo(config.cache_dir, "maps"), f"{cache.digest.hex()} {config.map} {len(rows)}"
    known = np.array(memo.get(key, ()) or (), np.float64)
    if known.shape == (len(rows), 2) and np.isfinite(known).all():
        return known
    stages = cache.meta.backbone.stages
    columns = stages.group("last") if stages and "last" in stages.names else slice(None)
    found = _projected(split.take(rows)[:, columns].astype(np.float32), config.map == "tsne")
    memo.put(key, (), np.round(found, 4).tolist())
    memo.save()
    return found


def _projected(features: NDArray[np.float32], by_neighbors: bool) -> NDArray[np.float64]:
    """Features [n, D] in two dimensions: principal components, or t-SNE of the first of them."""
    from sklearn.decomposition import PCA

    found = np.zeros((len(features), 2))
    if (features == features[0]).all():  # nothing to tell apart
        return found
    most = min(TSNE_COLUMNS if by_neighbors else 2, *features.shape)
    flat = PCA(most, random_state=SEED).fit_transform(features)
    if by_neighbors and len(features) > 3:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        near = min(30.0, (len(features) - 1) / 3)
        with threadpool_limits(1):  # the same sums on any machine; threads gain little
            flat = TSNE(perplexity=near, random_state=SEED).fit_transform(flat)
    found[:, : flat.shape[1]] = flat[:, :2]
    return found


def _fitted(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same points within the drawing, both axes by the same factor."""
    low, size = points.min(0), np.ptp(points, axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = (room / np.maximum(size, 1e-12)).min()
    middle = np.array([WIDTH, HEIGHT]) / 2
    return np.asarray((points - low - size / 2) * scale * (1, -1) + middle)


def _markers(truths: Sequence[str], class_names: Sequence[str]) -> tuple[list[Marker], list[int]]:
    """The markers, and which one each row has: numbers and several labels have that of others."""
    number = {name: label for label, name in enumerate(class_names)}
    counts = Counter(truth for truth in truths if truth in number)
    shown = sorted((name for name, _ in counts.most_common(MAX_CLASSES)), key=number.__getitem__)
    markers = []
    for place, name in enumerate(shown):
        color, turn = place % len(STYLES), place // len(STYLES)
        _, shape, _ = STYLES[(color + 3 * turn) % len(STYLES)]
        markers.append(Marker(name, outline_of(shape, 7), f"var(--s{color})"))
    place_of = {name: place for place, name in enumerate(shown)}
    kinds = [place_of.get(truth, len(shown)) for truth in truths]
    if len(shown) in kinds:
        name = "other images" if shown else "images"
        markers.append(Marker(name, outline_of("o", 5), "var(--soft)"))
    return markers, kinds


def _wrong(ids: Sequence[str], report: RunReport) -> dict[int, str]:
    """Places of images that the head predicts wrongly, and what it predicts."""
    test, names = report.test, report.class_names or []
    if test is None:
        return {}
    given = {
        sample: names[guess]
        for sample, truth, guess in zip(test.ids, test.labels, test.predicted, strict=True)
        if guess != truth
    }
    return {at: given[sample] for at, sample in enumerate(ids) if sample in given}


def _pictures(
    images: ImageSplit | None, ids: Sequence[str], wrong: Collection[int]
) -> Iterator[tuple[int, str]]:
    """Small JPEGs in base64 of some points: wrong ones first, then others at random."""
    if images is None:
        return
    row_of = {name: row for row, name in enumerate(images.ids)}
    order = np.random.default_rng(SEED).permutation(len(ids)).tolist()
    for at in sorted(order, key=lambda at: at not in wrong)[:MAX_PICTURES]:
        jpeg = thumbnail(images, row_of.get(ids[at]), PICTURE_PX)
        if jpeg is not None:
            yield at, jpeg

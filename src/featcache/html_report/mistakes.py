"""Recall by class, confusion matrices, and confidently wrong test images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from featcache.config import DataConfig, ReportConfig
from featcache.errors import UserError
from featcache.html_report.compared_runs import ComparedRun
from featcache.results import Predictions
from featcache.results.metrics import confusion, per_class

if TYPE_CHECKING:
    from PIL import Image

    from featcache.data import ImageDataset, ImageSplit

MAX_MATRIX_CLASSES = 40
MAX_PAIRS = 8
MAX_CLASS_ROWS = 1000
MAX_IMAGES = 12
LONGER_SIDE = 112
QUALITY = 80


@dataclass(frozen=True, kw_only=True)
class WrongImage:
    """A test image that was classified wrongly; `jpeg` is in base64, if the image is at hand."""

    name: str
    true: str
    predicted: str
    confidence: float
    jpeg: str | None


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """What one run got wrong.

    Attributes:
        run: The run's name.
        same: Names of runs with identical predictions.
        num_test: Number of test images.
        class_names: All C of them.
        counts: Test images by true and predicted class [C, C]; None for too many classes.
        pairs: A row of text for each of the most confused pairs of classes.
        wrong: The most confident mistakes first.
    """

    run: str
    same: list[str]
    num_test: int
    class_names: list[str]
    counts: list[list[int]] | None
    pairs: list[list[str]]
    wrong: list[WrongImage]


def group_by_predictions(compared: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs with predictions, those that predicted the same in one group."""
    groups: dict[Any, list[ComparedRun]] = {}
    for run in compared:
        if run.test is not None:
            key = (tuple(run.test.ids), tuple(run.test.predicted))
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def recall_table(compared: Sequence[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the share of each class's test images that each run got right.

    Runs whose classes differ from the first one's are left out.
    """
    names = compared[0].class_names
    same = [(run, run.test) for run in compared if run.test and run.class_names == names]
    recalls = [per_class(test.labels, test.predicted, len(names)) for _, test in same]
    counts = np.bincount(np.array(same[0][1].labels), minlength=len(names))
    means = [float(np.nanmean(values)) for values in recalls]
    rows = [["mean over classes", f"{counts.sum():,}", *(f"{mean:.3f}" for mean in means)]]
    rows += [
        [name, f"{counts[i]:,}", *("–" if math.isnan(r[i]) else f"{r[i]:.3f}" for r in recalls)]
        for i, name in enumerate(names[:MAX_CLASS_ROWS])
    ]
    return ["class", "test images", *(run.name for run, _ in same)], rows


def mistakes_of(group: Sequence[ComparedRun], split: ImageSplit | None) -> Mistakes:
    """What runs with the same predictions got wrong.

    Args:
        group: Runs with predictions, all the same.
        split: The test images, if they are at hand.
    """
    test, names = group[0].test, group[0].class_names
    assert test is not None
    few = len(names) <= MAX_MATRIX_CLASSES
    return Mistakes(
        run=group[0].name,
        same=[run.name for run in group[1:21]],
        num_test=len(test.ids),
        class_names=names,
        counts=confusion(test.labels, test.predicted, len(names)).tolist() if few else None,
        pairs=confused_pairs(test.labels, test.predicted, names),
        wrong=_wrong_images(test, names, split),
    )


def confused_pairs(
    labels: ArrayLike, predicted: ArrayLike, names: Sequence[str]
) -> list[list[str]]:
    """The pairs with the most mistakes, with their number and the share of both classes' images.

    Args:
        labels: True classes [N].
        predicted: Predicted classes [N].
        names: C names of classes.
    """
    truth, guess = np.asarray(labels), np.asarray(predicted)
    totals = np.bincount(truth, minlength=len(names))
    wrong = truth != guess
    pairs = np.sort(np.stack([truth[wrong], guess[wrong]], axis=1), axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    rows = []
    for place in np.argsort(-counts, kind="stable")[:MAX_PAIRS]:
        (a, b), both = found[place], int(counts[place])
        there = int(((truth == a) & (guess == b)).sum())
        share = both / max(int(totals[a] + totals[b]), 1)
        detail = f"{both} ({there} + {both - there})"
        rows.append([f"{names[a]} – {names[b]}", detail, f"{share:.1%}"])
    return rows


def confidently_wrong(test: Predictions, most: int) -> list[int]:
    """Test images that were classified wrongly, the most confident first."""
    wrong = [i for i, right in enumerate(test.correct()) if not right]
    return sorted(wrong, key=lambda i: (-test.confidence[i], i))[:most]


def _wrong_images(
    test: Predictions, names: Sequence[str], split: ImageSplit | None
) -> list[WrongImage]:
    """The most confident mistakes; images of the split that cannot be read are left out."""
    rows = {name: row for row, name in enumerate(split.ids)} if split is not None else {}
    images = [
        WrongImage(
            name=test.ids[i],
            true=names[test.labels[i]],
            predicted=names[test.predicted[i]],
            confidence=test.confidence[i],
            jpeg=thumbnail(split, rows.get(test.ids[i])),
        )
        for i in confidently_wrong(test, MAX_IMAGES)
    ]
    return [image for image in images if split is None or image.jpeg]


def load_test_split(config: ReportConfig, compared: Sequence[ComparedRun]) -> ImageSplit | None:
    """The test images, if a dataset was named; drawn as for the first run with predictions.

    Raises:
        UserError: The dataset cannot be read, or has other test images than the runs.
    """
    run = next((run for run in compared if run.test), None)
    if config.dataset is None or run is None or run.test is None:
        return None
    dataset = load_images(config, run.dataset)
    split = dataset.splits["test"]
    missing = set(run.test.ids) - set(split.ids)
    if missing:
        raise UserError(
            f"--dataset {config.dataset} has no test image {min(missing)!r:.80}, which the runs "
            "were scored on; name the dataset of these runs, or omit --dataset"
        )
    # Every read is compared with the hashes behind the fingerprint. Fine-tunes of a comparison
    # record that of their own sample, its cached heads that of the whole dataset.
    recorded = {other.dataset.get("fingerprint") for other in compared if other.test}
    if not recorded & {None, dataset.fingerprint}:
        raise UserError(
            f"--dataset {config.dataset} has changed since the runs: its images or labels are not "
            "those that the runs were made with; name the dataset of these runs, or omit --dataset"
        )
    return split


def load_images(config: ReportConfig, recorded: dict[str, Any]) -> ImageDataset:
    """The dataset that was named, drawn as a report records it.

    Args:
        config: Names the dataset.
        recorded: What the report says of it, as `DatasetInfo.to_dict`.

    Raises:
        UserError: It cannot be read.
    """
    from featcache.data import load_dataset

    assert config.dataset is not None
    names = ("num_train", "num_test", "test_fraction", "group_from")
    drawn_as: dict[str, Any] = {name: recorded.get(name) for name in names}
    return load_dataset(
        DataConfig(
            dataset=config.dataset,
            data_root=config.data_root,
            image_root=config.image_root,
            allow_outside=config.allow_outside,
            cache_dir=config.cache_dir,
            on_error="skip",
            seed=recorded.get("seed") or 0,
            **drawn_as,
        )
    )


def thumbnail(split: ImageSplit | None, row: int | None, side: int = LONGER_SIDE) -> str | None:
    """A small JPEG of one image in base64, or None if it is missing or cannot be read."""
    if split is None or row is None:
        return None
    from featcache.data import BadImage

    try:
        return base64.b64encode(_as_jpeg(split.load(row), side)).decode()
    except BadImage:
        return None


def _as_jpeg(image: Image.Image, side: int) -> bytes:
    """An RGB image with its longer side at `side` px; small ones keep sharp pixels."""
    from PIL import Image as Images

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    kind = Images.Resampling.NEAREST if scale >= 3 else Images.Resampling.BICUBIC
    buffer = io.BytesIO()
    image.resize(size, kind).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

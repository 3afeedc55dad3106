"""Modes in detail: scores by class, confusions, and confidently wrong images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from featcache.config import DataConfig, ReportConfig
from featcache.data import BadImage, ImageSplit, load_dataset
from featcache.errors import UserError
from featcache.html_report.doc import Block, Matrix, Picture, Pictures, Section, Table, Words, notes
from featcache.html_report.modes import Mode, Scored, folded
from featcache.results import Predictions
from featcache.results.metrics import confusion, per_class

if TYPE_CHECKING:
    from PIL import Image

MAX_DETAILED = 6
MAX_MATRIX_CLASSES = 40
MAX_PAIRS = 8
MAX_CLASS_ROWS = 1000
MAX_PICTURES = 12
SIDE = 112
QUALITY = 80


def detail_sections(modes: Sequence[Mode], split: ImageSplit | None) -> list[Section]:
    """Per-class scores, then confusions and wrong images by mode.

    Args:
        modes: The most important first.
        split: The test images, where they are at hand.
    """
    groups = folded(modes)
    if not groups:
        return []
    shown, left = groups[:MAX_DETAILED], groups[MAX_DETAILED:]
    remarks = []
    if left:
        names = "; ".join(mode.name for mode, _, _ in left[:20])
        remarks.append(
            f"The {MAX_DETAILED} modes below are the most accurate of each kind, then the most "
            f"accurate of the others; in the tables alone: {names}."
        )
    sections = [
        Section(title="Scores by class", blocks=[per_class_table([g[:2] for g in shown])]),
        Section(title="Mistakes", blocks=notes(*remarks)),
    ]
    for mode, scored, others in shown:
        same = "; ".join(other.name for other in others[:20])
        blocks: list[Block] = [Words(lines=[f"The same predictions: {same}."])] if others else []
        blocks += [*confusion_blocks(scored), *wrong_blocks(scored, split)]
        sections.append(Section(title=mode.name, blocks=blocks, level=3))
    return sections


def per_class_table(modes: Sequence[tuple[Mode, Scored]]) -> Table:
    """Share of every class's test images that each mode found, and the mean over classes.

    Modes with other classes than the first one's are left out.
    """
    _, first = modes[0]
    names = first.class_names
    same = [(mode, scored.test) for mode, scored in modes if scored.class_names == names]
    recalls = [per_class(test.labels, test.predicted, len(names)) for _, test in same]
    counts = np.bincount(np.array(first.test.labels), minlength=len(names))
    means = [float(np.nanmean(values)) for values in recalls]
    rows = [["mean of the classes", f"{counts.sum():,}", *(f"{mean:.3f}" for mean in means)]]
    rows += [
        [name, f"{counts[i]:,}", *("–" if math.isnan(r[i]) else f"{r[i]:.3f}" for r in recalls)]
        for i, name in enumerate(names[:MAX_CLASS_ROWS])
    ]
    return Table(
        caption="Recall: the share of each class's test images that was recognised; its mean is "
        "the balanced accuracy",
        header=["class", "test images", *(mode.name for mode, _ in same)],
        rows=rows,
    )


def confusion_blocks(scored: Scored) -> list[Block]:
    """A mode's confusion matrix, and the pairs it mixes up most."""
    test, names = scored.test, scored.class_names
    blocks: list[Block] = []
    if len(names) <= MAX_MATRIX_CLASSES:
        blocks.append(
            Matrix(
                caption=f"{len(test.ids):,} test images by true class (row) and predicted class "
                "(column); the shade is the share of the row",
                names=names,
                counts=confusion(test.labels, test.predicted, len(names)).tolist(),
            )
        )
    else:
        blocks += notes(f"With {len(names):,} classes the matrix is too large to show here.")
    rows = confused_pairs(test.labels, test.predicted, names)
    if not rows:
        return [*blocks, Words(lines=["No test image was classified wrongly."])]
    header = ["pair", "mistakes", "of the pair's images"]
    caption = "Most confused pairs, both directions together"
    return [*blocks, Table(caption=caption, header=header, rows=rows)]


def confused_pairs(
    labels: ArrayLike, predicted: ArrayLike, names: Sequence[str]
) -> list[list[str]]:
    """The pairs with most mistakes, with their number and the share of the two classes' images.

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


def test_split(config: ReportConfig, modes: Sequence[Mode]) -> ImageSplit | None:
    """The test images, if a dataset was named; drawn as the first mode with predictions says.

    Raises:
        UserError: The dataset cannot be read, or has other test images than the runs.
    """
    known = next(((mode, mode.scored) for mode in modes if mode.scored), None)
    if config.dataset is None or known is None:
        return None
    (mode, scored) = known
    recorded = mode.report.provenance.get("dataset") if mode.report else None
    drawn: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    names = ("num_train", "num_test", "test_fraction")
    split = load_dataset(
        DataConfig(
            dataset=config.dataset,
            data_root=config.data_root,
            image_root=config.image_root,
            allow_outside=config.allow_outside,
            cache_dir=config.cache_dir,
            on_error="skip",
            seed=drawn.get("seed") or 0,
            **{name: drawn.get(name) for name in names},
        )
    ).splits["test"]
    missing = set(scored.test.ids) - set(split.ids)
    if missing:
        raise UserError(
            f"--dataset {config.dataset} has no test image {min(missing)!r:.80}, which the runs "
            "were scored on; name the dataset of these runs, or leave --dataset out"
        )
    return split


def wrong_blocks(scored: Scored, split: ImageSplit | None) -> list[Block]:
    """A mode's confidently wrong test images as pictures, or a sentence that names some."""
    test, names = scored.test, scored.class_names
    wrong = confidently_wrong(test, MAX_PICTURES)
    if not wrong:
        return []
    if split is None:
        some = "; ".join(
            f"{test.ids[i]} ({names[test.labels[i]]}, taken for {names[test.predicted[i]]}, "
            f"{test.confidence[i]:.2f})"
            for i in wrong[:3]
        )
        return notes(f"Confidently wrong: {some}. Give --dataset to see such images.")
    places = {name: row for row, name in enumerate(split.ids)}
    items = []
    for i in wrong:
        true, guess = names[test.labels[i]], names[test.predicted[i]]
        row = places.get(test.ids[i])
        jpeg = None if row is None else thumbnail(split, row)
        if jpeg is not None:
            lines = [f"{guess} ({test.confidence[i]:.2f})", f"truly {true}", test.ids[i]]
            alt = f"Test image {test.ids[i]}: {true}, taken for {guess}"
            items.append(Picture(jpeg=base64.b64encode(jpeg).decode(), alt=alt, lines=lines))
    caption = "Wrong with most confidence: what it said (how sure it was), and what is true."
    return [Pictures(caption=caption, items=items)] if items else []


def thumbnail(split: ImageSplit, row: int) -> bytes | None:
    """A small JPEG of one image, or None where it cannot be read."""
    try:
        image = split.load(row)
    except BadImage:
        return None
    return as_jpeg(image)


def as_jpeg(image: Image.Image) -> bytes:
    """An RGB picture with its longer side at `SIDE` px; small ones are enlarged, pixels showing."""
    from PIL import Image as Images

    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    kind = Images.Resampling.NEAREST if scale >= 3 else Images.Resampling.BICUBIC
    buffer = io.BytesIO()
    image.resize(size, kind).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

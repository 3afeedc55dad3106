"""Small pictures of confidently wrong test images, where the dataset is at hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from featcache.config import DataConfig, ReportConfig
from featcache.data import BadImage, ImageSplit, load_dataset
from featcache.errors import UserError
from featcache.page.doc import Block, Picture, Pictures, Text
from featcache.page.modes import Mode
from featcache.page.scores import confidently_wrong, predictions_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PICTURES = 12
SIDE = 112
QUALITY = 80


def test_split(config: ReportConfig, modes: Sequence[Mode]) -> ImageSplit | None:
    """The test images, if a dataset was named; drawn as the first mode with predictions says.

    Raises:
        UserError: The dataset cannot be read, or has other test images than the runs.
    """
    known = next((found for mode in modes if (found := predictions_of(mode))), None)
    if config.dataset is None or known is None:
        return None
    report, test, _ = known
    recorded = report.provenance.get("dataset")
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
    missing = set(test.ids) - set(split.ids)
    if missing:
        raise UserError(
            f"--dataset {config.dataset} has no test image {min(missing)!r:.80}, which the runs "
            "were scored on; name the dataset of these runs, or leave --dataset out"
        )
    return split


def wrong_blocks(mode: Mode, split: ImageSplit | None) -> list[Block]:
    """A mode's confidently wrong test images as pictures, or a sentence that names some."""
    found = predictions_of(mode)
    if found is None:
        return []
    _, test, names = found
    wrong = confidently_wrong(test, MAX_PICTURES)
    if not wrong:
        return []
    if split is None:
        some = "; ".join(
            f"{test.ids[i]} ({names[test.labels[i]]}, taken for {names[test.predicted[i]]}, "
            f"{test.confidence[i]:.2f})"
            for i in wrong[:3]
        )
        text = f"Confidently wrong: {some}. Give --dataset to see such images."
        return [Text(text=text, note=True)]
    places = {name: row for row, name in enumerate(split.ids)}
    items = []
    for i in wrong:
        true, guess = names[test.labels[i]], names[test.predicted[i]]
        row = places.get(test.ids[i])
        jpeg = None if row is None else thumbnail(split, row)
        if jpeg is not None:
            lines = [f"{guess} ({test.confidence[i]:.2f})", f"truly {true}", test.ids[i]]
            alt = f"Test image {test.ids[i]}: {true}, taken for {guess}"
            items.append(Picture(jpeg=jpeg, alt=alt, lines=lines))
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

"""Images that occur more than once: on both sides of a split, or under two labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.data.dataset import ImageDataset, ImageSplit

Int64 = NDArray[np.int64]
MAX_EXAMPLES = 3
_NO_IMAGE = bytes(31)


def same_content(splits: Sequence[ImageSplit]) -> Int64:
    """Number the images of all splits so that identical ones, and no others, have equal numbers.

    Returns:
        int64 [N], N the images of all splits in order. A file that could not be read equals none.
    """
    data = b"".join(split.content.tobytes() for split in splits)
    numbers: dict[bytes | int, int] = {}
    groups = np.empty(len(data) // 32, np.int64)
    for row in range(len(groups)):
        digest = data[32 * row : 32 * row + 32]
        key = row if digest.startswith(_NO_IMAGE) else digest
        groups[row] = numbers.setdefault(key, row)
    return groups


@dataclass
class Pairs:
    """Images with an identical one elsewhere: how many, and the ids of the first few pairs."""

    num_images: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, pair: tuple[str, str]) -> None:
        """Count one image."""
        self.num_images += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(pair)


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What `find_copies` found.

    Attributes:
        num_copies: Images less different images, over all splits.
        across: By (split, earlier split): images of the one that are also in the other.
        two_labels: Images whose first copy has another label.
    """

    num_copies: int
    across: dict[tuple[str, str], Pairs]
    two_labels: Pairs

    def report(self) -> dict[str, Any]:
        """The finding as JSON."""
        across = [
            {"split": split, "also_in": other, **asdict(pairs)}
            for (split, other), pairs in self.across.items()
        ]
        return {
            "num_copies": self.num_copies,
            "across_splits": across,
            "two_labels": asdict(self.two_labels),
        }


def find_copies(dataset: ImageDataset) -> Copies:
    """Look for identical images; each is compared with the first of its kind, train before val."""
    splits = [dataset.splits[name] for name in ("train", "val", "test") if name in dataset.splits]
    first_of = same_content(splits)
    copies = np.flatnonzero(first_of != np.arange(len(first_of)))
    starts = np.cumsum([0, *map(len, splits)])
    across: dict[tuple[str, str], Pairs] = {}
    two_labels = Pairs()

    def place(row: int) -> tuple[ImageSplit, int]:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return splits[number], row - int(starts[number])

    for row in copies.tolist():
        (split, at), (other, first) = place(row), place(int(first_of[row]))
        pair = (split.ids[at], other.ids[first])
        if split is not other:
            across.setdefault((split.name, other.name), Pairs()).add(pair)
        if split.labels[at] != other.labels[first]:
            two_labels.add(pair)
    return Copies(num_copies=len(copies), across=across, two_labels=two_labels)


def copies_lines(report: dict[str, Any], sizes: dict[str, int], *, divided: bool) -> list[str]:
    """What `Copies.report` says, for people.

    Args:
        report: The finding as JSON.
        sizes: Images of each split.
        divided: Whether a share was set aside for testing.
    """
    lines = []
    if report["num_copies"] and divided:
        lines.append(
            f"copies of other images: {report['num_copies']} of {sum(sizes.values())}; identical "
            "images were kept on one side of the split"
        )
    for found in report["across_splits"]:
        split, other = found["split"], found["also_in"]
        lines.append(
            f"{split} images that are also in {other}: {found['num_images']} of {sizes[split]} "
            f"({_such_as(found)}); remove them from one split, or {split} scores are too high"
        )
    if report["two_labels"]["num_images"]:
        lines.append(
            f"identical images with different labels: {report['two_labels']['num_images']} "
            f"({_such_as(report['two_labels'])}); correct the labels"
        )
    return lines


def _such_as(found: dict[str, Any]) -> str:
    one, two = found["examples"][0]
    return f"such as {one} and {two}"

"""Choosing samples by seed and class, and finding images that occur more than once.

Samples are ranked by a hash of seed and id, not by a random generator: the choice is the same on
every machine and version, and changes little when a dataset grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from featcache.data.dataset import ImageSplit
from featcache.errors import UserError, listed
from featcache.groups import kept_together, same_content, take_units

Int64 = NDArray[np.int64]
MAX_EXAMPLES = 3
MAX_SHARED = 20
SPLIT_ORDER = ("train", "val", "test")


def quotas(counts: Sequence[int], total: int) -> list[int]:
    """Divide `total` among classes in proportion to `counts`, by largest remainder.

    Every quota is within one of the exact proportion, and their sum is `total`. Ties go to the
    first class.
    """
    population = sum(counts)
    assert 0 <= total <= population
    exact = [count * total for count in counts]  # in units of 1 / population
    shares = [e // population for e in exact] if population else [0] * len(counts)
    by_remainder = sorted(
        range(len(counts)), key=lambda c: (-(exact[c] - shares[c] * population), c)
    )
    for label in by_remainder[: total - sum(shares)]:
        shares[label] += 1
    return shares


def stratified_rows(
    ids: Sequence[str], labels: Int64, total: int, *, seed: int, purpose: str
) -> Int64:
    """Choose exactly `total` rows with each class in proportion.

    Args:
        ids: Names of the samples, [N].
        labels: Class of each sample, int64 [N].
        total: How many to choose, at most N.
        seed: Other seeds choose other samples.
        purpose: Makes samples with the same seed independent.

    Returns:
        Row numbers, int64 [total], ascending.
    """
    counts = [int(n) for n in np.bincount(labels)]
    return _lowest_ranked(ids, labels, quotas(counts, total), f"{seed}\0{purpose}")


def split_off_test(
    every: ImageSplit, fraction: float, seed: int, *, group_from: str | None = None
) -> dict[str, ImageSplit]:
    """Set a fraction of each class aside for testing, as `held_out_rows` does.

    Args:
        every: All images.
        fraction: The share of each class.
        seed: Other seeds choose other images.
        group_from: A regular expression that finds the images' groups in their ids.

    Raises:
        UserError: There would be no test images, or an id has no group.
    """
    if group_from is not None:
        every = every.grouped_by(group_from)
    wanted = min(max(1, round(len(every) * fraction)), len(every))
    test = held_out_rows(every, wanted, seed=seed, purpose="test")
    if len(test) == 0:
        raise UserError(
            f"{len(every)} images are too few for a test split: every class must keep one to train "
            "on, and identical images and groups stay together; add images"
        )
    train = np.setdiff1d(np.arange(len(every)), test)
    return {"train": every.subset(train, name="train"), "test": every.subset(test, name="test")}


def held_out_rows(split: ImageSplit, total: int, *, seed: int, purpose: str) -> Int64:
    """Choose about `total` rows with each class in proportion, leaving at least one of each class.

    Groups and identical images stay together, see `take_units`: those whose lowest rank comes first
    are taken first. All images are hashed for this.

    Args:
        split: The images.
        total: How many to choose, at most N.
        seed: Other seeds choose other images.
        purpose: Makes samples with the same seed independent.

    Returns:
        Row numbers, int64 [M], ascending; where no image belongs to another, M is `total` less what
        classes keep.
    """
    counts = [int(n) for n in np.bincount(split.labels)]
    shares = [min(q, max(0, n - 1)) for q, n in zip(quotas(counts, total), counts, strict=True)]
    order = np.argsort(_ranks(split.ids, f"{seed}\0{purpose}"), kind="stable").tolist()
    return take_units(order, kept_together(split.content, split.groups), split.labels, shares)


def _lowest_ranked(ids: Sequence[str], labels: Int64, shares: list[int], salt: str) -> Int64:
    order = np.argsort(_ranks(ids, salt), kind="stable")
    in_order = labels[order]
    chosen = [order[in_order == label][:share] for label, share in enumerate(shares)]
    return np.sort(np.concatenate(chosen))


def _ranks(ids: Sequence[str], salt: str) -> NDArray[np.bytes_]:
    """A hash of each name, [N], to sort by."""
    hashes = (hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:16] for name in ids)
    return np.fromiter(hashes, "S16", len(ids))


class PairsReport(TypedDict):
    """How many images are copies, and the ids of the first few with those of their originals."""

    num_images: int
    examples: list[tuple[str, str]]


class PairsAcross(PairsReport):
    """Images of `split` that are also in `also_in`."""

    split: str
    also_in: str


class CopiesReport(TypedDict):
    """`Copies` as JSON."""

    num_copies: int
    across_splits: list[PairsAcross]
    two_labels: PairsReport


class LabeledRows(Protocol):
    """The images of a split, decoded or not: an `ImageSplit`, or the rows of a cache."""

    @property
    def ids(self) -> Sequence[str]:
        """Their N names."""

    @property
    def labels(self) -> NDArray[np.integer[Any]]:
        """Class indices [N]."""

    @property
    def content(self) -> NDArray[np.uint8]:
        """Digests [N, 32]."""

    @property
    def groups(self) -> Sequence[str] | None:
        """Their N groups, if they have any."""


class Copy(NamedTuple):
    """An image, and the first one that is identical to it."""

    split: str
    row: int
    id: str
    also_in: str
    also_row: int
    also_id: str
    same_label: bool


class Copies(NamedTuple):
    """All M images that are copies of an earlier one, as in `Copy`, in arrays [M].

    Attributes:
        ids: The names of all images of each split; `split` and `also_in` count these splits.
    """

    ids: dict[str, Sequence[str]]
    split: Int64
    row: Int64
    also_in: Int64
    also_row: Int64
    same_label: NDArray[np.bool_]

    def pairs(self, rows: Int64 | slice = slice(None)) -> Iterator[Copy]:
        """All copies, or some, one by one."""
        splits = list(self.ids.items())
        for split, row, also_in, also_row, same in zip(
            *(array[rows].tolist() for array in self[1:]), strict=True
        ):
            (name, ids), (other, other_ids) = splits[split], splits[also_in]
            yield Copy(name, row, ids[row], other, also_row, other_ids[also_row], same)

    def report(self) -> CopiesReport:
        """How many there are, across splits and with different labels, and a few of each."""
        across = {
            (split, other): np.flatnonzero((self.split == number) & (self.also_in == earlier))
            for number, split in enumerate(self.ids)
            for earlier, other in enumerate([*self.ids][:number])
        }
        return {
            "num_copies": len(self.row),
            "across_splits": [
                {"split": split, "also_in": other, **self._counted(rows)}
                for (split, other), rows in sorted(across.items(), key=lambda a: a[1][:1].tolist())
                if len(rows)
            ],
            "two_labels": self._counted(np.flatnonzero(~self.same_label)),
        }

    def _counted(self, rows: Int64) -> PairsReport:
        examples = [(copy.id, copy.also_id) for copy in self.pairs(rows[:MAX_EXAMPLES])]
        return {"num_images": len(rows), "examples": examples}


def find_copies(splits: Mapping[str, LabeledRows]) -> Copies:
    """Look for identical images; each is paired with its first copy in train, val, test order."""
    ids = {name: splits[name].ids for name in SPLIT_ORDER if name in splits}
    numbers = same_content(np.concatenate([splits[name].content for name in ids]))
    labels = np.concatenate([splits[name].labels for name in ids])
    rows = np.arange(len(numbers))
    first = np.full(numbers.max(initial=0) + 1, len(rows))
    np.minimum.at(first, numbers, rows)
    copies = np.flatnonzero(first[numbers] != rows)
    originals = first[numbers[copies]]
    starts = np.cumsum([0, *map(len, ids.values())])
    split, also_in = (np.searchsorted(starts, r, side="right") - 1 for r in (copies, originals))
    return Copies(
        ids=ids,
        split=split,
        row=copies - starts[split],
        also_in=also_in,
        also_row=originals - starts[also_in],
        same_label=labels[copies] == labels[originals],
    )


class SharedGroups(NamedTuple):
    """How many groups two splits have in common, and the first few."""

    split: str
    also_in: str
    num_groups: int
    examples: list[str]


def find_shared_groups(splits: Mapping[str, LabeledRows]) -> list[SharedGroups]:
    """Groups that have images in two splits, for each pair of splits in train, val, test order."""
    grouped = [(name, set(splits[name].groups or ())) for name in SPLIT_ORDER if name in splits]
    return [
        SharedGroups(split, other, len(shared), sorted(shared)[:MAX_SHARED])
        for number, (split, groups) in enumerate(grouped)
        for other, earlier in grouped[:number]
        if (shared := groups & earlier)
    ]


def shared_groups_lines(shared: Sequence[dict[str, Any]]) -> list[str]:
    """What `find_shared_groups` found, each as JSON, as sentences."""
    return [
        f"groups of {found['split']} that are also in {found['also_in']}: {found['num_groups']} "
        f"({listed(found['examples'], MAX_EXAMPLES)}); keep each in one split, or "
        f"{found['split']} scores are too high"
        for found in shared
    ]


def copies_lines(report: CopiesReport, sizes: dict[str, int], *, divided: bool) -> list[str]:
    """The findings of `Copies.report` as sentences.

    Args:
        report: The findings as JSON.
        sizes: Number of images of each split.
        divided: Whether a part was set aside for testing.
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


def _such_as(found: PairsReport) -> str:
    one, two = found["examples"][0]
    return f"such as {one} and {two}"

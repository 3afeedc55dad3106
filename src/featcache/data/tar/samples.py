"""What a shard has: samples by key with their labels, in an index that is remembered.

One pass over a shard makes its index and hashes its images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import posixpath
from collections import Counter

import numpy as np

from featcache import __version__
from featcache.config.checks import is_printable, record_from_json
from featcache.data.images import EMPTY, EXTENSIONS, MAX_FILE_BYTES, TOO_LARGE, BadImage
from featcache.data.index import pack, unpack
from featcache.data.listing import MAX_NAME_BYTES, is_clutter, suffix_of
from featcache.data.manifest import MAX_LABEL
from featcache.data.sources import no_content
from featcache.data.tar.members import Member, Stream, members
from featcache.data.tar.places import read_through, stamp_of_place
from featcache.errors import UserError, shown
from featcache.file_hashes import Memo

LABELS = ("cls", "json", "txt")
"""The endings of files that label an image; the first that a sample has counts."""
FIELDS = ("label", "cls", "class")
"""The fields of a json file that label an image; the first that it has counts."""
MAX_LABEL_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard has, as JSON. One line or number per image, as arrays in base64.

    Attributes:
        names: Of the images in the archive.
        labels: Of the images, as text.
        offsets: Where their bytes start, uint64.
        sizes: How many bytes there are, uint64.
        content: Their sha256, uint8 [N, 32].
        unusable: Names of samples that cannot be used, each with the reason.
        ignored: Numbers of other files, by suffix.
    """

    names: str
    labels: str
    offsets: str
    sizes: str
    content: str
    unusable: list[str]
    ignored: dict[str, int]


def index_of(place: str, memo: Memo) -> ShardIndex:
    """The index of a shard: from the memo if the shard has not changed, or made by reading it.

    Raises:
        UserError: The shard is damaged, or a sample's label is missing or cannot be used.
        StorageError: The download failed twice.
    """
    stamp = stamp_of_place(place)
    if stamp is not None:
        with contextlib.suppress(ValueError):
            return record_from_json(ShardIndex, memo.get(memo_key(place), stamp))
    index = read_through(place, lambda stream: _Reading(place).index(stream))
    if stamp is not None and stamp == stamp_of_place(place):
        memo.put(memo_key(place), stamp, dataclasses.asdict(index))
    return index


def lines(text: str) -> list[str]:
    """The lines of `names` or `labels`; none is empty."""
    return unpack(text, "u1").tobytes().decode().split("\n") if text else []


def _packed(texts: list[str]) -> str:
    return pack(np.frombuffer("\n".join(texts).encode(), np.uint8), "u1")


def memo_key(place: str) -> str:
    """What a memo calls the index of a shard."""
    return json.dumps([place, __version__])


def why_unusable(size: int) -> BadImage | None:
    """Why an image of so many bytes cannot be used; None if it can."""
    if size == 0:
        return BadImage(EMPTY)
    if size > MAX_FILE_BYTES:
        return BadImage(TOO_LARGE, f"{size} bytes, at most {MAX_FILE_BYTES}")
    return None


@dataclasses.dataclass(slots=True)
class _Sample:
    """The files of one key; `rank` is that of the label's ending in LABELS."""

    name: str = ""
    offset: int = 0
    size: int = 0
    digest: bytes = b""
    label: str = ""
    rank: int = len(LABELS)
    problem: str = "no image"


class _Reading:
    """Puts the files of a shard together as samples."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._samples: dict[str, _Sample] = {}
        self._ignored: Counter[str] = Counter()

    def index(self, stream: Stream) -> ShardIndex:
        """Read a shard from front to back."""
        for member in members(stream, self._place, _is_wanted):
            self._add(member)
        found = [sample for sample in self._samples.values() if not sample.problem]
        for sample in found:
            if not sample.label:
                raise UserError(
                    f"{self._place}: {sample.name} has no label: put a file of the same name that "
                    f"ends in {', '.join(LABELS)} beside it (json with {' or '.join(FIELDS)})"
                )
        return ShardIndex(
            names=_packed([sample.name for sample in found]),
            labels=_packed([sample.label for sample in found]),
            offsets=pack(np.array([sample.offset for sample in found]), "<u8"),
            sizes=pack(np.array([sample.size for sample in found]), "<u8"),
            content=pack(np.frombuffer(b"".join(s.digest for s in found), np.uint8), "u1"),
            unusable=[f"{shown(k)} ({s.problem})" for k, s in self._samples.items() if s.problem],
            ignored=dict(self._ignored),
        )

    def _add(self, member: Member) -> None:
        key, ending = _parts_of(member.name)
        is_image = f".{ending}" in EXTENSIONS
        if not key or not (is_image or (ending in LABELS and member.is_file)):
            if not is_clutter(posixpath.basename(member.name)):
                self._ignored[suffix_of(member.name)] += 1
            return
        sample = self._samples.setdefault(key, _Sample())
        if not is_image:
            self._label(sample, member, ending)
            return
        if not sample.problem:
            raise UserError(
                f"{self._place}: the sample {key} has two images, {sample.name} and "
                f"{shown(member.name)}: keep one, or give them different names up to the first dot"
            )
        sample.problem = _problem_of(member)
        sample.name, sample.offset, sample.size = member.name, member.offset, member.size
        while sample.name.startswith("./"):
            sample.name = sample.name[2:]
        bad = why_unusable(member.size)
        sample.digest = no_content(bad) if bad else hashlib.sha256(member.data or b"").digest()

    def _label(self, sample: _Sample, member: Member, ending: str) -> None:
        """Read a label, unless the sample has one that counts more."""
        rank, where = LABELS.index(ending), f"{self._place}: {shown(member.name)}"
        if rank == sample.rank:
            raise UserError(f"{where} occurs twice: keep one")
        label = _label_in(member.data, ending, where) if rank < sample.rank else None
        if label is not None:
            sample.label, sample.rank = label, rank


@functools.lru_cache(maxsize=2)  # asked twice of every member
def _parts_of(name: str) -> tuple[str, str]:
    """A member's key, the name up to the first dot of its last part, and its ending in lower case.

    As in WebDataset; the key is empty for hidden files and for systems' own.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    is_clutter_below = any(is_clutter(part) for part in name.split("/") if part != "..")
    return "" if is_clutter_below else posixpath.join(folder, stem), ending.lower()


def _is_wanted(name: str, size: int) -> bool:
    key, ending = _parts_of(name)
    if f".{ending}" in EXTENSIONS:
        return bool(key) and why_unusable(size) is None
    return bool(key) and ending in LABELS and size <= MAX_LABEL_BYTES


def _problem_of(member: Member) -> str:
    """Why an image cannot be a row, if it cannot. Its id may have the shard's name before it."""
    if not member.is_file:
        return "a link"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "outside of the archive"
    if not is_printable(member.name):
        return "not UTF-8, or with control characters"
    return "a long name" if len(member.name.encode()) > MAX_NAME_BYTES // 2 else ""


def _label_in(data: bytes | None, ending: str, where: str) -> str | None:
    """The label in a file; None if it is JSON without one.

    Raises:
        UserError: It is too long, not text, not JSON, or the label cannot be used.
    """
    if data is None:
        raise UserError(f"{where} has more than {MAX_LABEL_BYTES:,} bytes: is it a label?")
    try:
        value: object = data.decode("utf-8-sig")
        if ending == "json":
            fields = json.loads(data)
            has = [name for name in FIELDS if isinstance(fields, dict) and name in fields]
            value = fields[has[0]] if has else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not {'JSON' if ending == 'json' else 'UTF-8'}") from error
    if value is None:
        return None
    label = str(value).strip() if type(value) in (str, int) else ""
    if not 0 < len(label) <= MAX_LABEL or not is_printable(label):
        raise UserError(f"{where}: its label is not a number or 1 to {MAX_LABEL} characters")
    return label

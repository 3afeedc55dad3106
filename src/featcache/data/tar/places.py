"""Where shards lie: patterns and folders, on this machine or behind a URL that fsspec can read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from featcache.data.listing import SPLIT_NAMES, is_clutter, is_image_file
from featcache.display import say
from featcache.errors import FeatcacheError, StorageError, UserError, shown
from featcache.file_hashes import is_settled, stamp_of
from featcache.files import open_regular

if TYPE_CHECKING:
    from featcache.data.tar.members import Stream

T = TypeVar("T")
MAX_SHARDS = 100_000
RETRY_S = 1.0
_SUFFIX = re.compile(r"\.(tar|tgz|tar\.\w{1,4})(\Z|[?#])", re.IGNORECASE)
# What comes before a brace, and the brace: two numbers or several words. At the end, the rest.
_BRACES = re.compile(r"(.*?)(?:\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}|\Z)")
_BESIDE = re.compile(r"^.*::|[?#].*")
"""What a URL has before and after the path."""
# What a server says of every version of a file.
_NO_VERSION = {"name", "size", "type", "mimetype", "url", "partial", "islink"}


class Shard(NamedTuple):
    """One archive.

    Attributes:
        place: Its absolute path or URL.
        name: Its path from the folder that all shards of the dataset have in common.
        split: train, test or val if a word of its name says so, else nothing.
    """

    place: str
    name: str
    split: str


def is_remote(place: str) -> bool:
    """Whether this is a URL, such as s3://bucket/photos.tar, not a path."""
    return "://" in place or "::" in place


def names_shards(text: str) -> bool:
    """Whether a dataset's name is a shard, a pattern of shards, or a URL."""
    return is_remote(text) or bool(_SUFFIX.search(text))


def shards_in(folder: str) -> list[str]:
    """The shards of a folder that has nothing else: *.tar, or train/*.tar and test/*.tar.

    Returns:
        Paths; empty where there are images or other folders, as in a tree of class folders.
    """
    found: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                below = shards_in(entry.path) if entry.name.lower() in SPLIT_NAMES else []
                if not below:
                    return []
                found += below
            elif entry.name.lower().endswith(".tar"):
                found.append(entry.path)
            elif is_image_file(entry.name):
                return []
    return found


def find_shards(text: str) -> list[Shard]:
    """The shards that a pattern, a folder or a URL names, sorted.

    Raises:
        UserError: There are none, too many, or one twice.
    """
    if os.path.isdir(text):
        places = shards_in(text)
    elif is_remote(text) and not _SUFFIX.search(text):
        places = _download(text, _tars_below)
        if not places:
            raise UserError(f"no .tar in {text}: give a folder of shards, or their pattern")
    else:
        places = expand(text)
    places = sorted(place if is_remote(place) else os.path.abspath(place) for place in places)
    if not places or len(set(places)) < len(places):
        raise UserError(f"{text} names {'a shard twice' if places else 'no shard'}: correct it")
    paths = ["/" + (_BESIDE.sub("", p) if is_remote(p) else p) for p in places]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.relpath(path, folder) for path in paths]
    return [Shard(place, name, _split_of(name)) for place, name in zip(places, names, strict=True)]


def _split_of(name: str) -> str:
    found = {SPLIT_NAMES[word] for word in re.split("[^a-z]", name.lower()) if word in SPLIT_NAMES}
    if len(found) > 1:
        raise UserError(f"the shard {name} is of {' and '.join(sorted(found))}: rename it")
    return "".join(found)


def expand(text: str) -> list[str]:
    """Expand `{000..127}` and `{a,b}` as a shell does, except inside of each other.

    Raises:
        UserError: There would be more than MAX_SHARDS.
    """
    texts = [""]
    for plain, first, last, words in _BRACES.findall(text):
        choices = words.split(",") if words else [""]
        num = int(last or 0) - int(first or 0) + 1 if first else len(choices)
        if num * len(texts) > MAX_SHARDS:
            raise UserError(f"{text:.80} means more than {MAX_SHARDS:,} shards: give fewer")
        if first:
            is_padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
            width = max(len(first), len(last)) if is_padded else 0
            choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        texts = [before + plain + choice for before in texts for choice in choices]
    return texts


def read_through(place: str, read: Callable[[Stream], T]) -> T:
    """Open a shard and read it from front to back; a download that fails is tried once more.

    Raises:
        UserError: There is no such file, it cannot be read, or as `read` raises.
        StorageError: The download failed twice.
    """
    if is_remote(place):

        def reading(filesystem: Any, path: str) -> T:
            with filesystem.open(path, "rb") as stream:
                return read(stream)

        return _download(place, reading)
    with _local_errors(place), open(open_regular(place), "rb", buffering=2**20) as file:
        return read(file)


def read_range(place: str, offset: int, size: int) -> bytes:
    """Bytes of a shard; fewer than `size` if it has become shorter.

    Raises:
        UserError: It cannot be read, or the server sends whole files only.
        StorageError: The download failed twice.
    """
    if is_remote(place):
        data = _download(place, lambda fs, path: fs.cat_file(path, offset, offset + size))
        if len(data) > size:
            raise UserError(
                f"the server of {place} sends whole files, not ranges: put simplecache:: before "
                "the URL to read a copy on this machine"
            )
        return bytes(data)
    with _local_errors(place), open(open_regular(place), "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def stamp_of_place(place: str) -> tuple[int, ...] | None:
    """Values that change when a shard does; None if nothing tells, or it changed just now.

    Raises:
        UserError: There is no such file.
        StorageError: The download failed twice.
    """
    if not is_remote(place):
        with _local_errors(place):
            status = os.stat(place)
            return stamp_of(status) if is_settled(status, time.time()) else None
    facts = _download(place, lambda filesystem, path: filesystem.info(path))
    if not facts.keys() - _NO_VERSION:
        return None
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    return (int.from_bytes(digest, "big"),)


@contextlib.contextmanager
def _local_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the shard {place}: {error.strerror}; check it") from error


@functools.cache
def _filesystem(url: str) -> tuple[Any, str]:
    """What reads a URL, the same in all threads: simplecache:: keeps one copy for each of them."""
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {url}: {shown(str(error))}") from error
    return filesystem, path


def _download(url: str, task: Callable[[Any, str], T]) -> T:
    """`task` of the URL's file system and path, tried twice."""
    filesystem, path = _filesystem(url)
    for is_last in (False, True):
        try:
            return task(filesystem, path)
        except FeatcacheError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else "no access"
            raise UserError(f"cannot read {url}: {why}; check the URL") from error
        except Exception as error:
            reason = shown(f"{type(error).__name__}: {error}")
            if is_last:
                raise StorageError(
                    f"{url} could not be read, twice: {reason}; run the same command again once "
                    "it can"
                ) from error
            say(f"{url}: {reason}; trying once more")
            time.sleep(RETRY_S)
    raise AssertionError


def _tars_below(filesystem: Any, path: str) -> list[str]:
    found = filesystem.find(path, maxdepth=2)
    return [filesystem.unstrip_protocol(name) for name in found if name.endswith(".tar")]

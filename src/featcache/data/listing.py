"""Which files and folders are data: listing folders of images, and rules for names and paths."""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.config import DataConfig
from featcache.config.checks import is_printable
from featcache.data.images import EXTENSIONS
from featcache.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
MAX_NAME_BYTES = 4096
"""The longest sample id that a cache can store."""

# Folders that operating systems and tools create; some contain thumbnails.
_CLUTTER = {
    *("__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot"),
    *("$recycle.bin", "lost+found", "system volume information"),
}
_MAX_SHOWN = 3
MAX_DEPTH = 32
_OUR_FILES = re.compile(r"\.featcache-memo-.*|.*\.(h5|hdf5)(\.part|\.lock)?|.*\.safetensors")


@dataclass
class Listing:
    """Lists the folders of one dataset, and keeps track of what was left out.

    Attributes:
        own_folders: Resolved paths of folders that featcache writes to.
        skip_names: Whether to leave out files whose names cannot be stored, not refuse them.
        ignored: Numbers of other files, by suffix.
        ours: Names of folders with featcache's own files, which were left out.
        unusable: Paths that were left out because of their names, in printable form.
    """

    own_folders: frozenset[str] = frozenset()
    skip_names: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    ours: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def entries(self, folder: Path, *, classes: bool = False) -> list[os.DirEntry[str]]:
        """A folder's entries, sorted by name, without clutter and folders of our own.

        Args:
            folder: The folder to list.
            classes: Whether its folders are classes.

        Raises:
            UserError: It cannot be listed, a name cannot be stored, or a folder that featcache
                writes to has images.
        """
        try:
            with os.scandir(folder) as found:
                kept = [entry for entry in found if not is_clutter(entry.name)]
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG and self.skip_names:
                self.unusable.append(f"{folder!s:.80}…")
                return []
            raise UserError(
                f"cannot list {folder!s:.300}: {error.strerror}; make it readable, or give another "
                "folder"
            ) from error
        if not is_printable("".join(entry.name for entry in kept)):
            kept = [entry for entry in kept if self._has_usable_name(entry, classes)]
        kept = [entry for entry in kept if not (is_folder(entry) and self._is_own(entry))]
        return sorted(kept, key=operator.attrgetter("name"))

    def _has_usable_name(self, entry: os.DirEntry[str], classes: bool) -> bool:
        if is_printable(entry.name):
            return True
        # A whole class is never left out because of its name.
        is_class = classes and is_folder(entry)
        if is_class or not self.skip_names:
            folder, name = os.path.split(entry.path)
            skip = "" if is_class else ", or leave such files out with --on-error skip"
            raise UserError(
                f"the name {os.fsencode(name)!r} in {folder} is not UTF-8, or has control "
                f"characters: rename it{skip}"
            )
        self.unusable.append(repr(os.fsencode(entry.path)))
        return False

    def _is_own(self, entry: os.DirEntry[str]) -> bool:
        if os.path.realpath(entry.path) not in self.own_folders:
            return False
        if any(map(is_image_file, os.listdir(entry.path))):
            raise UserError(
                f"{entry.path} is where featcache keeps its own files, but has images: name "
                "another folder with --cache-dir or --data-root, or move the images"
            )
        self.ours.append(entry.name)
        return True

    def has_only_ours(self, folder: str) -> bool:
        """Whether a folder has caches or heads and no image, such as an earlier --cache-dir."""
        with contextlib.suppress(OSError):
            if any(map(_OUR_FILES.fullmatch, os.listdir(folder))):
                twin = Listing(self.own_folders, skip_names=True)
                return next(twin.images(folder, ""), None) is None
        return False

    def images(
        self, folder: str, prefix: str, above: tuple[tuple[int, int], ...] = ()
    ) -> Iterator[str]:
        """Ids, each with `prefix`, of the images in a folder and below; links are followed.

        Raises:
            UserError: A link leads back to a folder above it, or as `entries` raises.
        """
        found = self.entries(Path(folder))
        if not found:
            return
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(f"{folder} is a link to a folder that contains it: remove the link")
        if len(above) >= MAX_DEPTH:
            raise UserError(f"{folder} is more than {MAX_DEPTH} folders deep in its class folder")
        for entry in found:
            name = prefix + entry.name
            if is_folder(entry):
                yield from self.images(entry.path, f"{name}/", (*above, here))
            elif not is_image_file(entry.name):
                self.ignore(entry.name)
            elif self._is_short(name):
                yield name

    def ignore(self, name: str) -> None:
        """Count a file that is not an image, except for our own."""
        if not _OUR_FILES.fullmatch(name):
            self.ignored[suffix_of(name)] += 1

    def _is_short(self, name: str) -> bool:
        if len(name) <= MAX_NAME_BYTES // 4 or len(name.encode()) <= MAX_NAME_BYTES:
            return True
        if not self.skip_names:
            raise UserError(
                f"the path {name:.80}… has more than {MAX_NAME_BYTES} bytes: shorten it, or leave "
                "such files out with --on-error skip"
            )
        self.unusable.append(f"{name:.80}…")
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself; opening it reports the error
        return False


def is_image_file(name: str) -> bool:
    """Whether a file's name has the suffix of an image."""
    return name.lower().endswith(EXTENSIONS)


def suffix_of(name: str) -> str:
    """A file name's suffix in lower case, such as .jpg."""
    return os.path.splitext(name)[1].lower() or "no extension"


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the system, and so is never data."""
    return name.startswith(".") or name.lower() in _CLUTTER


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return " ".join(_composed(name).casefold().split())


def _as_number(name: str) -> float | str:
    try:
        number = float(name)
    except ValueError:
        return name
    return number if math.isfinite(number) else name


_LIKENESSES: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("the same letters in two Unicode forms, NFC and NFD", _composed),
    ("they differ only in case or spaces", _folded),
    ("the same number", _as_number),
)


def look_alikes(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Pairs of names that may be meant to be the same, and what makes them alike, in words."""
    found: dict[tuple[str, str], str] = {}
    for how, key in _LIKENESSES:
        first: dict[object, str] = {}
        for name in sorted(names):
            other = first.setdefault(key(name), name)
            if other != name:
                found.setdefault((other, name), how)
    return [(one, two, how) for (one, two), how in found.items()]


def alike_text(pairs: Sequence[tuple[str, str, str]]) -> str:
    """The first few such pairs as part of a sentence."""
    shown = "; ".join(f"{one!r} and {two!r} ({how})" for one, two, how in pairs[:_MAX_SHOWN])
    return shown + (f"; and {len(pairs) - _MAX_SHOWN} more" if len(pairs) > _MAX_SHOWN else "")


def left_out_note(places: Sequence[str]) -> str:
    """Say which files were left out because a cache cannot store their names."""
    return (
        f"left out because their names are too long, not UTF-8, or have control characters: "
        f"{len(places)} ({', '.join(places[:_MAX_SHOWN])}{', …' * (len(places) > _MAX_SHOWN)})"
    )


class ImageRoot:
    """The folder that a manifest's paths are relative to.

    Args:
        config: Which folder, and which paths it may have.
        file: The manifest.

    Attributes:
        path: Absolute, links resolved.

    Raises:
        UserError: It is not a folder.
    """

    def __init__(self, config: DataConfig, file: Path) -> None:
        given = file.parent if config.image_root is None else config.image_root
        if config.image_root is not None and not given.is_dir():
            raise UserError(f"--image-root {given} is not a folder that can be read; check it")
        self.path = os.path.realpath(given)
        self._inside = os.path.join(self.path, "")
        self._file = file
        self._given = given
        self._name = "the manifest's folder" if config.image_root is None else "--image-root"
        self._anywhere = config.allow_outside
        self._must_exist = config.on_error == "fail"
        self._resolved: dict[str, str] = {}

    def check(self, paths: list[tuple[int, str]]) -> None:
        """Refuse paths that repeat, leave the folder, or do not exist, as the settings say.

        Args:
            paths: Each with its line in the manifest.

        Raises:
            UserError: Naming the line.
        """
        first: dict[str, int] = {}
        for line, path in paths:
            where = f"{self._file}, line {line}"
            if not path.strip():
                raise UserError(f"{where}: the path is empty")
            full = os.path.join(self.path, path)
            earlier = first.setdefault(posixpath.normpath(full), line)
            if earlier != line:
                raise UserError(
                    f"{where}: duplicate path {path}, first in line {earlier}; keep one"
                )
            is_plain = _is_plain_file(full)
            if not self._anywhere:
                self._check_inside(where, path, full, is_plain)
            if self._must_exist and not is_plain:
                _check_file(where, full, path)

    def _check_inside(self, where: str, path: str, full: str, is_plain: bool) -> None:
        if posixpath.isabs(path) or os.path.isabs(path):
            raise UserError(
                f"{where}: {path} is an absolute path; give it relative to {self._given}/, or "
                "add --allow-outside"
            )
        if not self._contains(full, is_plain):
            raise UserError(
                f"{where}: {path} leaves {self._name}; paths must stay in {self._given}/: give the "
                "images' folder with --image-root, or add --allow-outside"
            )

    def _contains(self, full: str, is_plain: bool) -> bool:
        """Whether a path, with links resolved, is below this folder; a plain file is no link."""
        head, tail = os.path.split(full)
        if head not in self._resolved:
            self._resolved[head] = os.path.join(os.path.realpath(head), "")
        resolved = self._resolved[head] + tail
        return (resolved if is_plain else os.path.realpath(resolved)).startswith(self._inside)


def _is_plain_file(path: str) -> bool:
    """Whether there is a file of this name that is no link."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def _check_file(where: str, full: str, path: str) -> None:
    try:
        status = os.stat(full)
    except OSError as error:
        hint = " (write / between folders)" if "\\" in path else _other_form(full)
        raise UserError(
            f"{where}: {path}: {error.strerror}{hint}; correct the path, or skip such rows with "
            "--on-error skip"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: {path} is not a file")


def _other_form(path: str) -> str:
    """Say if the file exists under the other Unicode form of its name."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        twin = unicodedata.normalize(form, path)  # type: ignore[arg-type]
        if twin != path and os.path.lexists(twin):
            return f" (the file's name is in Unicode form {form}, the manifest's in {other})"
    return ""

"""CSV manifests: columns path,label[,split][,weight][,group], paths relative to their folder."""

from __future__ import annotations

import csv
import difflib
import math
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from featcache.config import DataConfig
from featcache.config.checks import is_printable
from featcache.data.dataset import ImageDataset, ImageSplit, short_name
from featcache.data.listing import (
    MAX_NAME_BYTES,
    SPLIT_NAMES,
    alike_text,
    left_out_note,
    look_alikes,
)
from featcache.data.sampling import split_off_test
from featcache.data.sources import FileSource
from featcache.errors import UserError
from featcache.file_hashes import Memo

REQUIRED = ("path", "label")
OPTIONAL = ("split", "weight", "group")
COLUMNS = (*REQUIRED, *OPTIONAL)
MAX_LABEL = 256
MAX_BYTES = 2**30


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str
    weight: float
    group: str


def load_manifest(config: DataConfig, file: Path, memo: Memo) -> ImageDataset:
    """Read a manifest.

    Paths are relative to the manifest's folder or --image-root and must stay in it, links
    resolved, unless --allow-outside is given. A split column says train, test or val; if
    there is no test, val is used as test. Without that column --test-fraction sets a part aside.

    Raises:
        UserError: Something is wrong with it; the message names the line.
    """
    header, rows, left_out = _read_rows(config, file)
    root = _ImageRoot(config, file)
    root.check(rows)
    rows = sorted(rows, key=lambda row: row.path)
    split_names = {row.split for row in rows}
    _check_splits(config, file, header, split_names)
    class_names = sorted({row.label for row in rows if row.split in ("train", "")})
    _check_classes(file, rows, class_names)
    number = {name: label for label, name in enumerate(class_names)}

    def split_of(name: str, chosen: list[_Row]) -> ImageSplit:
        return ImageSplit(
            name,
            [r.path for r in chosen],
            np.array([number[r.label] for r in chosen], dtype=np.int64),
            FileSource([os.path.join(root.path, r.path) for r in chosen], memo, root.path),
            weights=np.array([r.weight for r in chosen]) if "weight" in header else None,
            groups=[r.group for r in chosen] if "group" in header else None,
        )

    if "split" in header:
        key = {"val": "val" if "test" in split_names else "test"}
        splits = {
            key.get(name, name): split_of(key.get(name, name), [r for r in rows if r.split == name])
            for name in ("train", "test", "val")
            if name in split_names
        }
    else:
        assert config.test_fraction is not None
        every, fraction = split_of("all", rows), config.test_fraction
        splits = split_off_test(every, fraction, config.seed, group_from=config.group_from)
    return ImageDataset(
        short_name(file.stem),
        "manifest",
        splits,
        class_names,
        drawn="split" not in header,
        test_fraction=config.test_fraction,
        notes=_notes(header, left_out),
    )


def _notes(header: list[str], left_out: list[str]) -> tuple[str, ...]:
    unknown = [name for name in header if name not in COLUMNS]
    notes = []
    if unknown:
        notes.append(
            f"ignored columns of the manifest: {', '.join(map(repr, unknown))} (known: "
            f"{', '.join(COLUMNS)})"
        )
    if left_out:
        notes.append(left_out_note(left_out))
    return tuple(notes)


def _read_rows(config: DataConfig, file: Path) -> tuple[list[str], list[_Row], list[str]]:
    """Header, rows that were checked one by one, and lines left out because of their paths."""
    rows: list[_Row] = []
    left_out: list[str] = []
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file} is larger than {MAX_BYTES} bytes: is it a manifest?")
        with file.open("rb") as raw:
            reader = csv.reader(_lines(file, raw), strict=True, skipinitialspace=True)
            header = _header(file, next(reader, []))
            for fields in filter(None, reader):
                row = _row(file, reader.line_num, header, fields)
                wrong = _wrong_name(row.path)
                if wrong and config.on_error == "fail":
                    raise UserError(
                        f"{file}, line {row.line}: the path {wrong}; correct it, or leave such "
                        "rows out with --on-error skip"
                    )
                if wrong:
                    left_out.append(f"line {row.line}")
                else:
                    rows.append(row)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise UserError(f"{file} has a header but no rows: add lines of {','.join(header)}")
    return header, rows, left_out


def _wrong_name(path: str) -> str | None:
    """Why a cache cannot store a path; None if it can."""
    if not is_printable(path):
        return "has a line break or another control character"
    too_long = len(path.encode()) > MAX_NAME_BYTES
    return f"has more than {MAX_NAME_BYTES} bytes" if too_long else None


def _lines(file: Path, raw: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file; anything that is not text is refused."""
    for number, line in enumerate(raw, start=1):
        if b"\0" in line:
            raise UserError(
                f"{file}, line {number}: has a NUL byte; save the file as text in UTF-8"
            )
        try:
            # Spreadsheets start the file with a byte order mark, which is not part of the header.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
            ) from error


def _header(file: Path, fields: list[str]) -> list[str]:
    header = [field.strip().lower() for field in fields]
    for name in header:
        meant = _meant(name, [column for column in COLUMNS if column not in header])
        if name not in COLUMNS and meant:
            raise UserError(f"{file}, line 1: column {name!r} is not known; rename it {meant!r}")
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise UserError(
            f"{file}, line 1: no column {' and '.join(map(repr, missing))}; the first line is "
            f"{','.join(fields)[:100]!r}, expected path,label[,split][,weight][,group]"
        )
    duplicates = [name for name in COLUMNS if header.count(name) > 1]
    if duplicates:
        raise UserError(f"{file}, line 1: duplicate column {duplicates[0]!r}; keep one")
    return header


def _meant(name: str, columns: list[str]) -> str | None:
    """The column that a name is a misspelling of: it has one letter too many, too few, or swapped.

    `height` is not a misspelling of weight, nor weight_kg.
    """
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.8)
    same_start = near and name[0] == near[0][0] and abs(len(name) - len(near[0])) <= 1
    return near[0] if same_start else None


def _row(file: Path, line: int, header: list[str], fields: list[str]) -> _Row:
    where = f"{file}, line {line}"
    if len(fields) != len(header):
        raise UserError(f"{where}: fields: {len(fields)}, but the header has {len(header)}")
    values = dict(zip(header, fields, strict=True))
    if len(values["label"]) > MAX_LABEL:
        raise UserError(f"{where}: the label is too long; at most {MAX_LABEL} characters")
    if not all(is_printable(value) for name, value in values.items() if name != "path"):
        raise UserError(f"{where}: a field has a line break or another control character")
    label, split = values["label"].strip(), values.get("split", "train").strip().lower()
    if not label:
        raise UserError(f"{where}: the label is empty; give every image a label")
    if "split" in header and split not in SPLIT_NAMES:
        raise UserError(f"{where}: split {values['split']!r:.80}; one of {', '.join(SPLIT_NAMES)}")
    weight = _weight(where, values["weight"]) if "weight" in header else 1.0
    split = SPLIT_NAMES[split] if "split" in header else ""
    group = values.get("group", "").strip()
    if "group" in header and not 0 < len(group) <= MAX_LABEL:
        raise UserError(
            f"{where}: group {group!r:.80}; give a name of 1 to {MAX_LABEL} characters, and an "
            "image that belongs to no other one of its own"
        )
    return _Row(line, values["path"], label, split, weight, group)


def _weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and 0 <= weight <= float(np.finfo(np.float32).max)):
        raise UserError(f"{where}: weight {text!r:.80}; give a number of 0 or more")
    return weight


class _ImageRoot:
    """The folder that a manifest's paths are relative to.

    Attributes:
        path: Absolute, links resolved.
    """

    def __init__(self, config: DataConfig, file: Path) -> None:
        given = file.parent if config.image_root is None else config.image_root
        if config.image_root is not None and not given.is_dir():
            raise UserError(f"--image-root {given} is not a folder that can be read; check it")
        self.path = os.path.realpath(given)
        self._file = file
        self._given = given
        self._name = "the manifest's folder" if config.image_root is None else "--image-root"
        self._anywhere = config.allow_outside
        self._must_exist = config.on_error == "fail"
        self._resolved: dict[str, str] = {}

    def check(self, rows: list[_Row]) -> None:
        """Refuse paths that repeat, leave the folder, or do not exist, as the settings say."""
        first: dict[str, int] = {}
        for row in rows:
            where = f"{self._file}, line {row.line}"
            if not row.path.strip():
                raise UserError(f"{where}: the path is empty")
            full = os.path.join(self.path, row.path)
            earlier = first.setdefault(posixpath.normpath(full), row.line)
            if earlier != row.line:
                raise UserError(
                    f"{where}: duplicate path {row.path}, first in line {earlier}; keep one"
                )
            if not self._anywhere:
                self._check_inside(where, row.path)
            if self._must_exist:
                _check_file(where, full, row.path)

    def _check_inside(self, where: str, path: str) -> None:
        if posixpath.isabs(path) or os.path.isabs(path):
            raise UserError(
                f"{where}: {path} is an absolute path; give it relative to {self._given}/, or "
                "add --allow-outside"
            )
        if not self._contains(path):
            raise UserError(
                f"{where}: {path} leaves {self._name}; paths must stay in {self._given}/: give the "
                "images' folder with --image-root, or add --allow-outside"
            )

    def _contains(self, path: str) -> bool:
        """Whether `path`, with links resolved, is below this folder."""
        head, tail = os.path.split(os.path.join(self.path, path))
        if head not in self._resolved:
            self._resolved[head] = os.path.realpath(head)
        full = os.path.join(self._resolved[head], tail)
        if tail in ("", ".", "..") or os.path.islink(full):
            full = os.path.realpath(full)
        return full.startswith(os.path.join(self.path, ""))


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


def _check_splits(config: DataConfig, file: Path, header: list[str], split_names: set[str]) -> None:
    if "group" in header and config.group_from is not None:
        raise UserError(f"{file} has its own column group: leave out --group-from")
    if "split" not in header:
        if config.test_fraction is None:
            raise UserError(
                f"{file} has no column split: say which fraction to set aside for testing, for "
                "example --test-fraction 0.2, or add the column with train and test"
            )
        return
    if config.test_fraction is not None:
        raise UserError(f"{file} has its own column split: leave out --test-fraction")
    if "train" not in split_names or len(split_names) == 1:
        lacking = "train" if "train" not in split_names else "test"
        raise UserError(
            f"{file}: no row has split {lacking}; train and test are needed "
            "(val is used if there is no test)"
        )


def _check_classes(file: Path, rows: list[_Row], class_names: list[str]) -> None:
    if len(class_names) < 2:
        raise UserError(
            f"{file}: the train rows have only one label, {class_names[0]!r}: a classifier needs "
            "at least two"
        )
    known = set(class_names)
    for row in sorted(rows, key=lambda row: row.line):
        if row.label not in known:
            pairs = [pair for pair in look_alikes([*class_names, row.label]) if row.label in pair]
            alike = f" ({alike_text(pairs)})" if pairs else ""
            raise UserError(
                f"{file}, line {row.line}: label {row.label!r} has no train row{alike}; add one "
                "or correct the label"
            )

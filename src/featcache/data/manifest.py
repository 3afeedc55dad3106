"""CSV manifests: columns path,label[,split][,weight][,group], paths relative to their folder.

Instead of one label, images may have a column labels (`red|round`; empty for none) or a number in a
column target.
"""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from featcache.config import DataConfig, Task
from featcache.config.checks import is_printable
from featcache.data.dataset import ImageDataset, ImageSplit, Int64, short_name
from featcache.data.listing import (
    MAX_NAME_BYTES,
    SPLIT_NAMES,
    ImageRoot,
    alike_text,
    left_out_note,
    look_alikes,
)
from featcache.data.sampling import split_off_test
from featcache.data.sources import FileSource
from featcache.errors import UserError
from featcache.file_hashes import Memo

TASKS: dict[str, Task] = {
    "label": "multiclass",
    "labels": "multilabel",
    "target": "regression",
}
"""By the column that says what an image is; a manifest has exactly one of them."""
COLUMNS = ("path", *TASKS, "split", "weight", "group")
BETWEEN_LABELS = "|"
MAX_LABEL = 256
MAX_BYTES = 2**30


class _Row(NamedTuple):
    line: int
    path: str
    labels: tuple[str, ...]
    target: float
    split: str
    weight: float
    group: str


class _Labeling(NamedTuple):
    """What images are labeled with."""

    task: Task
    class_names: list[str]

    @classmethod
    def of(cls, file: Path, header: list[str], rows: list[_Row]) -> Self:
        """Find the classes in the train rows, and check that no other row has another."""
        task = next(task for column, task in TASKS.items() if column in header)
        if task == "regression":
            return cls(task, ["target"])
        train = [row for row in rows if row.split in ("train", "")]
        class_names = sorted({name for row in train for name in row.labels})
        _check_classes(file, rows, class_names, task)
        return cls(task, class_names)

    def labels(self, rows: list[_Row]) -> Int64:
        """Class numbers [N]; 0 where rows have no single class."""
        if self.task != "multiclass":
            return np.zeros(len(rows), np.int64)
        number = {name: label for label, name in enumerate(self.class_names)}
        return np.array([number[row.labels[0]] for row in rows], np.int64)

    def targets(self, rows: list[_Row]) -> NDArray[Any] | None:
        """As in `ImageSplit`."""
        if self.task == "multiclass":
            return None
        if self.task == "regression":
            return np.array([row.target for row in rows])
        number = {name: label for label, name in enumerate(self.class_names)}
        multihot = np.zeros((len(rows), len(number)), np.uint8)
        for line, row in zip(multihot, rows, strict=True):
            line[[number[name] for name in row.labels]] = 1
        return multihot

    def notes(self, rows: list[_Row]) -> tuple[str, ...]:
        """Say so if the other column for labels seems to be meant."""
        if self.task == "multiclass" and any(BETWEEN_LABELS in name for name in self.class_names):
            return (
                f"labels with {BETWEEN_LABELS} in them are classes of their own: if images have "
                "several labels, rename the column label to labels",
            )
        if self.task == "multilabel" and all(len(row.labels) == 1 for row in rows):
            return (
                "every image has exactly one label: rename the column labels to label for one "
                "class per image",
            )
        return ()


def load_manifest(config: DataConfig, file: Path, memo: Memo) -> ImageDataset:
    """Read a manifest.

    Paths are relative to the manifest's folder or --image-root and must stay in it, links
    resolved, unless --allow-outside is given. A split column says train, test or val; if
    there is no test, val is used as test. Without that column --test-fraction sets a part aside.

    Raises:
        UserError: Something is wrong with it; the message names the line.
    """
    header, rows, left_out = _read_rows(config, file)
    root = ImageRoot(config, file)
    root.check([(row.line, row.path) for row in rows])
    rows = sorted(rows, key=lambda row: row.path)
    split_names = {row.split for row in rows}
    _check_splits(config, file, header, split_names)
    what = _Labeling.of(file, header, rows)

    def split_of(name: str, chosen: list[_Row]) -> ImageSplit:
        return ImageSplit(
            name,
            [r.path for r in chosen],
            what.labels(chosen),
            FileSource([os.path.join(root.path, r.path) for r in chosen], memo, root.path),
            weights=np.array([r.weight for r in chosen]) if "weight" in header else None,
            groups=[r.group for r in chosen] if "group" in header else None,
            targets=what.targets(chosen),
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
        what.class_names,
        drawn="split" not in header,
        test_fraction=config.test_fraction,
        notes=(*_notes(header, left_out), *what.notes(rows)),
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
    what = [name for name in TASKS if name in header]
    missing = [name for name in ("path", *([] if what else ["label"])) if name not in header]
    if missing:
        raise UserError(
            f"{file}, line 1: no column {' and '.join(map(repr, missing))}; the first line is "
            f"{','.join(fields)[:100]!r}, expected path,label[,split][,weight][,group] (or labels "
            "or target instead of label)"
        )
    if len(what) > 1:
        raise UserError(f"{file}, line 1: columns {' and '.join(what)}; keep one of them")
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
    if not is_printable("".join([value for name, value in values.items() if name != "path"])):
        raise UserError(f"{where}: a field has a line break or another control character")
    labels, target = _labels(where, values), 0.0
    if "target" in values:
        target = _number(where, "target", values["target"])
    split = values.get("split", "train").strip().lower()
    if "split" in header and split not in SPLIT_NAMES:
        raise UserError(f"{where}: split {values['split']!r:.80}; one of {', '.join(SPLIT_NAMES)}")
    weight = _number(where, "weight", values["weight"]) if "weight" in header else 1.0
    if not 0 <= weight <= float(np.finfo(np.float32).max):
        raise UserError(f"{where}: weight {values['weight']!r:.80}; give a number of 0 or more")
    split = SPLIT_NAMES[split] if "split" in header else ""
    group = values.get("group", "").strip()
    if "group" in header and not 0 < len(group) <= MAX_LABEL:
        raise UserError(
            f"{where}: group {group!r:.80}; give a name of 1 to {MAX_LABEL} characters, and an "
            "image that belongs to no other one of its own"
        )
    return _Row(line, values["path"], labels, target, split, weight, group)


def _labels(where: str, values: dict[str, str]) -> tuple[str, ...]:
    """The image's labels: one, or any number of different ones; none where it has a number."""
    if "label" in values:
        names = [values["label"].strip()]
    else:
        text = values.get("labels", "").strip()
        names = [name.strip() for name in text.split(BETWEEN_LABELS)] if text else []
    if "" in names:
        every = "give every image a label" if "label" in values else "write a|b, or leave it empty"
        raise UserError(f"{where}: the label is empty; {every}")
    if any(len(name) > MAX_LABEL for name in names):
        raise UserError(f"{where}: the label is too long; at most {MAX_LABEL} characters")
    return tuple(dict.fromkeys(names))


def _number(where: str, column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        least = " of 0 or more" if column == "weight" else ""
        raise UserError(f"{where}: {column} {text!r:.80}; give a number{least}")
    return number


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


def _check_classes(file: Path, rows: list[_Row], class_names: list[str], task: Task) -> None:
    if not class_names:
        raise UserError(f"{file}: no train row has a label; give some of them labels")
    if len(class_names) < 2 and task == "multiclass":
        raise UserError(
            f"{file}: the train rows have only one label, {class_names[0]!r}: a classifier needs "
            "at least two"
        )
    known = set(class_names)
    for row in sorted(rows, key=lambda row: row.line):
        for name in row.labels:
            if name not in known:
                pairs = [pair for pair in look_alikes([*class_names, name]) if name in pair]
                alike = f" ({alike_text(pairs)})" if pairs else ""
                raise UserError(
                    f"{file}, line {row.line}: label {name!r} has no train row{alike}; add one or "
                    "correct the label"
                )

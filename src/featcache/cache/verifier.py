"""`featcache verify`: every check of a cache, and which rows are damaged."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.cache.cross_check import CrossCheckUnavailable, cross_check_hdf5
from featcache.cache.fileio import RESUME, read_at, reading
from featcache.cache.layout import HDF5_SIGNATURE
from featcache.cache.schema import block_range
from featcache.cache.storage import HDF5_STRUCTURE, CacheFile, texts_of
from featcache.config import JsonObject
from featcache.errors import CacheError
from featcache.files import open_regular

MAX_NAMED = 20


@dataclass
class VerifyReport:
    """What verification found.

    Attributes:
        path: The file.
        finished: Whether it is whole; a file that is being written is not, but not damaged either.
        problems: What is wrong, one line each; empty for a sound file.
        not_checked: What could not be checked here, which says nothing about the file.
        damaged: Rows of each split (ranges, skipped samples counted) whose features are damaged.
        repairable: Whether only features, checksums or the HDF5 library's own bytes are damaged.
        num_rows: Rows of each split.
        num_blocks: Blocks in the file.
        num_blocks_done: Blocks that are marked as written.
    """

    path: Path
    finished: bool = False
    problems: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    damaged: dict[str, list[range]] = field(default_factory=dict)
    repairable: bool = False
    num_rows: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 0
    num_blocks_done: int = 0

    @property
    def ok(self) -> bool:
        """Whether the file is finished, and sound as far as could be checked."""
        return self.finished and not self.problems

    def to_dict(self) -> JsonObject:
        """For JSON; row ranges as [first, last]."""
        damaged = {s: [[r.start, r.stop - 1] for r in rows] for s, rows in self.damaged.items()}
        values = {**dataclasses.asdict(self), "damaged": damaged, "path": str(self.path)}
        return {"ok": self.ok, **values}


def verify(path: Path | str, *, cross_check: bool = True) -> VerifyReport:
    """Check structure, fixed data, every block, labels, ids and features of a cache.

    No file makes it crash, hang, or take memory beyond the size of the fixed data.

    Args:
        path: A finished cache, or the .part of an unfinished one.
        cross_check: Also compare with what the HDF5 library sees, in a limited child process.

    Returns:
        The report; a file that is not a cache at all has that as its one problem.

    Raises:
        CacheError: There is no ordinary file of that name.
        StorageError: The file system failed.
    """
    report = VerifyReport(Path(path))
    _check_readable(report.path)
    try:
        file = CacheFile(report.path)
    except CacheError as error:
        report.problems.append(str(error))
        return report
    _check_fixed(file, report)
    report.repairable = not [p for p in report.problems if p != _STRUCTURE]
    for split in file.layout.splits:
        _check_split(file, split, report)
    _check_finished(file, report)
    if cross_check:
        _cross_check(file, report)
    return report


def _cross_check(file: CacheFile, report: VerifyReport) -> None:
    try:
        if difference := cross_check_hdf5(report.path, file.layout):
            report.problems.append(f"other HDF5 tools see something different: {difference}")
    except CrossCheckUnavailable as error:
        report.not_checked.append(f"whether other HDF5 tools see the same ({error})")


_STRUCTURE = "HDF5 structure is damaged: featcache can read the file, other HDF5 tools may not"


def _check_readable(path: Path) -> None:
    with reading(path):
        os.close(open_regular(path))


def _check_fixed(file: CacheFile, report: VerifyReport) -> None:
    """Check everything that was known before extraction."""
    damaged = file.damaged_parts()
    report.problems += [f"{name} is damaged" for name in damaged if name != HDF5_STRUCTURE]
    with reading(file.path):
        signature = read_at(file.fd, len(HDF5_SIGNATURE), 0)
    if HDF5_STRUCTURE in damaged:
        report.problems.append(_STRUCTURE)
    elif signature != HDF5_SIGNATURE:
        report.problems.append("it is not an HDF5 file: the signature is missing")
    for check in (lambda: file.meta, lambda: _check_class_names(file)):
        try:
            check()
        except CacheError as error:
            report.problems.append(str(error))
    for split in file.layout.splits:
        report.num_rows[split] = file.layout.num_rows(split)
        report.problems += _problems_of_rows(file, split)


def _check_class_names(file: CacheFile) -> None:
    names = texts_of(file.array("class_names"), file.path)
    if len(set(names)) < len(names):
        raise CacheError("duplicate class name")


def _problems_of_rows(file: CacheFile, split: str) -> list[str]:
    problems = []
    labels, ids = file.array(f"{split}/labels"), file.array(f"{split}/ids")
    num_classes = file.layout.extents["class_names"].shape[0]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        problems.append(f"{split}: {len(wrong)} labels are not a class, first in row {wrong[0]}")
    columns = {name: file.array(f"{split}/{name}") for name in file.layout.columns(split)}
    for texts in (ids, columns.get("groups", ids[:0])):
        try:
            texts_of(texts, file.path)
        except CacheError as error:
            problems.append(f"{split}: {error}")
    if len(np.unique(ids)) < len(ids):
        problems.append(f"{split}: duplicate id")
    weights = columns.get("weights", np.zeros(0))
    if not (np.isfinite(weights) & (weights >= 0)).all():
        problems.append(f"{split}: a sample weight is negative or not finite")
    if not np.isfinite(columns.get("targets", np.zeros(0))).all():
        problems.append(f"{split}: a target is not finite")
    if (columns.get("multihot", np.zeros(0)) > 1).any():
        problems.append(f"{split}: multihot has values other than 0 and 1")
    return problems


def _check_split(file: CacheFile, split: str, report: VerifyReport) -> None:
    """Check every block that is marked as written: its checksum and its features."""
    num_rows = file.layout.num_rows(split)
    state, crc = file.array(f"{split}/state"), file.array(f"{split}/crc32")
    status, ids = file.array(f"{split}/row_status"), file.array(f"{split}/ids")
    report.num_blocks += len(state)
    report.num_blocks_done += int((state == 1).sum())
    if ((state != 0) & (state != 1)).any():
        report.problems.append(f"{split}: a block's mark is neither 0 nor 1")
    for block in np.flatnonzero(state == 1).tolist():
        rows = block_range(block, num_rows)
        if file.crc_of(split, block) == crc[block]:
            what = _impossible(file, split, rows, status)
        else:
            what = "fail their checksum"
        if what:
            report.damaged.setdefault(split, []).append(rows)
            if len(report.damaged[split]) <= MAX_NAMED:
                report.problems.append(
                    f"{split}: rows {rows.start} to {rows.stop - 1} {what} "
                    f"(from {ids[rows.start].decode(errors='replace')!r})"
                )
    more = len(report.damaged.get(split, ())) - MAX_NAMED
    if more > 0:
        report.problems.append(f"{split}: and {more} more blocks of rows")


def _impossible(
    file: CacheFile, split: str, rows: range, status: npt.NDArray[np.uint8]
) -> str | None:
    """Features that the writer would not have written."""
    skipped = status[rows.start : rows.stop] != 0
    for view in range(file.layout.num_views):
        features = file.view_rows(split, view, rows)
        if not np.isfinite(features).all():
            return "have features that are not finite"
        if features[skipped].any():
            return "have features where the sample was skipped"
    return None


def _check_finished(file: CacheFile, report: VerifyReport) -> None:
    done, num = report.num_blocks_done, report.num_blocks
    report.finished = done == num and not report.path.name.endswith(".part")
    if not report.finished:
        report.problems.append(f"unfinished: {done} of {num} blocks are written; {RESUME}")
    elif file.array("digest").tobytes() != file.digest() and not report.problems:
        report.problems.append("a mark, a checksum or the digest is damaged: --repair rewrites it")

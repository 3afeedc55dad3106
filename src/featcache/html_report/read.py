"""Reading report files of any command; files are data from strangers and checked as such."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.files import read_regular
from featcache.results import CurvePoint, CurveRun, Row, RunReport, curve_from_json
from featcache.results.runs import MAX_BYTES

MAX_FILES = 5000
MAX_CLASSES = 100_000
MAX_SECONDS = 1e10
MAX_COUNT = 10**15
AGAIN = "give the .json that train-head, finetune, compare or benchmark.py wrote"
TRAINING = ("train-head", "finetune")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` wrote."""

    path: Path
    points: list[CurvePoint]
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What benchmark.py wrote."""

    path: Path
    rows: list[Row]
    values: dict[str, Any]


@dataclass(kw_only=True)
class Found:
    """Everything read.

    Attributes:
        runs: Single training runs with their files, those of comparisons included.
        comparisons: Learning curves.
        benchmarks: The notebook's tables.
        extractions: Seconds that extraction took, by the cache's digest or, where a file does not
            name it, the cache's file name.
        ignored: Files in a folder that are none of these.
    """

    runs: list[tuple[Path, RunReport]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    extractions: dict[str, float] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        """How many report files this is."""
        return len(self.runs) + len(self.comparisons) + len(self.benchmarks)


def read_runs(paths: Sequence[Path]) -> Found:
    """Read report files and folders of them.

    A file that is named has to be a report; in a folder, other files are passed over.

    Raises:
        UserError: A named file is no report, or there is none at all; in one line, naming it.
    """
    found, seen = Found(), set[Path]()
    for path in paths:
        if path.is_dir():
            for file in _files_in(path):
                _take(found, file, seen, named=False)
        else:
            _take(found, path, seen, named=True)
    for comparison in list(found.comparisons):
        for file in _runs_beside(comparison):
            _take(found, file, seen, named=False)
    if not found.num_files:
        where = ", ".join(str(path) for path in paths[:3])
        raise UserError(f"no report of a training run in {where}; {AGAIN}")
    return found


def _files_in(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*.json"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if len(files) > MAX_FILES:
        raise UserError(
            f"{folder} has {len(files):,} .json files, more than {MAX_FILES:,}: name a folder that "
            "holds reports alone"
        )
    return files


def _runs_beside(comparison: Comparison) -> Iterable[Path]:
    """The single runs that a comparison names, in its own folder only."""
    names = comparison.values.get("runs")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and re.fullmatch(r"runs/[\w-]{1,100}\.json", name):
            file = comparison.path.parent / name
            if file.is_file():
                yield file


def _take(found: Found, file: Path, seen: set[Path], *, named: bool) -> None:
    """Read one file into what was found."""
    key = file.absolute()
    if key in seen:
        return
    seen.add(key)
    try:
        _sort_in(found, file, _parsed(file))
    except UserError as error:
        if named:
            raise
        found.ignored.append(file)
        del error  # a folder may hold other things


def _parsed(file: Path) -> dict[str, Any]:
    try:
        text = read_regular(file, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"there is no file or folder {file}; check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check the path") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON; {AGAIN}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a report; {AGAIN}")
    return values


def _sort_in(found: Found, file: Path, values: dict[str, Any]) -> None:
    command = values.get("command")
    try:
        if command == "compare":
            points = curve_from_json(values["points"])
            _check_texts(values, "advice", "notes")
            found.comparisons.append(Comparison(path=file, points=points, values=values))
        elif command in TRAINING:
            report = RunReport.from_dict(values)
            check_run(report)
            found.runs.append((file, report))
        elif command == "extract-features":
            _take_extraction(found, values)
        elif isinstance(values.get("rows"), list):
            _check_texts(values, "advice", "notes")
            rows = [_row(row) for row in values["rows"]]
            found.benchmarks.append(Benchmark(path=file, rows=rows, values=values))
        else:
            raise UserError("it is of no command that trains")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is not a report that can be read ({reason}); {AGAIN}") from error


def _take_extraction(found: Found, values: dict[str, Any]) -> None:
    """What an extraction took, unless that is not known or it found its cache finished."""
    key = str(values.get("cache_digest") or Path(str(values["cache"])).name)
    seconds = values["seconds_total"]
    if seconds is not None and not values.get("hit"):
        found.extractions[key] = _seconds(seconds)


def _check_texts(values: dict[str, Any], *names: str) -> None:
    for name in names:
        texts = values.setdefault(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{name} is no list of sentences")


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{value!r:.40} is not a number")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _finite(value) <= 1:
        raise UserError(f"{value!r:.40} is not a share from 0 to 1")
    return float(value)


def _known_share(value: Any) -> float | None:
    return None if value is None else _share(value)


def _seconds(value: Any) -> float:
    if not 0 <= _finite(value) <= MAX_SECONDS:
        raise UserError(f"{value!r:.40} are not seconds")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise UserError(f"{value!r:.40} is not a count")
    return value


def _row(value: dict[str, Any]) -> Row:
    """A line of a benchmark's table."""
    low, high = value["test_interval"]
    approach = value["approach"]
    if approach not in ("loop", "cached", "finetune"):
        raise UserError(f"approach {approach!r:.40}")
    return Row(
        mode=str(value["mode"]),
        approach=approach,
        trainable_params=_count(value["trainable_params"]),
        test_top1=_share(value["test_top1"]),
        test_interval=(_share(low), _share(high)),
        num_test=_count(value["num_test"]),
        seconds_total=_seconds(value["seconds_total"]),
        seconds_per_epoch=_seconds(value["seconds_per_epoch"]),
        images_per_s=_finite(value["images_per_s"]),
        extract_seconds=_seconds(value.get("extract_seconds", 0.0)),
        num_epochs=_count(value.get("num_epochs", 0)),
        points=tuple((_seconds(s), _share(t)) for s, t in value.get("points", ())),
        baseline_top1=_known_share(value.get("baseline_top1")),
        balanced_top1=_known_share(value.get("balanced_top1")),
        imbalanced=value.get("imbalanced") is True,
    )


def check_run(report: RunReport) -> None:
    """See that a run's report holds what a page needs, of the right types.

    Raises:
        UserError: It does not.
    """
    for name in ("config", "provenance", "environment"):
        if not isinstance(getattr(report, name), dict):
            raise UserError(f"{name} is no table")
    for count in (
        report.trainable_params,
        report.more.get("num_train"),
        report.more.get("num_test"),
    ):
        _count(count)
    _seconds(report.seconds_total)
    for share in (report.test_top1, *report.test_interval):
        _share(share)
    for name in ("scored_on", "chosen_on"):
        if not isinstance(getattr(report, name), str):
            raise UserError(f"{name} is no text")
    for epoch in report.epochs:
        _seconds(epoch["seconds"])
        _seconds(epoch.get("eval_seconds", 0.0))
        if epoch.get("test_top1") is not None:
            _share(epoch["test_top1"])
    _check_predictions(report)
    _check_extraction(report.more.get("extraction"))
    if "cell" in report.more:
        _seconds(CurveRun.from_report(report).cost_seconds)
        _seconds(CurveRun.from_report(report).trial_seconds)


def _check_extraction(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or not isinstance(value.get("config") or {}, dict):
        raise UserError("extraction is no table")
    if value.get("seconds") is not None:
        _seconds(value["seconds"])


def _check_predictions(report: RunReport) -> None:
    names, test = report.class_names, report.test
    if names is not None and (
        not isinstance(names, list)
        or not 0 < len(names) <= MAX_CLASSES
        or not all(isinstance(name, str) for name in names)
    ):
        raise UserError("class_names is no list of names")
    if test is None:
        return
    if names is None:
        raise UserError("it has predictions but no class_names")
    if not all(isinstance(name, str) for name in test.ids):
        raise UserError("the ids of the test images are no texts")
    for numbers in (test.labels, test.predicted):
        if not all(type(number) is int and 0 <= number < len(names) for number in numbers):
            raise UserError("a test label is not the number of a class")
    for confidence in test.confidence:
        _share(confidence)

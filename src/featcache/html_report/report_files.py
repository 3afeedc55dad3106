"""Reading report files of any command; they may come from strangers, so every field is checked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from featcache.config import JsonObject
from featcache.errors import UserError
from featcache.files import read_regular
from featcache.results import Row, RunReport
from featcache.results.curve_json import curve_from_json
from featcache.results.learning_curve import CurvePoint, CurveRun
from featcache.results.runs import MAX_BYTES, Approach

MAX_FILES = 5000
MAX_CLASSES = 100_000
HINT = "give the .json that train-head, finetune, compare or benchmark.py wrote"
TRAINING = ("train-head", "finetune")

Check = Callable[[Any], object]
"""Raises UserError for a value of the wrong type or out of range."""


def of_type(kind: type, name: str) -> Check:
    """A value of one JSON type."""

    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise UserError(f"{value!r:.40} is not {name}")

    return check


def number(high: float, kind: type = float) -> Check:
    """A number from 0 to `high`; a whole one if `kind` is int."""

    def check(value: Any) -> None:
        # NaN fails the comparison; integers too large for a float do not break it.
        if type(value) not in (int, kind) or not 0 <= value <= high:
            raise UserError(f"{value!r:.40} is not a number from 0 to {high:g}")

    return check


def each(check: Check, sizes: range = range(10**9)) -> Check:
    """A list of one of the sizes, whose items all pass."""

    def check_list(value: Any) -> None:
        if not isinstance(value, list) or len(value) not in sizes:
            raise UserError(f"{value!r:.40} is not a list of {sizes[0]} to {sizes[-1]} items")
        for item in value:
            check(item)

    return check_list


def record(fields: dict[str, Check]) -> Check:
    """An object whose fields pass; extra fields are allowed.

    Args:
        fields: A check for one or more names, separated by spaces; a name with a "?" may be null
            or missing.
    """
    checks = [(name, check) for names, check in fields.items() for name in names.split()]

    def check_record(value: Any) -> None:
        OBJECT(value)
        for name, check in checks:
            field_value = value.get(name.rstrip("?"))
            try:
                if field_value is not None or not name.endswith("?"):
                    check(field_value)
            except UserError as error:
                raise UserError(f"{name.rstrip('?')}: {error}") from error

    return check_record


OBJECT, TEXT, FLAG = (
    of_type(dict, "an object"),
    of_type(str, "text"),
    of_type(bool, "true or false"),
)
SHARE, SECONDS, COUNT = number(1.0), number(1e10), number(1e15, int)
INTERVAL = each(SHARE, range(2, 3))


def check_point(value: Any) -> None:
    """Seconds and accuracy."""
    each(SECONDS, range(2, 3))(value)
    SHARE(value[1])


check_run = record(
    {
        "config environment recipe?": OBJECT,
        "provenance": record({"dataset?": OBJECT, "backbone?": record({"preprocessing?": OBJECT})}),
        "trainable_params num_train num_test": COUNT,
        "test_top1?": SHARE,
        "test_interval?": INTERVAL,
        "seconds_total": SECONDS,
        "scored_on chosen_on": TEXT,
        "epochs": each(record({"seconds eval_seconds?": SECONDS, "test_top1?": SHARE})),
        "class_names?": each(TEXT, range(1, MAX_CLASSES + 1)),
        "test?": record(
            {"ids": each(TEXT), "labels predicted": each(COUNT), "confidence": each(SHARE)}
        ),
        "extraction?": record({"config?": OBJECT, "seconds?": SECONDS}),
        "fit_seconds?": SECONDS,
        "features?": TEXT,
        "cell?": record({"cost_seconds trial_seconds": SECONDS}),
        "run?": TEXT,
        "scores? calibration? target_scores?": OBJECT,
        "rejections?": each(record({"level unknown": SHARE, "answered_top1?": SHARE})),
    }
)
check_row = record(
    {
        "mode run?": TEXT,
        "approach": TEXT,
        "trainable_params num_test num_epochs?": COUNT,
        "test_top1 baseline_top1? balanced_top1?": SHARE,
        "test_interval": INTERVAL,
        "seconds_total seconds_per_epoch eval_seconds_per_epoch? extract_seconds?": SECONDS,
        "images_per_s": SECONDS,
        "points?": each(check_point),
        "imbalanced?": FLAG,
    }
)
check_summary = record(
    {
        "advice? notes?": each(TEXT),
        "dataset? typed?": TEXT,
        "environment? config?": OBJECT,
        "rows?": each(check_row),
        "runs?": of_type(list, "a list"),
    }
)
check_extraction = record({"seconds_total?": SECONDS, "cache cache_digest?": TEXT})


@dataclass(frozen=True, kw_only=True)
class Run:
    """The report of one training run, with its file."""

    path: Path
    report: RunReport


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `compare` or benchmark.py wrote about several runs.

    `points` are the learning curve that `compare` drew, `rows` the table that benchmark.py made;
    `runs` are the names of a comparison's files, `typed` the benchmark's command.
    """

    path: Path
    points: list[CurvePoint] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dataset: str = ""
    environment: JsonObject = field(default_factory=dict)
    config: JsonObject = field(default_factory=dict)
    runs: list[Any] = field(default_factory=list)
    typed: str | None = None


@dataclass(kw_only=True)
class ReportFiles:
    """Everything read.

    Attributes:
        runs: Training runs, those of comparisons included.
        target_runs: Training runs on images with several labels or a number.
        comparisons: Learning curves.
        benchmarks: Tables of benchmark.py.
        extractions: Seconds that extraction took, by the cache's digest or, where a file does not
            name it, the cache's file name.
        ignored: Files in a folder that are none of these.
    """

    runs: list[Run] = field(default_factory=list)
    target_runs: list[Run] = field(default_factory=list)
    comparisons: list[Summary] = field(default_factory=list)
    benchmarks: list[Summary] = field(default_factory=list)
    extractions: dict[str, float] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)

    @property
    def summaries(self) -> list[Summary]:
        """Comparisons, then benchmarks."""
        return [*self.comparisons, *self.benchmarks]

    @property
    def num_files(self) -> int:
        """Number of report files."""
        return len(self.runs) + len(self.target_runs) + len(self.summaries)


def read_report_files(paths: Sequence[Path]) -> ReportFiles:
    """Read report files and folders of them.

    A file that is named has to be a report; in a folder, other files are skipped.

    Raises:
        UserError: A named file is not a report, or there is none at all; in one line, naming it.
    """
    files, seen = ReportFiles(), set[Path]()
    for path in paths:
        if path.is_dir():
            for file in _files_in(path):
                _read(files, file, seen, named=False)
        else:
            _read(files, path, seen, named=True)
    for comparison in list(files.comparisons):
        for file in _runs_of(comparison):
            _read(files, file, seen, named=False)
    if not files.num_files:
        where = ", ".join(str(path) for path in paths[:3])
        raise UserError(f"no report of a training run in {where}; {HINT}")
    return files


def _files_in(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*.json"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if len(files) > MAX_FILES:
        raise UserError(
            f"{folder} has {len(files):,} .json files, more than {MAX_FILES:,}: name a folder that "
            "holds only reports"
        )
    return files


def _runs_of(comparison: Summary) -> Iterable[Path]:
    """The runs that a comparison names, in its own folder only."""
    for name in comparison.runs:
        if isinstance(name, str) and re.fullmatch(r"runs/[\w-]{1,100}\.json", name):
            file = comparison.path.parent / name
            if file.is_file():
                yield file


def _read(files: ReportFiles, file: Path, seen: set[Path], *, named: bool) -> None:
    """Read one file, once; a file that the user did not name may be something else."""
    if file.absolute() in seen:
        return
    seen.add(file.absolute())
    try:
        _add(files, file, _parsed(file))
    except UserError:
        if named:
            raise
        files.ignored.append(file)


def _parsed(file: Path) -> JsonObject:
    try:
        text = read_regular(file, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"there is no file or folder {file}; check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check the path") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON; {HINT}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a report; {HINT}")
    return values


def _add(files: ReportFiles, file: Path, values: JsonObject) -> None:
    command = values.get("command")
    try:
        if command == "compare":
            files.comparisons.append(_summary(file, values))
        elif command in TRAINING:
            run = _run(file, values)
            (files.runs if run.report.target_scores is None else files.target_runs).append(run)
        elif command == "extract-features":
            _add_extraction(files, values)
        elif "rows" in values:
            files.benchmarks.append(_summary(file, values))
        else:
            raise UserError("no command that trains wrote it")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is not a readable report ({reason}); {HINT}") from error


def _add_extraction(files: ReportFiles, values: JsonObject) -> None:
    """The time an extraction took, unless it is unknown or the cache was already complete."""
    check_extraction(values)
    key = str(values.get("cache_digest") or Path(values["cache"]).name)
    if values.get("seconds_total") is not None and not values.get("hit"):
        files.extractions[key] = float(values["seconds_total"])


def _run(file: Path, values: JsonObject) -> Run:
    check_run(values)
    # Null means missing, but readers of epochs expect numbers.
    epochs = [{k: v for k, v in epoch.items() if v is not None} for epoch in values["epochs"]]
    report = RunReport.from_dict({**values, "epochs": epochs})
    if report.target_scores is None and None in (report.test_top1, report.test_interval):
        raise UserError("it has no score")
    if report.test is not None:
        if report.class_names is None:
            raise UserError("it has predictions but no class_names")
        if max([*report.test.labels, *report.test.predicted], default=0) >= len(report.class_names):
            raise UserError("a label in test is not the number of a class")
    if "cell" in report.more:
        CurveRun.from_report(report)  # checks the rest of it
    return Run(path=file, report=report)


def _summary(file: Path, values: JsonObject) -> Summary:
    check_summary(values)
    known = {f.name for f in dataclasses.fields(Summary)} - {"path", "points", "rows"}
    return Summary(
        path=file,
        points=curve_from_json(values["points"]) if values.get("command") == "compare" else [],
        rows=[_row(row) for row in values.get("rows") or ()],
        **{name: values[name] for name in known if values.get(name) is not None},
    )


def _row(values: JsonObject) -> Row:
    if values["approach"] not in get_args(Approach):
        raise UserError(f"approach {values['approach']!r:.40}")
    names = [item.name for item in dataclasses.fields(Row)]
    known = {name: values[name] for name in names if values.get(name) is not None}
    known["test_interval"] = tuple(values["test_interval"])
    known["points"] = tuple((seconds, top1) for seconds, top1 in known.get("points", ()))
    return Row(**known)

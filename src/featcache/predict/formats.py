"""Predictions as text: a table for people, CSV and JSON lines for programs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from featcache.config import Format
from featcache.errors import visible
from featcache.files import replacing, storage_errors
from featcache.predict.classifier import Prediction
from featcache.streams import stdout_errors

MAX_PATH_WIDTH = 60
MARKS = re.compile(
    rb"\Apicture +label +probability\n|\Apath,label,probability\b"
    rb'|\A\{"path": .*"probability": .*"topk": \[\{"label": '
)
"""How tables, CSV and JSON lines of predictions begin."""
NUMBER = re.compile(r"[+-]\d+([.]\d+)?", re.ASCII)

Write = Callable[[str, Prediction], None]


def prediction_json(path: str, prediction: Prediction) -> dict[str, Any]:
    """One prediction as a JSON object."""
    return {
        "path": path,
        "label": prediction.label,
        "probability": prediction.probability,
        "topk": [{"label": name, "probability": value} for name, value in prediction.topk],
    }


def format_of(given: Format | None, output: Path | None) -> Format:
    """The format asked for, or that of the output's name."""
    by_name: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    return given or by_name.get(output.suffix.lower() if output else "", "table")


@contextlib.contextmanager
def prediction_writer(
    kind: Format, output: Path | None, paths: Sequence[str], class_names: Sequence[str], topk: int
) -> Iterator[Write]:
    """Write predictions as they come; a file appears whole in the end or not at all.

    Args:
        kind: table, csv or jsonl.
        output: A file, or standard output where there is none.
        paths: Of every picture that may come, for the width of columns.
        class_names: Likewise.
        topk: Classes per prediction.

    Yields:
        A function of path and prediction.

    Raises:
        StorageError: The file system refused.
    """
    topk = min(topk, len(class_names))
    if kind == "table":
        header, text = _table(paths, class_names, topk)
    elif kind == "csv":
        header, text = _csv(topk)
    else:
        header, text = "", _json_line
    with _target(output) as write:
        write(header)
        yield lambda path, prediction: write(text(path, prediction))


@contextlib.contextmanager
def _target(output: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes text; file names that are not UTF-8 come out as they went in."""
    if output is None:
        # A terminal gets no control characters; programs get names as they are.
        shown = _visible_line if sys.stdout.isatty() else str

        def put(text: str) -> None:
            with stdout_errors():
                _put(sys.stdout.buffer, shown(text))
                sys.stdout.buffer.flush()  # a closed or full output ends the run at the first row

        yield put
        return
    with contextlib.ExitStack() as stack:
        with storage_errors(output):
            draft = stack.enter_context(replacing(output))
            file = stack.enter_context(draft.open("wb"))

        def write(text: str) -> None:
            with storage_errors(output):
                _put(file, text)

        yield write
        with storage_errors(output):
            file.close()
            stack.close()


def _visible_line(text: str) -> str:
    return visible(text.removesuffix("\n")) + "\n" * text.endswith("\n")


def _put(file: BinaryIO, text: str) -> None:
    try:
        file.write(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a character that is not from a file's name
        file.write(text.encode("utf-8", "backslashreplace"))


def _table(
    paths: Sequence[str], class_names: Sequence[str], topk: int
) -> tuple[str, Callable[[str, Prediction], str]]:
    shown = [visible(name) for name in class_names]
    width = min(max((len(visible(path)) for path in paths), default=0), MAX_PATH_WIDTH)
    width, label_width = max(width, len("picture")), max(map(len, [*shown, "label"]))

    def text(path: str, prediction: Prediction) -> str:
        cells = [f"{visible(label):<{label_width}} {value:.3f}" for label, value in prediction.topk]
        return f"{visible(path):<{width}}  {'  '.join(cells)}\n"

    return f"{'picture':<{width}}  {'label':<{label_width}} probability\n", text


def _csv(topk: int) -> tuple[str, Callable[[str, Prediction], str]]:
    def line(cells: Sequence[object]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(cells)
        return buffer.getvalue()

    def text(path: str, prediction: Prediction) -> str:
        pairs = ((_as_text(label), value) for label, value in prediction.topk)
        return line([_as_text(path), *(cell for pair in pairs for cell in pair)])

    more = (f"{name}_{rank}" for rank in range(2, topk + 1) for name in ("label", "probability"))
    return line(["path", "label", "probability", *more]), text


def _as_text(cell: str) -> str:
    """Put ' before what a spreadsheet would run as a formula; numbers stay as they are."""
    starts_formula = cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{cell}" if starts_formula and not NUMBER.fullmatch(cell) else cell


def _json_line(path: str, prediction: Prediction) -> str:
    return json.dumps(prediction_json(path, prediction)) + "\n"

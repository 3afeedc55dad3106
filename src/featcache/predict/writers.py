"""Predictions as a table, CSV or JSON lines."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict

from featcache.config import Format, Task
from featcache.errors import visible
from featcache.files import csv_line, replacing, storage_errors
from featcache.predict.classifier import UNKNOWN, Prediction
from featcache.streams import stdout_errors

MAX_PATH_WIDTH = 60
MARKS = re.compile(
    rb"\Apicture +(label +probability|labels +probabilities|value)\n"
    rb"|\Apath,(label,probability|labels|value)\b"
    rb'|\A\{"path": .*("topk": \[\{"label": |"probabilities": |"value": )'
)
"""How tables, CSV and JSON lines of predictions begin."""

Write = Callable[[str, Prediction], None]


class ClassProbability(TypedDict):
    """A class and its probability."""

    label: str
    probability: float


class PredictionJson(ClassProbability):
    """One prediction; `topk` starts with the predicted class."""

    path: str
    topk: list[ClassProbability]
    p_value: NotRequired[float]


class LabelsJson(TypedDict):
    """The labels of one image, and the probability of each label there is."""

    path: str
    labels: list[str]
    probabilities: dict[str, float]


class ValueJson(TypedDict):
    """The number predicted for one image."""

    path: str
    value: float


AnyPredictionJson = PredictionJson | LabelsJson | ValueJson


def prediction_json(path: str, prediction: Prediction) -> AnyPredictionJson:
    """One prediction as a JSON object."""
    if prediction.value is not None:
        return {"path": path, "value": prediction.value}
    if prediction.labels is not None:
        probabilities = dict(prediction.topk)
        return {"path": path, "labels": list(prediction.labels), "probabilities": probabilities}
    fields: PredictionJson = {
        "path": path,
        "label": prediction.label,
        "probability": prediction.probability,
        "topk": [{"label": name, "probability": value} for name, value in prediction.topk],
    }
    return fields if prediction.p_value is None else {**fields, "p_value": prediction.p_value}


def format_of(given: Format | None, output: Path | None) -> Format:
    """The format asked for, or that of the output's name."""
    by_name: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    return given or by_name.get(output.suffix.lower() if output else "", "table")


@contextlib.contextmanager
def prediction_writer(
    kind: Format,
    output: Path | None,
    paths: Sequence[str],
    class_names: Sequence[str],
    topk: int,
    *,
    reject: bool = False,
    task: Task = "multiclass",
) -> Iterator[Write]:
    """Write predictions as they come; a file appears whole in the end or not at all.

    Args:
        kind: table, csv or jsonl.
        output: A file, or standard output where there is none.
        paths: Of every image, for the width of columns.
        class_names: All of them, likewise.
        topk: Classes per prediction.
        reject: Whether predictions have p-values.
        task: What is predicted of an image.

    Yields:
        A function of path and prediction.

    Raises:
        StorageError: The file system refused.
    """
    topk = min(topk, len(class_names))
    if kind == "table":
        header, text = _table(paths, class_names, task)
    elif kind == "csv" and task != "multiclass":
        header, text = _target_csv(class_names, task)
    elif kind == "csv":
        header, text = _csv(topk, reject=reject)
    else:
        header, text = "", _json_line
    with _target(output) as write:
        write(header)
        yield lambda path, prediction: write(text(path, prediction))


@contextlib.contextmanager
def _target(output: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes text; file names that are not UTF-8 keep their bytes."""
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
    paths: Sequence[str], class_names: Sequence[str], task: Task
) -> tuple[str, Callable[[str, Prediction], str]]:
    shown = [visible(name) for name in class_names]
    width = min(max((len(visible(path)) for path in paths), default=0), MAX_PATH_WIDTH)
    width, label_width = max(width, len("picture")), max(map(len, [*shown, "label"]))

    def text(path: str, prediction: Prediction) -> str:
        pairs = prediction.topk
        if prediction.labels is not None:
            pairs = pairs[: len(prediction.labels)]
        cells = [f"{visible(label):<{label_width}} {value:.3f}" for label, value in pairs]
        if prediction.value is not None or not pairs:
            cells = [prediction.label or "-"]
        if prediction.unknown:
            cells = [f"{UNKNOWN:<{label_width}} (p {prediction.p_value:.3f}), else", *cells]
        return f"{visible(path):<{width}}  {'  '.join(cells)}\n"

    titles = {
        "multiclass": f"{'label':<{label_width}} probability",
        "multilabel": f"{'labels':<{label_width}} probabilities",
        "regression": "value",
    }
    return f"{'picture':<{width}}  {titles[task]}\n", text


def _target_csv(
    class_names: Sequence[str], task: Task
) -> tuple[str, Callable[[str, Prediction], str]]:
    """With several labels, those of the image, and every label's probability in a column."""

    def text(path: str, prediction: Prediction) -> str:
        cells: list[object] = [prediction.value]
        if prediction.labels is not None:
            by_label = dict(prediction.topk)
            cells = [prediction.label, *(by_label[name] for name in class_names)]
        return csv_line([path, *cells])

    names = ["value"] if task == "regression" else ["labels", *class_names]
    return csv_line(["path", *names]), text


def _csv(topk: int, *, reject: bool) -> tuple[str, Callable[[str, Prediction], str]]:
    def text(path: str, prediction: Prediction) -> str:
        cells: list[object] = [path, *(cell for pair in prediction.topk for cell in pair)]
        if reject:
            likeliest, cells[1] = cells[1], prediction.label
            cells += [likeliest, prediction.p_value or 0.0]
        return csv_line(cells)

    more = [f"{name}_{rank}" for rank in range(2, topk + 1) for name in ("label", "probability")]
    more += ["likeliest", "p_value"] if reject else []
    return csv_line(["path", "label", "probability", *more]), text


def _json_line(path: str, prediction: Prediction) -> str:
    return json.dumps(prediction_json(path, prediction)) + "\n"

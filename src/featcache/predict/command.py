"""`featcache predict`: images in, labels out as a table, CSV or JSON lines."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from featcache.config import Format, PredictConfig, config_json
from featcache.data import BadImage
from featcache.errors import UserError, visible
from featcache.files import check_outputs, csv_line, replacing, storage_errors
from featcache.predict.classifier import UNKNOWN, Classifier, Prediction
from featcache.predict.load import provenance_json
from featcache.predict.pictures import find_pictures, split_of
from featcache.runtime import StageTimer, bar_hidden, environment, progress, say
from featcache.streams import stdout_errors

MAX_PATH_WIDTH = 60
MARKS = re.compile(
    rb"\Apicture +label +probability\n|\Apath,label,probability\b"
    rb'|\A\{"path": .*"probability": .*"topk": \[\{"label": '
)
"""How tables, CSV and JSON lines of predictions begin."""

Write = Callable[[str, Prediction], None]


def prediction_json(path: str, prediction: Prediction) -> dict[str, Any]:
    """One prediction as a JSON object."""
    return {
        "path": path,
        "label": prediction.label,
        "probability": prediction.probability,
        "topk": [{"label": name, "probability": value} for name, value in prediction.topk],
        **({} if prediction.p_value is None else {"p_value": prediction.p_value}),
    }


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
) -> Iterator[Write]:
    """Write predictions as they come; a file appears whole in the end or not at all.

    Args:
        kind: table, csv or jsonl.
        output: A file, or standard output where there is none.
        paths: Of every image, for the width of columns.
        class_names: All of them, likewise.
        topk: Classes per prediction.
        reject: Whether predictions have p-values.

    Yields:
        A function of path and prediction.

    Raises:
        StorageError: The file system refused.
    """
    topk = min(topk, len(class_names))
    if kind == "table":
        header, text = _table(paths, class_names, topk)
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
    paths: Sequence[str], class_names: Sequence[str], topk: int
) -> tuple[str, Callable[[str, Prediction], str]]:
    shown = [visible(name) for name in class_names]
    width = min(max((len(visible(path)) for path in paths), default=0), MAX_PATH_WIDTH)
    width, label_width = max(width, len("picture")), max(map(len, [*shown, "label"]))

    def text(path: str, prediction: Prediction) -> str:
        cells = [f"{visible(label):<{label_width}} {value:.3f}" for label, value in prediction.topk]
        if prediction.unknown:
            cells = [f"{UNKNOWN:<{label_width}} (p {prediction.p_value:.3f}), else", *cells]
        return f"{visible(path):<{width}}  {'  '.join(cells)}\n"

    return f"{'picture':<{width}}  {'label':<{label_width}} probability\n", text


def _csv(topk: int, *, reject: bool) -> tuple[str, Callable[[str, Prediction], str]]:
    def text(path: str, prediction: Prediction) -> str:
        cells = [path, *(cell for pair in prediction.topk for cell in pair)]
        if reject:
            likeliest, cells[1] = cells[1], prediction.label
            cells += [likeliest, prediction.p_value or 0.0]
        return csv_line(cells)

    more = [f"{name}_{rank}" for rank in range(2, topk + 1) for name in ("label", "probability")]
    more += ["likeliest", "p_value"] if reject else []
    return csv_line(["path", "label", "probability", *more]), text


def _json_line(path: str, prediction: Prediction) -> str:
    return json.dumps(prediction_json(path, prediction)) + "\n"


EXIT_SKIPPED = 1
# A bar for work that takes longer than this.
BAR_DELAY_S = 1.0


def predict(config: PredictConfig) -> dict[str, Any]:
    """Classify images and write their predictions.

    Args:
        config: The command's settings.

    Returns:
        The JSON report; with `json`, all predictions are in it. `exit_code` is 1 where images
        were skipped.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
        CacheError: The backbone's weights are not those that the head was trained on.
        StorageError: The output cannot be written.
    """
    start = time.perf_counter()
    paths = find_pictures(config.inputs)
    if config.output is not None:
        check_outputs({config.output: MARKS}, [config.model, config.weights or "", *paths])
    classifier = Classifier.load(
        config.model,
        weights=config.weights,
        seed=config.seed,
        device=config.device,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    if config.reject is not None:
        classifier.known_rows(config.reject)  # or an error, before anything is written
    timer = StageTimer()
    timer.seconds["start_up"] = time.perf_counter() - start
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        writers: list[Write] = []
        if config.json:
            writers.append(lambda path, prediction: found.append(prediction_json(path, prediction)))
        if config.output is not None or not config.json:
            kind = format_of(config.format, config.output)
            names = classifier.class_names
            target = prediction_writer(
                kind, config.output, paths, names, config.topk, reject=config.reject is not None
            )
            writers.append(stack.enter_context(target))
        skipped, num_unknown = _classify(config, classifier, paths, writers, timer)
    if config.verbose:
        say(f"engine: {classifier.engine(len(paths)).describe()}")
    seconds = time.perf_counter() - start
    report = _report(config, classifier, len(paths), skipped, timer, seconds)
    report |= {} if config.reject is None else {"num_unknown": num_unknown}
    return report | ({"predictions": found} if config.json else {})


def _classify(
    config: PredictConfig,
    classifier: Classifier,
    paths: list[str],
    writers: list[Write],
    timer: StageTimer,
) -> tuple[list[dict[str, str]], int]:
    """Send every image's prediction to the writers.

    Returns:
        The images that had none, and how many are unknown.
    """
    split, skipped, num_unknown = split_of(paths), [], 0
    # Rows that scroll by on the same screen show the progress themselves.
    on_screen = config.output is None and not config.json and sys.stdout.isatty()
    bar = progress(len(paths), delay=BAR_DELAY_S, disable=on_screen or bar_hidden())
    found = classifier.predictions(split, timer, topk=config.topk, reject=config.reject)
    with bar, contextlib.closing(found) as stream, timer("total"):
        for index, prediction in stream:
            path = paths[index]
            if isinstance(prediction, BadImage):
                skipped.append(_skip(config, path, prediction))
            else:
                num_unknown += prediction.unknown
                for write in writers:
                    write(path, prediction)
            bar.update()
    return skipped, num_unknown


def _skip(config: PredictConfig, path: str, bad: BadImage) -> dict[str, str]:
    """Report an unreadable image, or end the run."""
    if config.on_error == "fail":
        raise UserError(
            f"{path}: {bad}; repair or remove it, or leave unreadable images out with "
            "--on-error skip"
        )
    say(f"skipped {path}: {bad}")
    return {"path": path, "reason": bad.reason, "detail": bad.detail}


def _report(
    config: PredictConfig,
    classifier: Classifier,
    num_images: int,
    skipped: list[dict[str, str]],
    timer: StageTimer,
    seconds: float,
) -> dict[str, Any]:
    stages = dict(timer.seconds)
    busy = stages.pop("total") - stages.get("choose_engine", 0.0)
    return {
        "command": "predict",
        "model": str(config.model),
        "kind": classifier.trained.kind,
        "classifier": classifier.trained.describe(),
        "class_names": classifier.class_names,
        "num_images": num_images,
        "num_skipped": len(skipped),
        "skipped": skipped,
        "output": str(config.output) if config.output else None,
        "images_per_s": num_images / busy if busy > 0 else None,
        "stage_seconds": stages,
        "seconds_total": seconds,
        "engine": classifier.engine(num_images).describe(),
        "provenance": provenance_json(classifier.trained),
        "environment": environment(),
        "config": config_json(config),
        "exit_code": EXIT_SKIPPED if skipped else 0,
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    num, skipped = report["num_images"], report["num_skipped"]
    left_out = f", {skipped} unreadable and left out" if skipped else ""
    if "num_unknown" in report:
        left_out += f", {report['num_unknown']} of them unknown"
    lines = [
        f"{num - skipped} of {num} images classified{left_out}, in "
        f"{report['seconds_total']:.1f} s by {report['classifier']}"
    ]
    return lines + ([f"predictions: {report['output']}"] if report["output"] else [])

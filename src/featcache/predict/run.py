"""`featcache predict`: pictures in, labels out, as fast as extraction reads them."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from featcache.config import PredictConfig
from featcache.data import BadImage
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.predict.classifier import Classifier
from featcache.predict.formats import MARKS, Write, format_of, prediction_json, prediction_writer
from featcache.predict.inputs import find_pictures
from featcache.predict.load import provenance_json
from featcache.predict.pictures import split_of
from featcache.results import config_json
from featcache.runtime import StageTimer, bar_hidden, environment, progress, say

EXIT_SKIPPED = 1
# A bar for work that takes longer than this.
BAR_DELAY_S = 1.0


def predict(config: PredictConfig) -> dict[str, Any]:
    """Classify pictures and write what they are.

    Args:
        config: The command's settings.

    Returns:
        The JSON report; with `json`, all predictions are in it. `exit_code` is 1 where pictures
        were skipped.

    Raises:
        UserError: Wrong input, or an unreadable picture under `on_error="fail"`.
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
            target = prediction_writer(kind, config.output, paths, names, config.topk)
            writers.append(stack.enter_context(target))
        skipped = _classify(config, classifier, paths, writers, timer)
    if config.verbose:
        say(f"engine: {classifier.engine(len(paths)).describe()}")
    seconds = time.perf_counter() - start
    report = _report(config, classifier, len(paths), skipped, timer, seconds)
    return report | ({"predictions": found} if config.json else {})


def _classify(
    config: PredictConfig,
    classifier: Classifier,
    paths: list[str],
    writers: list[Write],
    timer: StageTimer,
) -> list[dict[str, str]]:
    """Send every picture's prediction to the writers; returns the pictures that had none."""
    split, skipped = split_of(paths), []
    # Rows that scroll by on the same screen show the progress themselves.
    on_screen = config.output is None and not config.json and sys.stdout.isatty()
    bar = progress(len(paths), delay=BAR_DELAY_S, disable=on_screen or bar_hidden())
    with bar, contextlib.closing(classifier.stream(split, timer)) as stream, timer("total"):
        for index, row in stream:
            path = paths[index]
            if isinstance(row, BadImage):
                skipped.append(_skip(config, path, row))
            else:
                prediction = classifier.prediction(row, config.topk)
                for write in writers:
                    write(path, prediction)
            bar.update()
    return skipped


def _skip(config: PredictConfig, path: str, bad: BadImage) -> dict[str, str]:
    """Say which picture is unreadable, or end the run."""
    if config.on_error == "fail":
        raise UserError(
            f"{path}: {bad}; repair or remove it, or leave such pictures out with --on-error skip"
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
    lines = [
        f"{num - skipped} of {num} pictures classified{left_out}, in "
        f"{report['seconds_total']:.1f} s by {report['classifier']}"
    ]
    return lines + ([f"predictions: {report['output']}"] if report["output"] else [])

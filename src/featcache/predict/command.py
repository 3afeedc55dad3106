"""`featcache predict`: images in, predictions out."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NotRequired, TypedDict

from featcache.config import JsonObject, PredictConfig, config_json
from featcache.data import BadImage
from featcache.display import bar_hidden, progress, say
from featcache.errors import UserError
from featcache.files import check_outputs
from featcache.predict.classifier import Classifier
from featcache.predict.load import ClassifierOrigin, origin_of
from featcache.predict.pictures import (
    NOTHING_NAMED,
    STANDARD_INPUT,
    arriving_pictures,
    find_pictures,
    split_of,
)
from featcache.predict.writers import (
    MARKS,
    AnyPredictionJson,
    Write,
    format_of,
    prediction_json,
    prediction_writer,
)
from featcache.runtime import StageTimer, environment

if TYPE_CHECKING:
    from featcache.engine import EngineInfo


class SkippedImage(TypedDict):
    """An image that could not be read."""

    path: str
    reason: str
    detail: str


class PredictReport(TypedDict):
    """What `featcache predict --json` prints."""

    command: str
    model: str
    kind: str
    classifier: str
    class_names: list[str]
    num_images: int
    num_skipped: int
    skipped: list[SkippedImage]
    output: str | None
    images_per_s: float | None
    stage_seconds: dict[str, float]
    seconds_total: float
    engine: EngineInfo
    provenance: ClassifierOrigin
    environment: dict[str, str | int]
    config: JsonObject
    exit_code: int
    num_unknown: NotRequired[int]
    predictions: NotRequired[list[AnyPredictionJson]]


EXIT_SKIPPED = 1
# A bar for work that takes longer than this.
BAR_DELAY_S = 1.0


def predict(config: PredictConfig) -> PredictReport:
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
    is_dialog = _is_dialog(config)
    paths = [] if is_dialog else find_pictures(config.inputs)
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
    _check_flags(config, classifier)
    timer = StageTimer()
    timer.seconds["start_up"] = time.perf_counter() - start
    found: list[AnyPredictionJson] = []
    done = _Done()
    with contextlib.ExitStack() as stack:
        writers: list[Write] = []
        if config.json:
            writers.append(lambda path, prediction: found.append(prediction_json(path, prediction)))
        if config.output is not None or not config.json:
            writers.append(stack.enter_context(_writer(config, classifier, paths)))
        for together in arriving_pictures() if is_dialog else [paths]:
            _classify(config, classifier, together, writers, timer, done)
    if done.num_images == 0:
        raise UserError(NOTHING_NAMED)
    if config.verbose:
        say(f"engine: {classifier.engine(done.num_images).describe()}")
    seconds = time.perf_counter() - start
    report = _report(config, classifier, done, timer, seconds)
    if config.reject is not None:
        report["num_unknown"] = done.num_unknown
    if config.json:
        report["predictions"] = found
    return report


@dataclasses.dataclass
class _Done:
    """What was classified so far."""

    num_images: int = 0
    num_unknown: int = 0
    skipped: list[SkippedImage] = dataclasses.field(default_factory=list)


def _is_dialog(config: PredictConfig) -> bool:
    """Whether to answer the paths on standard input as they come, not when all are there.

    A table has to know the longest path first.
    """
    is_read = config.output is None and not config.json and config.format in ("csv", "jsonl")
    return config.inputs == (STANDARD_INPUT,) and is_read


def _writer(
    config: PredictConfig, classifier: Classifier, paths: list[str]
) -> AbstractContextManager[Write]:
    return prediction_writer(
        format_of(config.format, config.output),
        config.output,
        paths,
        classifier.class_names,
        config.topk,
        reject=config.reject is not None,
        task=classifier.trained.decision.task,
    )


def _check_flags(config: PredictConfig, classifier: Classifier) -> None:
    """Refuse what the classifier cannot do, before anything is written."""
    if config.topk > 1 and classifier.trained.decision.task != "multiclass":
        raise UserError(f"--topk is for one class per image: leave it out for {config.model}")
    if config.reject is not None:
        classifier.known_rows(config.reject)


def _classify(
    config: PredictConfig,
    classifier: Classifier,
    paths: list[str],
    writers: list[Write],
    timer: StageTimer,
    done: _Done,
) -> None:
    """Send every image's prediction to the writers, and count it."""
    split = split_of(paths)
    # Rows that scroll by on the same screen show the progress themselves.
    on_screen = config.output is None and not config.json and sys.stdout.isatty()
    bar = progress(len(paths), delay=BAR_DELAY_S, disable=on_screen or bar_hidden())
    found = classifier.predictions(split, timer, topk=config.topk, reject=config.reject)
    with bar, contextlib.closing(found) as stream, timer("total"):
        for index, prediction in stream:
            path = paths[index]
            if isinstance(prediction, BadImage):
                done.skipped.append(_skip(config, path, prediction))
            else:
                done.num_unknown += prediction.unknown
                for write in writers:
                    write(path, prediction)
            done.num_images += 1
            bar.update()


def _skip(config: PredictConfig, path: str, bad: BadImage) -> SkippedImage:
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
    done: _Done,
    timer: StageTimer,
    seconds: float,
) -> PredictReport:
    num_images, skipped, stages = done.num_images, done.skipped, dict(timer.seconds)
    busy = stages.pop("total", 0.0) - stages.get("choose_engine", 0.0)
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
        "provenance": origin_of(classifier.trained),
        "environment": environment(),
        "config": config_json(config),
        "exit_code": EXIT_SKIPPED if skipped else 0,
    }


def summary_lines(report: PredictReport) -> list[str]:
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

"""The commands as functions: for callers from Python and, with a summary, for notebooks."""

from __future__ import annotations

from typing import Any

from featcache.cli import COMMANDS, from_home
from featcache.config import (
    CompareConfig,
    ExportConfig,
    ExtractConfig,
    FinetuneConfig,
    PredictConfig,
    ReportConfig,
    TrainHeadConfig,
)
from featcache.config.python import python_errors
from featcache.runtime import in_notebook, say

Report = dict[str, Any]


def extract_features(config: ExtractConfig) -> Report:
    """Run the frozen backbone once over a dataset and cache its features.

    Returns:
        The command's JSON report; `report["cache"]` is the file, for `FeatureCache`.

    Raises:
        UserError: Wrong input, an unreadable picture under `on_error="fail"`, or a cache that
            was made with different settings.
        StorageError: The disk is full or the cache is being written by another process.
    """
    return _run("extract-features", config)


def train_head(config: TrainHeadConfig) -> Report:
    """Fit a head on cached features and write it.

    Returns:
        The command's JSON report; `report["head"]` is the file, for `Classifier.load`.

    Raises:
        UserError: Wrong input, or settings that do not fit each other.
        CacheError: Not a finished cache, or a damaged one.
        StorageError: The head cannot be written.
    """
    return _run("train-head", config)


def finetune_network(config: FinetuneConfig) -> Report:
    """Train the whole network, or its head with the network in the loop, on the images.

    Returns:
        The command's JSON report; `report["model"]` is the file, for `Classifier.load`.

    Raises:
        UserError: Wrong input.
        StorageError: The model cannot be written.
    """
    return _run("finetune", config)


def predict_pictures(config: PredictConfig) -> Report:
    """Classify files and folders as the command does; `Classifier` takes pictures in memory.

    Returns:
        The command's JSON report; with `json=True`, all predictions are in it.

    Raises:
        UserError: Wrong input, or an unreadable picture under `on_error="fail"`.
        CacheError: The backbone's weights are not those that the head was trained on.
        StorageError: The output cannot be written.
    """
    return _run("predict", config)


def export_classifier(config: ExportConfig) -> Report:
    """Write backbone and head as one ONNX or torch.export file, checked against torch.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input, or a package that is not installed.
        FeatcacheError: The exported file gives other outputs; it is not kept.
        StorageError: The file cannot be written.
    """
    return _run("export", config)


def compare_training(config: CompareConfig) -> Report:
    """Draw the learning curve of cached head and fine-tuning, with advice.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input.
        StorageError: The folder cannot be written to.
    """
    return _run("compare", config)


def write_report(config: ReportConfig) -> Report:
    """Make one HTML page, and the same in Markdown, from the reports of runs.

    Returns:
        The command's JSON report.

    Raises:
        UserError: There is no report of a run to be read.
        StorageError: The page cannot be written.
    """
    return _run("report", config)


def _run(name: str, config: Any) -> Report:
    """Do a command's work; in a notebook, show the summary that the command prints."""
    command = COMMANDS[name]
    with python_errors(type(config)):
        report: Report = from_home(command.worker)(config)
    if in_notebook():
        for line in from_home(command.summary)(report):
            say(line)
    return report

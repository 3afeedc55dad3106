"""The commands as Python functions; in a notebook they also print the command's summary."""

# mypy: disable-error-code=no-any-return
# Commands are found by name, so the type of their report is known here alone.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featcache.cli import COMMANDS, from_home
from featcache.config import (
    AuditConfig,
    CompareConfig,
    ExportConfig,
    ExtractConfig,
    FinetuneConfig,
    JsonObject,
    MergeConfig,
    PredictConfig,
    Preprocessing,
    ReportConfig,
    TrainHeadConfig,
)
from featcache.config.settings import python_errors
from featcache.display import in_notebook, say

if TYPE_CHECKING:
    from torch import nn

    from featcache.backbone import OwnNetwork
    from featcache.export import ExportReport
    from featcache.extract import ExtractReport, RankReport
    from featcache.extract.maintenance import MergeReport
    from featcache.html_report import PageReport
    from featcache.predict import PredictReport


def extract_features(
    config: ExtractConfig,
    *,
    backbone: nn.Module | None = None,
    preprocessing: Preprocessing | None = None,
) -> ExtractReport | RankReport:
    """Run the frozen backbone once over a dataset and cache its features.

    Args:
        config: The command's settings.
        backbone: A network of your own instead of one by name, from float32 images [N, 3, H, W] to
            features [N, D] or to a dict of them; a frozen copy of it is used. The cache records the
            hash of its tensors and the name of its class, from which it cannot be rebuilt.
        preprocessing: How an image becomes its input; by default as for ImageNet at 224 px.

    Returns:
        The command's JSON report; `report["cache"]` is the file, for `FeatureCache`. Under torchrun
        or srun, a rank that leaves the file to others returns a `RankReport`, which has "rank".

    Raises:
        UserError: Wrong input, an unreadable image with `on_error="fail"`, or an existing cache
            that was made with different settings.
        StorageError: The disk is full, or another process is writing the cache.
    """
    if backbone is None:
        return _run("extract-features", config)
    return _run("extract-features", config, own=_own(config, backbone, preprocessing))


def merge_shards(config: MergeConfig) -> MergeReport:
    """Merge the shards that several ranks of `extract_features` wrote into one cache.

    Returns:
        The command's JSON report.

    Raises:
        CacheError: Shards are missing, unfinished, damaged, or were made with other settings.
        StorageError: A rank is still at work, or the disk is full.
    """
    return _run("merge", config)


def train_head(config: TrainHeadConfig) -> JsonObject:
    """Fit a head on cached features and write it.

    Returns:
        The command's JSON report; `report["head"]` is the file, for `Classifier.load`.

    Raises:
        UserError: Wrong input, or settings that contradict each other.
        CacheError: The cache is unfinished, damaged, or not a cache.
        StorageError: The head cannot be written.
    """
    return _run("train-head", config)


def audit_cache(config: AuditConfig) -> JsonObject:
    """Look for wrong labels, leaks, near-duplicates and odd images; the cache is not changed.

    Returns:
        The command's JSON report; `report["list"]` is the ranked list, a CSV file.

    Raises:
        UserError: Wrong input.
        CacheError: The cache is unfinished, damaged, or not a cache.
        StorageError: The list cannot be written.
    """
    return _run("audit", config)


def finetune_network(config: FinetuneConfig) -> JsonObject:
    """Train the whole network, or its head with the network in the loop, on the images.

    Returns:
        The command's JSON report; `report["model"]` is the file, for `Classifier.load`.

    Raises:
        UserError: Wrong input.
        StorageError: The model cannot be written.
    """
    return _run("finetune", config)


def predict_images(config: PredictConfig) -> PredictReport:
    """Classify image files and folders; for images in memory use `Classifier`.

    Returns:
        The command's JSON report; with `json=True` it includes all predictions.

    Raises:
        UserError: Wrong input, or an unreadable image with `on_error="fail"`.
        CacheError: The head was trained on features of other weights.
        StorageError: The output cannot be written.
    """
    return _run("predict", config)


def export_classifier(config: ExportConfig, *, backbone: nn.Module | None = None) -> ExportReport:
    """Write backbone and head as one ONNX or torch.export file, checked against torch.

    Args:
        config: The command's settings.
        backbone: The module that made the head's features, if it was given in Python.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input, or a missing package.
        FeatcacheError: The exported file computes different outputs; it was deleted.
        StorageError: The file cannot be written.
    """
    if backbone is None:
        return _run("export", config)
    return _run("export", config, own=_own(config, backbone))


def compare_training(config: CompareConfig) -> JsonObject:
    """Draw the learning curve of cached head and fine-tuning, with advice.

    Returns:
        The command's JSON report.

    Raises:
        UserError: Wrong input.
        StorageError: The folder cannot be written to.
    """
    return _run("compare", config)


def write_report(config: ReportConfig) -> PageReport:
    """Write one HTML page, and a Markdown file, from the reports of runs.

    Returns:
        The command's JSON report.

    Raises:
        UserError: No report of a run was found.
        StorageError: The page cannot be written.
    """
    return _run("report", config)


def _own(config: Any, module: nn.Module, preprocessing: Preprocessing | None = None) -> OwnNetwork:
    from featcache.backbone import OwnNetwork

    with python_errors(type(config)):
        return OwnNetwork.of(module, preprocessing)


def _run(name: str, config: Any, **more: Any) -> Any:
    """Run a command's worker; in a notebook, print the summary too."""
    command = COMMANDS[name]
    with python_errors(type(config)):
        report = from_home(command.worker)(config, **more)
    if in_notebook():
        for line in from_home(command.summary)(report):
            say(line)
    return report

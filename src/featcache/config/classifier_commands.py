"""The settings of predict and export, the commands that use a trained classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Optional

from featcache.config.checks import check_range, check_types
from featcache.config.options import OutputConfig
from featcache.config.settings import settings
from featcache.errors import UserError

EXPORT_SUFFIXES = (".onnx", ".pt2")
# Nothing else is overwritten, pictures and heads least of all.
PREDICTION_SUFFIXES = ("", ".csv", ".jsonl", ".ndjson", ".txt")

Format = Literal["table", "csv", "jsonl"]


@settings
class ClassifierConfig(OutputConfig):
    """Which trained classifier, and where its backbone's weights are."""

    model: Path
    """A head that train-head wrote or a model that finetune wrote (.safetensors)."""
    weights: Optional[str] = None
    """The backbone's weights file, where a head was trained on weights given by file and they are
    neither here nor beside the head."""
    seed: int = 42
    """The seed that extract-features had, where a head was trained on random weights."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("seed", self.seed, 0, 2**32 - 1)


@settings
class PredictConfig(ClassifierConfig):
    """Classify pictures with a trained head or model.

    The backbone, its weights and the preprocessing are those that the classifier was trained with.
    """

    inputs: tuple[str, ...]
    """Pictures, folders (with everything below, sorted), or - for paths on standard input, one a
    line or separated by NUL (find -print0)."""
    topk: int = 1
    """Name so many of the likeliest classes."""
    format: Optional[Format] = None
    """Print a table for people, csv (for spreadsheets: a cell that would be a formula gets a '
    before it), or jsonl (a JSON object a line); what the name of --output ends in, else table,
    unless given."""
    output: Optional[Path] = None
    """Write predictions to this file instead of standard output."""
    on_error: Literal["skip", "fail"] = "skip"
    """What an unreadable picture does: be named and left out, with exit code 1 in the end, or stop
    the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the network runs: auto takes a GPU if there is one."""
    batch_size: Optional[int] = None
    """Images per forward pass; measured unless given. Does not change the predictions."""
    workers: Optional[int] = None
    """Threads that read and decode; chosen from the number of cores unless given."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        check_range("topk", self.topk, 1)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("workers", self.workers, 0, 1024)
        if self.output is not None and self.output.suffix.lower() not in PREDICTION_SUFFIXES:
            raise UserError(
                f"--output {self.output}: give a name that ends in .csv, .jsonl or .txt (a table)"
            )
        if not self.inputs or "" in self.inputs:
            raise UserError("no pictures given: name pictures, folders, or - for standard input")


@settings
class ExportConfig(ClassifierConfig):
    """Write backbone, normalisation, head and class names as one ONNX or torch.export file.

    Pictures are resized and cropped outside the graph, as the file's metadata says.
    """

    output: Optional[Path] = None
    """The file, .onnx or .pt2 (torch.export); the classifier's own name with .onnx unless given."""
    input: Literal["uint8", "float"] = "uint8"
    """What the graph takes: uint8 pixels [N, H, W, 3], already resized, or float32 images
    [N, 3, H, W], already normalised too."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.output is not None and self.output.suffix not in EXPORT_SUFFIXES:
            raise UserError(
                f"--output {self.output}: give a name that ends in .onnx, or in .pt2 for "
                "torch.export"
            )

"""The settings of predict and export, which use a trained classifier, and of audit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Optional

from featcache.config.checks import check_positive, check_range, check_types
from featcache.config.options import OutputConfig
from featcache.config.settings import settings
from featcache.errors import UserError

EXPORT_SUFFIXES = (".onnx", ".pt2")
# Files with other suffixes, such as images and heads, are never overwritten.
PREDICTION_SUFFIXES = ("", ".csv", ".jsonl", ".ndjson", ".txt")

Format = Literal["table", "csv", "jsonl"]


@settings
class ClassifierConfig(OutputConfig):
    """Which trained classifier to use, and where the weights of its backbone are."""

    model: Path
    """A head that train-head wrote or a model that finetune wrote (.safetensors)."""
    weights: Optional[str] = None
    """The backbone's weights file. Needed only for a head whose backbone weights came from a file
    that is neither where it was nor beside the head."""
    seed: int = 42
    """For a head trained on random weights: the seed given to extract-features."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("seed", self.seed, 0, 2**32 - 1)


@settings
class PredictConfig(ClassifierConfig):
    """Classify images with a trained head or model.

    The backbone, its weights and the preprocessing are the ones the classifier was trained with.
    """

    inputs: tuple[str, ...]
    """Images, folders (searched recursively, in sorted order), or - to read paths from standard
    input, one per line or separated by NUL (find -print0). With --format csv or jsonl and no
    --output each line is answered as it comes, so that a program can leave this one open."""
    topk: int = 1
    """Print this many of the most probable classes."""
    reject: Optional[float] = None
    """Call an image unknown if no class is likely for it, or it is far from all train images: more
    so than for all but this share of the head's held-out train images. About this share of images
    of the known classes is then called unknown; 0.05 is a common choice."""
    format: Optional[Format] = None
    """table (for people), csv (for spreadsheets: a cell that would be a formula is prefixed with a
    single quote), or jsonl (one JSON object per line). By default what the suffix of --output says,
    else table."""
    output: Optional[Path] = None
    """Write predictions to this file instead of standard output."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do about an unreadable image: skip names it, leaves it out and makes the exit code 1,
    fail stops the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """What the network runs on; auto uses a GPU if there is one."""
    batch_size: Optional[int] = None
    """Images per forward pass. By default chosen by measuring. Does not change the predictions."""
    workers: Optional[int] = None
    """Threads that read and decode images. By default chosen from the number of cores."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        check_range("topk", self.topk, 1)
        check_range("reject", self.reject, 0, 1)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("workers", self.workers, 0, 1024)
        if self.output is not None and self.output.suffix.lower() not in PREDICTION_SUFFIXES:
            raise UserError(
                f"--output {self.output}: give a name that ends in .csv, .jsonl or .txt (a table)"
            )
        if not self.inputs or "" in self.inputs:
            raise UserError("no images given: name images, folders, or - for standard input")


@settings
class ExportConfig(ClassifierConfig):
    """Write backbone, normalization, head and class names as one ONNX or torch.export file.

    The exported graph does not resize or crop; the file's metadata says how to.
    """

    output: Optional[Path] = None
    """The file, .onnx or .pt2 (torch.export). By default named after the classifier, with .onnx."""
    input: Literal["uint8", "float"] = "uint8"
    """What the graph takes: resized uint8 pixels [N, H, W, 3], or resized and normalized float32
    images [N, 3, H, W]."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.output is not None and self.output.suffix not in EXPORT_SUFFIXES:
            raise UserError(
                f"--output {self.output}: give a name that ends in .onnx, or in .pt2 for "
                "torch.export"
            )


@settings
class AuditConfig(OutputConfig):
    """Look for wrong labels, leaks between splits, near-duplicates and odd images in a cache.

    Nothing is changed: a ranked list of what to look at is written as CSV, and as JSON for report.
    """

    cache: Path
    """A file written by extract-features."""
    solver: Literal["logistic", "ridge", "knn", "auto"] = "logistic"
    """The head whose predictions, of images that it has not seen, are compared with the labels."""
    folds: int = 5
    """Parts of train for cross-validation; groups and identical images stay together."""
    neighbors: int = 10
    """Nearest train images to compare every image with."""
    near: Optional[float] = None
    """The cosine similarity of features from which two images count as near-duplicates. By default
    found from the data."""
    seed: int = 42
    """Seed of the parts and of the held-out part that chooses the head's settings."""
    output: Optional[Path] = None
    """The list (.csv); the report is written beside it as .json. By default beside the cache."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("folds", self.folds, 2, 1000)
        check_range("neighbors", self.neighbors, 1, 1000)
        check_positive("near", self.near)
        check_range("near", self.near, 0, 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.output is not None and self.output.suffix.lower() != ".csv":
            raise UserError(f"--output {self.output}: the list's name ends in .csv")

"""`featcache export`: a trained classifier as one graph that needs neither featcache nor its cache.

The graph is normalization, backbone and head (standardization is folded into the head), from
images that are already resized and cropped to logits and probabilities. It computes in float32
throughout, even where the head's train features were stored in half precision. The file is checked
against torch before it gets its name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from featcache import __version__
from featcache.backbone import OwnNetwork
from featcache.config import ExportConfig, JsonObject, config_json
from featcache.errors import FeatcacheError, UserError
from featcache.files import check_outputs, check_writable, replacing, storage_errors
from featcache.predict import ClassifierOrigin, LoadedClassifier, load_classifier, origin_of
from featcache.runtime import environment

if TYPE_CHECKING:
    import torch

    from featcache.export.graph import ClassifierGraph

METADATA_FILE = "featcache.json"
OUTPUT_NAMES = ["logits", "probabilities"]
# What protobuf can hold in one message.
MAX_ONNX_BYTES = 2**31 - 1

Runner = Callable[[np.ndarray], list[np.ndarray]]


class GraphInput(TypedDict):
    """What the graph takes; `shape` has "batch" for any number of images."""

    name: str
    dtype: str
    shape: list[str | int]
    what: str


class FileMetadata(TypedDict):
    """What an exported file says about itself; `preprocessing` is a `config.Preprocessing`."""

    featcache_version: str
    class_names: list[str]
    preprocessing: JsonObject
    input: GraphInput
    outputs: list[str]
    provenance: ClassifierOrigin


class ExportReport(TypedDict):
    """What `featcache export --json` prints; differences are from torch's outputs."""

    command: str
    model: str
    output: str
    format: str
    file_bytes: int
    input: GraphInput
    class_names: list[str]
    classifier: str
    max_difference: float
    max_relative_difference: float
    num_checked: int
    seconds_total: float
    provenance: ClassifierOrigin
    environment: dict[str, str | int]
    config: JsonObject


def onnx_bytes(program: torch.export.ExportedProgram, about: FileMetadata) -> bytes:
    """An ONNX file; every entry of `about` becomes one of its metadata properties, as JSON.

    Raises:
        UserError: The network is too large for one ONNX file.
    """
    import torch

    converted = torch.onnx.export(
        program,
        (),
        input_names=[about["input"]["name"]],
        output_names=OUTPUT_NAMES,
        dynamo=True,
        verbose=False,
    )
    assert converted is not None
    model = converted.model_proto
    for prop, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=prop, value=text)
    _tidy(model.graph)
    if model.ByteSize() > MAX_ONNX_BYTES:
        raise UserError(
            f"the network takes {model.ByteSize() / 1e9:.1f} GB, an ONNX file can hold 2 GB: give "
            "--output FILE.pt2"
        )
    data: bytes = model.SerializeToString()
    return data


def _tidy(graph: Any) -> None:
    """Call the free dimension "batch", and drop the exporter's notes (some hold source paths)."""
    values = [*graph.input, *graph.output, *graph.value_info]
    free = {dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim if dim.dim_param}
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in free:
                dim.dim_param = "batch"
    for noted in (graph, *graph.node, *graph.initializer, *values):
        noted.ClearField("metadata_props")


def onnx_runner(path: Path, input_name: str) -> Runner:
    """The file at `path` in onnxruntime: from an input batch to logits and probabilities."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: list(session.run(OUTPUT_NAMES, {input_name: batch}))


def pt2_bytes(program: torch.export.ExportedProgram, about: FileMetadata) -> bytes:
    """A torch.export file; `about` is its extra file featcache.json."""
    import torch

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(about)})
    return buffer.getvalue()


def pt2_runner(path: Path) -> Runner:
    """The file at `path` in torch: from an input batch to logits and probabilities."""
    import torch

    module = torch.export.load(path).module()

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in module(torch.from_numpy(batch))]

    return run


# Largest difference allowed between the file's outputs and torch's, relative to the largest output.
TOLERANCE = 1e-4
# Sample images for the check, in batches of these sizes.
BATCHES = (1, 3, 5)
# An exported file describes itself in its metadata.
MARKS = re.compile(rb"featcache_version")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(config: ExportConfig, own: OwnNetwork | None = None) -> ExportReport:
    """Write a classifier as ONNX or torch.export file and check it against torch.

    Args:
        config: The command's settings.
        own: The head's backbone, if it was given in Python.

    Returns:
        The JSON report; `max_difference` is the worst absolute difference between the file's
        outputs and torch's on sample images.

    Raises:
        UserError: Wrong input, or a package for ONNX is missing.
        CacheError: The backbone's weights are not those that the head was trained on.
        FeatcacheError: The network cannot be exported, or the file computes something else.
        StorageError: The file cannot be written.
    """
    start = time.perf_counter()
    path = config.output or config.model.parent / f"{config.model.stem}.onnx"
    check_outputs({path: MARKS}, [config.model, config.weights or ""])
    if path.suffix == ".onnx":
        require_onnx()
    trained = load_classifier(config.model, weights=config.weights, seed=config.seed, own=own)
    about = describe(trained, config)
    file_bytes, worst, relative = _write(path, trained, about)
    return {
        "command": "export",
        "model": str(config.model),
        "output": str(path),
        "format": path.suffix[1:],
        "file_bytes": file_bytes,
        "input": about["input"],
        "class_names": trained.class_names,
        "classifier": trained.describe(),
        "max_difference": worst,
        "max_relative_difference": relative,
        "num_checked": sum(BATCHES),
        "seconds_total": time.perf_counter() - start,
        "provenance": about["provenance"],
        "environment": environment(),
        "config": config_json(config),
    }


def require_onnx() -> None:
    """Check that the packages for ONNX are there.

    Raises:
        UserError: One is not, and how to get it.
    """
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"exporting to ONNX needs the package {name}, which is not installed: type "
                'pip install "featcache[export]", or give --output FILE.pt2 for torch.export'
            ) from error


def describe(trained: LoadedClassifier, config: ExportConfig) -> FileMetadata:
    """What the file says about itself, as JSON."""
    side = trained.preprocessing.image_px
    taken: GraphInput = {
        "name": "pixels",
        "dtype": "uint8",
        "shape": ["batch", side, side, 3],
        "what": "images already resized and cropped as preprocessing says, RGB, 0 to 255",
    }
    if config.input == "float":
        taken = {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", 3, side, side],
            "what": "the same scaled to 0 to 1, minus mean, divided by std, per channel",
        }
    return {
        "featcache_version": __version__,
        "class_names": trained.class_names,
        "preprocessing": trained.preprocessing.to_dict(),
        "input": taken,
        "outputs": OUTPUT_NAMES,
        "provenance": origin_of(trained),
    }


def _write(path: Path, trained: LoadedClassifier, about: FileMetadata) -> tuple[int, float, float]:
    """Write a draft, check it, and only then give it its name.

    Returns:
        Bytes of the file, worst absolute difference, and worst relative one.
    """
    from featcache.export.graph import ClassifierGraph

    check_writable(path)
    is_onnx = path.suffix == ".onnx"
    graph = ClassifierGraph(trained, takes_pixels=about["input"]["dtype"] == "uint8")
    samples = sample_batches(trained, about)
    with _named_failures(trained):
        program = capture(graph, samples[-1])
        data = onnx_bytes(program, about) if is_onnx else pt2_bytes(program, about)
    with storage_errors(path), replacing(path) as draft:
        draft.write_bytes(data)
        with _named_failures(trained):
            name = about["input"]["name"]
            runner = onnx_runner(draft, name) if is_onnx else pt2_runner(draft)
            worst, relative = differences(graph, runner, samples)
        if not relative <= TOLERANCE:
            raise FeatcacheError(
                f"{path} was not kept: its outputs are off by {worst:.1e} ({relative:.1e} of the "
                f"largest), above {TOLERANCE:.0e}; give the other format with --output"
            )
    return len(data), worst, relative


def sample_batches(trained: LoadedClassifier, about: FileMetadata) -> list[torch.Tensor]:
    """Sample images in batches of several sizes, as the graph takes them."""
    import torch

    from featcache.data import normalize
    from featcache.engine import sample_pixels

    prep = trained.preprocessing
    pixels = [torch.from_numpy(sample_pixels(prep, num, seed=num)) for num in BATCHES]
    if about["input"]["dtype"] == "uint8":
        return pixels
    return [normalize(batch, prep).contiguous() for batch in pixels]


def capture(graph: ClassifierGraph, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The graph as a program that takes any number of images."""
    import torch

    batch = torch.export.Dim("batch")
    return torch.export.export(graph, (example,), dynamic_shapes=({0: batch},), strict=False)


def differences(
    graph: ClassifierGraph, runner: Runner, samples: list[torch.Tensor]
) -> tuple[float, float]:
    """Worst absolute difference of any output, and worst relative to its batch's largest value.

    Where shapes differ or values are not finite, both are infinite.
    """
    import torch

    worst = relative = 0.0
    for batch in samples:
        with torch.inference_mode():
            wanted = [output.numpy() for output in graph(batch)]
        for ours, theirs in zip(wanted, runner(batch.numpy()), strict=True):
            if ours.shape != theirs.shape or not np.isfinite(theirs).all():
                return float("inf"), float("inf")
            error = float(np.abs(ours - theirs).max())
            worst = max(worst, error)
            relative = max(relative, error / max(float(np.abs(ours).max()), 1e-12))
    return worst, relative


@contextlib.contextmanager
def _named_failures(trained: LoadedClassifier) -> Iterator[None]:
    """Say in one line that a network defeats the exporter, whatever the exporter raises."""
    try:
        yield
    except (FeatcacheError, MemoryError, OSError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise FeatcacheError(
            f"{trained.backbone} cannot be exported ({type(error).__name__}: {reason}); try the "
            "other format, --output FILE.onnx or FILE.pt2"
        ) from error


def summary_lines(report: ExportReport) -> list[str]:
    """The report for people."""
    taken = report["input"]
    shape, num = ", ".join(map(str, taken["shape"])), len(report["class_names"])
    many = {"multilabel": f"{num} labels", "regression": "a number"}
    task = str(report["provenance"]["decision"].get("task"))
    return [
        f"exported {report['classifier']}, {many.get(task, f'{num} classes')}, "
        f"{report['file_bytes'] / 1e6:.1f} MB: {taken['name']} {taken['dtype']} [{shape}] to "
        f"{' and '.join(OUTPUT_NAMES)}",
        f"worst difference from torch {report['max_difference']:.1e} "
        f"({report['max_relative_difference']:.1e} of the largest output) on "
        f"{report['num_checked']} sample images",
        f"file: {report['output']}",
    ]

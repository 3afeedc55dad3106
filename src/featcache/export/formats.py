"""The two file formats: written from one captured program, read again to be checked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.errors import UserError

if TYPE_CHECKING:
    import torch

METADATA_FILE = "featcache.json"
OUTPUT_NAMES = ["logits", "probabilities"]
# What protobuf can hold in one message.
MAX_ONNX_BYTES = 2**31 - 1

Runner = Callable[[np.ndarray], list[np.ndarray]]


def onnx_bytes(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
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
            f"the network takes {model.ByteSize() / 1e9:.1f} GB, an ONNX file holds 2 GB: give "
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


def pt2_bytes(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
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

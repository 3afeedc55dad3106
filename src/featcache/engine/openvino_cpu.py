"""The network in OpenVINO: converted from torch, one stream per calling thread."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.config import Preprocessing
from featcache.engine.base import (
    TOLERANCE,
    Float32,
    Forward,
    Implementation,
    UInt8,
    Workload,
    relative_error,
)
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import interrupts_held, recorded_engine

if TYPE_CHECKING:
    from torch import nn

INSTALL = 'pip install "featcache[fast]"'
SCALE = 255.0


def is_installed(*packages: str) -> bool:
    """Whether packages can be imported, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


def need(what: str, *packages: str, otherwise: str) -> None:
    """Check that the packages that `what` needs are installed; `otherwise` says how to do without.

    Raises:
        UserError: One is not.
    """
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: type {INSTALL}, or {otherwise}")


def openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report the import to Intel."""
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino as ov

    return ov


def convert(backbone: nn.Module, prep: Preprocessing) -> Any:
    """Convert a network to an OpenVINO model.

    Args:
        backbone: The frozen network, on the CPU.
        prep: Its preprocessing, which becomes part of the model.

    Returns:
        A model from pixels uint8 [n, H, W, 3] to features float32 [n, D], for any n.

    Raises:
        Exception: OpenVINO cannot convert this network.
    """
    import torch

    ov = openvino()
    side = prep.image_px
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what the converter uses
        # Tracing here skips the check of the traced network that the converter asks for: torch
        # loads modules for it for a second or two, and the features are compared afterwards anyway.
        example = torch.zeros(1, 3, side, side)
        with interrupts_held():
            traced = torch.jit.trace(backbone, example, check_trace=False)  # type: ignore[no-untyped-call]
            model = ov.convert_model(traced)
    model.reshape([-1, 3, side, side])
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    # Channels first, so that they are scaled a plane at a time: two fifths of the time in int8.
    pixels = steps.input().preprocess().convert_layout("NCHW").convert_element_type(ov.Type.f32)
    pixels.scale(SCALE).mean(list(prep.mean)).scale(list(prep.std))
    return steps.build()


@functools.cache
def _core() -> Any:
    """OpenVINO's core, one for the process.

    A core installs a signal stack in the thread that loads its plug-in and restores the previous
    one when it is destroyed. If two are not destroyed in reverse order, a freed stack is restored,
    and the next handled signal, for example Ctrl-C, kills the process.
    """
    return openvino().Core()


def compiled_forward(model: Any, threads: int) -> Forward:
    """Compile a model for `threads` callers at once, one core each."""
    options = {
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # never bfloat16, which some processors prefer
        "ENABLE_CPU_PINNING": False,  # decoding needs the same cores
    }
    compiled = _core().compile_model(model, "CPU", options)
    local = threading.local()

    def forward(pixels: UInt8) -> Float32:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        local.request.infer([np.ascontiguousarray(pixels)], share_inputs=True)
        features: Float32 = local.request.get_output_tensor().data.copy()
        return features

    return forward


def openvino_implementation(work: Workload) -> tuple[Implementation, Any]:
    """The network in OpenVINO, checked, and the model behind it.

    Raises:
        FeatcacheError: It cannot be converted, or gives other features.
    """
    try:
        model = convert(work.network, work.prep)
        forward = compiled_forward(model, work.threads)
        error = relative_error(forward(work.sample), work.reference)
    except Exception as problem:  # the converter's own errors have no common class
        reason = (str(problem).splitlines() or [""])[0]
        raise FeatcacheError(
            f"OpenVINO cannot run this network ({type(problem).__name__}: {reason[:100]}): "
            "use --engine torch"
        ) from problem
    if not error <= TOLERANCE:
        raise FeatcacheError(f"OpenVINO's features are off by {error:.1e}: use --engine torch")
    recorded = recorded_engine("openvino")
    found = Implementation(name="openvino", forward=forward, max_error=error, recorded=recorded)
    return found, model

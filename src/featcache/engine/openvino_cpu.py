"""The network in OpenVINO: converted from torch, run by as many streams as there are callers."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.config import Preprocessing
from featcache.engine.base import Float32, Run, UInt8
from featcache.errors import UserError
from featcache.runtime import interrupts_held

if TYPE_CHECKING:
    from torch import nn

INSTALL = 'pip install "featcache[fast]"'
SCALE = 255.0


def is_installed(*packages: str) -> bool:
    """Whether packages can be imported, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


def need(what: str, *packages: str, otherwise: str) -> None:
    """Check that packages are installed; `what` needs them, and `otherwise` is the other way out.

    Raises:
        UserError: It is not.
    """
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: type {INSTALL}, or {otherwise}")


def openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report the import to its makers."""
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
        warnings.simplefilter("ignore")  # its way into torch is deprecated there
        # Left to itself, the converter has torch check what it traced, and for that torch loads
        # parts of itself for a second or two; whoever uses the model compares its features anyway.
        example = torch.zeros(1, 3, side, side)
        with interrupts_held():
            traced = torch.jit.trace(backbone, example, check_trace=False)  # type: ignore[no-untyped-call]
            model = ov.convert_model(traced)
    model.reshape([-1, 3, side, side])
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    pixels = steps.input().preprocess().convert_element_type(ov.Type.f32)
    pixels.scale(SCALE).mean(list(prep.mean)).scale(list(prep.std))
    return steps.build()


@functools.cache
def _core() -> Any:
    """OpenVINO's core, one for the process.

    A core gives the thread that loads its plug-in a stack for signals, and puts the one before back
    when it ends. Where two do not end in reverse order, that is a stack which is gone, and the next
    signal with a handler, Ctrl-C for one, kills the process.
    """
    return openvino().Core()


def compiled_run(model: Any, threads: int) -> Run:
    """Compile a model for `threads` callers at once, one core each."""
    options = {
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # never bfloat16, which some processors prefer
        "ENABLE_CPU_PINNING": False,  # decoding needs the same cores
    }
    compiled = _core().compile_model(model, "CPU", options)
    mine = threading.local()

    def run(pixels: UInt8) -> Float32:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        mine.request.infer([np.ascontiguousarray(pixels)], share_inputs=True)
        features: Float32 = mine.request.get_output_tensor().data.copy()
        return features

    return run

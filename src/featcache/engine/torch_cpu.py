"""The network in torch on a CPU: plain, fused, and with Winograd's convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcache.config import Preprocessing
from featcache.data import normalize
from featcache.display import say
from featcache.engine.base import (
    TOLERANCE,
    Float32,
    Forward,
    Implementation,
    UInt8,
    Workload,
    relative_error,
)
from featcache.engine.fusion import fuse_for_cpu
from featcache.engine.winograd import use_winograd
from featcache.errors import UserError


def torch_forward(network: nn.Module, prep: Preprocessing) -> Forward:
    """Wrap a network on the CPU as a function of uint8 pixels."""

    def forward(pixels: UInt8) -> Float32:
        with torch.inference_mode():
            features: Tensor = network(normalize(torch.from_numpy(pixels), prep))
        array: Float32 = features.numpy()
        return array

    return forward


def reference_features(
    network: nn.Module, prep: Preprocessing, sample: UInt8, backbone: str
) -> Float32:
    """The plain network's features [n, D] of a sample of images: the first time that it runs.

    Raises:
        UserError: The network cannot take images of this size.
    """
    try:
        return torch_forward(network, prep)(sample)
    except (RuntimeError, AssertionError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:100] or type(problem).__name__
        raise UserError(
            f"{backbone} cannot run on images of {prep.image_px} px ({reason}): give another "
            "--image-px, or leave it out for the weights' own"
        ) from problem


def torch_implementation(work: Workload) -> Implementation:
    """The network fused, or plain where it cannot be fused or would give other features."""
    try:
        fused = torch_forward(fuse_for_cpu(work.network), work.prep)
        error = relative_error(fused(work.sample), work.reference)
        reason = "" if error <= TOLERANCE else f"the fused form is off by {error:.1e}"
    except Exception as problem:  # whatever torch.fx or oneDNN raise, the plain network works
        reason = f"its code cannot be traced ({type(problem).__name__}: {str(problem)[:100]})"
    if not reason:
        return Implementation(name="torch", forward=fused, max_error=error, recorded="torch")
    say(f"running the network unfused: {reason}")
    plain = torch_forward(work.network, work.prep)
    return Implementation(name="torch", forward=plain, max_error=None, recorded="torch")


WINOGRAD = "torch-winograd"
"""What a cache records: its rows differ in the last bits from those of direct convolutions."""


def winograd_implementation(work: Workload) -> Implementation | None:
    """The fused network with Winograd's 3x3 convolutions; None where it has none or is off."""
    try:
        fused = fuse_for_cpu(work.network)
        if not use_winograd(fused):
            return None
        forward = torch_forward(fused, work.prep)
        error = relative_error(forward(work.sample), work.reference)
    except Exception:  # what cannot be fused, `torch_implementation` has told of
        return None
    found = Implementation(name="winograd", forward=forward, max_error=error, recorded=WINOGRAD)
    return found if error <= TOLERANCE else None

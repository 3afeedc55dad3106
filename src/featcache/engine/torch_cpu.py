"""The network in torch on a CPU, in the fastest form that computes the plain network's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcache.config import Preprocessing
from featcache.data import normalize
from featcache.engine.base import TOLERANCE, Float32, Run, UInt8, relative_error
from featcache.engine.fusion import fuse_for_cpu
from featcache.errors import UserError
from featcache.runtime import say


def runner(network: nn.Module, prep: Preprocessing) -> Run:
    """Wrap a network on the CPU as a function of uint8 pixels."""

    def run(pixels: UInt8) -> Float32:
        with torch.inference_mode():
            features: Tensor = network(normalize(torch.from_numpy(pixels), prep))
        array: Float32 = features.numpy()
        return array

    return run


def plain_features(run: Run, pixels: UInt8, backbone: str) -> Float32:
    """The plain network's features of a few images: the first time that it runs at all.

    Raises:
        UserError: It cannot take images of this size.
    """
    try:
        return run(pixels)
    except (RuntimeError, AssertionError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:100] or type(problem).__name__
        raise UserError(
            f"{backbone} cannot run on images of {pixels.shape[1]} px ({reason}): give another "
            "--image-px, or leave it out for the weights' own"
        ) from problem


def plain_run(backbone: nn.Module, prep: Preprocessing) -> Run:
    """The network as it is, brought into channels-last memory: it has to be the caller's own."""
    return runner(backbone.to(memory_format=torch.channels_last), prep)


def fused_run(
    backbone: nn.Module, prep: Preprocessing, pixels: UInt8, wanted: Float32
) -> tuple[Run, float] | None:
    """The fused form and its error, if it exists for this network and agrees with the plain one.

    Args:
        backbone: The frozen network.
        prep: Its preprocessing.
        pixels: Images to compare on, uint8 [n, H, W, 3].
        wanted: The plain network's features of them, float32 [n, D].
    """
    try:
        fused = runner(fuse_for_cpu(backbone), prep)
        error = relative_error(fused(pixels), wanted)
    except Exception as problem:  # whatever torch.fx or oneDNN say, the plain form is there
        say(f"running the network unfused: {type(problem).__name__}: {str(problem)[:100]}")
        return None
    if not error <= TOLERANCE:
        say(f"running the network unfused: the fused form is off by {error:.1e}")
        return None
    return fused, error

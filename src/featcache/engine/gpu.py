"""The network on a GPU: batches are copied, computed and fetched while the next one is decoded."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from featcache.config import Preprocessing
from featcache.data import normalize
from featcache.engine.base import (
    AMP_TOLERANCE,
    TOLERANCE,
    AsyncForward,
    Engine,
    EngineSettings,
    Float32,
    Forward,
    UInt8,
    relative_error,
    sample_pixels,
)
from featcache.engine.torch_cpu import reference_features
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import num_cores

GPU_BATCH = 256
CHECKED_IMAGES = 8
# torch's precision settings belong to the whole process: one thread at a time changes them.
_PRECISION = threading.Lock()


def gpu_engine(
    settings: EngineSettings, network: nn.Module, prep: Preprocessing, device: str
) -> Engine:
    """Move the network to a device and check its features against the CPU's in float32.

    Raises:
        UserError: openvino or int8 was asked for.
        FeatcacheError: The device's features are too far off.
    """
    if settings.precision == "int8" or settings.engine == "openvino":
        raise UserError("openvino and int8 run on the CPU: add --device cpu")
    pixels = sample_pixels(prep, CHECKED_IMAGES)
    reference = reference_features(network, prep, pixels, settings.backbone)
    network = network.to(device).to(memory_format=torch.channels_last)
    start = _async_forward(network, prep, device, half=settings.precision == "amp")
    run = _blocking(start)
    error = relative_error(run(pixels), reference)
    limit = AMP_TOLERANCE if settings.precision == "amp" else TOLERANCE
    if not error <= limit:
        way_out = "--precision float32" if settings.precision == "amp" else "--device cpu"
        raise FeatcacheError(
            f"{settings.precision} features on {device} are off by {error:.1e} of the largest, "
            f"above {limit:.0e}: use {way_out}"
        )
    return Engine(
        name="torch",
        precision=settings.precision,
        device=device,
        batch_size=settings.batch_size or GPU_BATCH,
        threads=1,
        workers=num_cores() if settings.workers is None else settings.workers,
        run=run,
        timings={},
        max_error=error,
        start=start,
    )


def _blocking(start: AsyncForward) -> Forward:
    def run(pixels: UInt8) -> Float32:
        return start(pixels)()[0]

    return run


def _async_forward(
    network: nn.Module, prep: Preprocessing, device: str, *, half: bool
) -> AsyncForward:
    """Make the function that starts a batch; only fetching its result waits for the device."""
    cuda = device == "cuda"

    def start(pixels: UInt8) -> Callable[[], tuple[Float32, float]]:
        host = torch.from_numpy(pixels)
        host = host.pin_memory() if cuda else host
        elapsed = _cuda_clock() if cuda else _clock()
        autocast = torch.autocast(device, dtype=torch.float16, enabled=half)
        try:
            with torch.inference_mode(), _full_float32(), autocast:
                images = normalize(host.to(device, non_blocking=cuda), prep)
                features = network(images).float().to("cpu", non_blocking=cuda)
        except torch.OutOfMemoryError as problem:
            raise UserError(
                f"{device} has too little memory for batches of {len(pixels)} images: give a "
                f"smaller --batch-size, for example {max(1, len(pixels) // 4)}"
            ) from problem
        seconds = elapsed()

        def finish() -> tuple[Float32, float]:
            busy = seconds()
            array: Float32 = features.numpy()
            return array, busy

        return finish

    return start


def _clock() -> Callable[[], Callable[[], float]]:
    """Time calls that wait for the device themselves."""
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - start
        return lambda: seconds

    return stop


def _cuda_clock() -> Callable[[], Callable[[], float]]:
    """Time work in the device's queue; the last call waits for its end."""
    new_event: Callable[..., Any] = torch.cuda.Event
    started, ended = (new_event(enable_timing=True) for _ in range(2))
    started.record()

    def stop() -> Callable[[], float]:
        ended.record()

        def wait() -> float:
            ended.synchronize()
            seconds: float = started.elapsed_time(ended) / 1000
            return seconds

        return wait

    return stop


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Forbid TensorFloat-32, which cuDNN uses by itself and which keeps three digits only."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    name, off = ("fp32_precision", "ieee") if hasattr(cudnn, "conv") else ("allow_tf32", False)
    places = [getattr(cudnn, "conv", cudnn), matmul]
    with _PRECISION:
        before = [getattr(place, name) for place in places]
        try:
            for place in places:
                setattr(place, name, off)
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                setattr(place, name, value)

"""What runs the frozen network: chosen, checked against the plain network, and timed.

On a CPU, images are spread over threads that each decode and compute with one core; nothing waits
at a barrier, and a neighbour on the machine costs only its share. On a GPU, threads decode and one
stream computes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache.config import ExtractConfig, Preprocessing
from featcache.data import normalize
from featcache.errors import FeatcacheError, UserError
from featcache.fuse import fuse_for_cpu
from featcache.runtime import num_cores, say

# A faster form must give the plain network's features within this, relative to the largest.
TOLERANCE = 1e-4
AMP_TOLERANCE = 1e-2
CPU_BATCHES = (8, 16, 32)
GPU_BATCH = 256
# A self-test of a second or two has to be repaid; below so many images the defaults are taken.
SELF_TEST_IMAGES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to run the network: from pixels [n, H, W, 3] uint8 to features [n, D] float32.

    `threads` callers may be inside `run` at once. `timings` holds images per second of what was
    tried, for the record.
    """

    name: str
    precision: str
    device: str
    batch_size: int
    threads: int
    run: Callable[[np.ndarray], np.ndarray]
    timings: dict[str, float]
    max_error: float | None

    def describe(self) -> dict[str, Any]:
        """The choice, as JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "run"}


def choose_engine(
    config: ExtractConfig,
    backbone: nn.Module,
    prep: Preprocessing,
    device: str,
    num_images: int,
) -> Engine:
    """Pick the form, batch size and threads for a job, and check the features it gives.

    Args:
        config: Overrides: engine, precision, batch size, workers.
        backbone: The frozen network, on the CPU.
        prep: Its preprocessing.
        device: cpu, cuda or mps.
        num_images: Forward passes ahead; a short job skips the timing.

    Raises:
        UserError: The engine or precision asked for cannot be had here.
    """
    if device != "cpu":
        return _gpu_engine(config, backbone, prep, device)
    if config.precision == "amp":
        raise UserError("--precision amp needs a GPU; on a CPU use float32, or int8 with openvino")
    torch.set_num_threads(1)
    threads = num_cores() if not config.workers else config.workers
    run, error = _checked(backbone, prep)
    batches = (config.batch_size,) if config.batch_size else CPU_BATCHES
    timings: dict[str, float] = {}
    if len(batches) > 1 and num_images >= SELF_TEST_IMAGES:
        for batch in batches:
            timings[f"torch float32 batch {batch}"] = images_per_second(run, prep, batch)
        batch = batches[int(np.argmax(list(timings.values())))]
    else:
        batch = batches[0] if len(batches) == 1 else 16
    return Engine(
        name="torch",
        precision="float32",
        device="cpu",
        batch_size=batch,
        threads=max(threads, 1),
        run=run,
        timings=timings,
        max_error=error,
    )


def _runner(network: nn.Module, prep: Preprocessing) -> Callable[[np.ndarray], np.ndarray]:
    """Wrap a network on the CPU as a function of uint8 pixels."""

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            features: Tensor = network(normalize(torch.from_numpy(pixels), prep))
        array: np.ndarray = features.numpy()
        return array

    return run


def _checked(
    backbone: nn.Module, prep: Preprocessing
) -> tuple[Callable[[np.ndarray], np.ndarray], float | None]:
    """The fused form if it exists for this network and agrees with the plain one."""
    plain = _runner(backbone.to(memory_format=torch.channels_last), prep)
    try:
        fused = _runner(fuse_for_cpu(backbone), prep)
        pixels = sample_pixels(prep, 4)
        error = relative_error(fused(pixels), plain(pixels))
    except Exception as problem:  # whatever torch.fx or oneDNN say, the plain form is there
        say(f"running the network unfused: {type(problem).__name__}: {str(problem)[:100]}")
        return plain, None
    if not error <= TOLERANCE:
        say(f"running the network unfused: the fused form is off by {error:.1e}")
        return plain, None
    return fused, error


def sample_pixels(prep: Preprocessing, num: int, seed: int = 0) -> np.ndarray:
    """Noise with structure at several scales, uint8 [num, H, W, 3], to check and time with."""
    rng = np.random.default_rng(seed)
    side = prep.image_px
    coarse = rng.integers(0, 256, (num, 8, 8, 3))
    grid = np.arange(side) * 8 // side
    fine = rng.integers(-32, 33, (num, side, side, 3))
    pixels: np.ndarray = np.clip(coarse[:, grid][:, :, grid] + fine, 0, 255).astype(np.uint8)
    return pixels


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute difference over the largest magnitude wanted; inf where not finite."""
    error = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))
    return error if np.isfinite(error) else float("inf")


def images_per_second(
    run: Callable[[np.ndarray], np.ndarray], prep: Preprocessing, batch: int, seconds: float = 0.2
) -> float:
    """Rate of one caller over at least `seconds`, after a warm-up pass."""
    pixels = sample_pixels(prep, batch)
    run(pixels)
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not done:
        run(pixels)
        done += batch
    return done / spent if spent > 0 else float("inf")


def _gpu_engine(
    config: ExtractConfig, backbone: nn.Module, prep: Preprocessing, device: str
) -> Engine:
    """Channels-last on the device; half precision on request, where it stays close to float32."""
    if config.precision == "int8" or config.engine == "openvino":
        raise UserError("openvino and int8 run on the CPU: add --device cpu")
    network = backbone.to(device).to(memory_format=torch.channels_last)

    def run_as(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
        def run(pixels: np.ndarray) -> np.ndarray:
            host = torch.from_numpy(pixels)
            host = host.pin_memory() if device == "cuda" else host
            images = normalize(host.to(device, non_blocking=True), prep)
            half = torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32)
            with torch.inference_mode(), half:
                features: Tensor = network(images)
            array: np.ndarray = features.float().cpu().numpy()
            return array

        return run

    run, error = run_as(torch.float32), None
    if config.precision == "amp":
        pixels, exact = sample_pixels(prep, 16), run
        run = run_as(torch.float16)
        error = relative_error(run(pixels), exact(pixels))
        if error > AMP_TOLERANCE:
            raise FeatcacheError(
                f"mixed precision is off by {error:.1e} here, above {AMP_TOLERANCE}: "
                "use --precision float32"
            )
    return Engine(
        name="torch",
        precision=config.precision,
        device=device,
        batch_size=config.batch_size or GPU_BATCH,
        threads=1,
        run=run,
        timings={},
        max_error=error,
    )

"""Which engine runs a job: as asked for, as an unfinished cache requires, or the fastest here.

On a CPU, images are spread over threads that each decode and compute with one core; nothing waits
at a barrier, and other load on the machine costs only its share. On a GPU, threads decode and one
stream computes.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING

from featcache.config import Preprocessing
from featcache.data import ImageSplit
from featcache.display import say
from featcache.engine import autotune, openvino_cpu
from featcache.engine.base import (
    Engine,
    EngineSettings,
    Implementation,
    Workload,
    sample_pixels,
)
from featcache.engine.gpu import gpu_engine
from featcache.engine.int8 import int8_engine
from featcache.engine.torch_cpu import (
    WINOGRAD,
    reference_features,
    torch_implementation,
    winograd_implementation,
)
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import num_cores, pick_device

if TYPE_CHECKING:
    from torch import nn

CHECKED_IMAGES = 4
# One engine at a time in the process: self-tests would spoil each other's timings, and
# torch.jit.trace, which OpenVINO's converter needs, keeps its state in a global.
_BUILDING = threading.RLock()


def device_of(settings: EngineSettings, resumed: str | None = None) -> str:
    """Where to run: `auto` takes a GPU, except for what runs on the CPU only.

    Args:
        settings: Device, engine and precision.
        resumed: The engine that made the rows there already.

    Raises:
        UserError: The device asked for is not there.
    """
    openvino = settings.engine == "openvino" or settings.precision == "int8"
    if settings.device == "auto" and (openvino or (resumed or "").startswith("openvino")):
        return "cpu"
    return pick_device(settings.device)


def choose_engine(
    settings: EngineSettings,
    network: nn.Module,
    prep: Preprocessing,
    *,
    num_images: int,
    train: ImageSplit | None = None,
    resumed: str | None = None,
) -> Engine:
    """Pick the implementation, batch size and threads for a job, and check its features.

    Safe in any thread, beside others that use torch or this very network: the engine gets a copy.
    Code of your own that calls torch.jit.trace must not do so at the same time as this.

    Args:
        settings: What the user asks for.
        network: The frozen network, on the CPU; it is not changed.
        prep: Its preprocessing.
        num_images: Forward passes ahead; a short job skips the timing.
        train: Images that int8 may calibrate on.
        resumed: The engine that made the rows there already; `auto` keeps it.

    Raises:
        UserError: The device, engine or precision asked for cannot be had here.
    """
    device = device_of(settings, resumed)
    with _BUILDING:
        private = copy.deepcopy(network)
        if device != "cpu":
            return gpu_engine(settings, private, prep, device)
        work = _cpu_workload(settings, private, prep, num_images)
        if settings.precision == "int8":
            return int8_engine(work, train)
        return _cpu_engine(work, resumed)


def _cpu_workload(
    settings: EngineSettings, network: nn.Module, prep: Preprocessing, num_images: int
) -> Workload:
    """The job on a CPU, with what the plain network gives for a sample."""
    if settings.precision == "amp":
        raise UserError("--precision amp needs a GPU; on a CPU use float32, or int8 with openvino")
    import torch

    torch.set_num_threads(1)
    network = network.to(memory_format=torch.channels_last)
    sample = sample_pixels(prep, CHECKED_IMAGES)
    return Workload(
        settings=settings,
        network=network,
        prep=prep,
        num_images=num_images,
        threads=max(1, num_cores() if settings.workers is None else settings.workers),
        sample=sample,
        reference=reference_features(network, prep, sample, settings.backbone),
    )


def _cpu_engine(work: Workload, resumed: str | None) -> Engine:
    """The fastest float32 engine on a CPU, unless one is asked for or rows were made by one."""
    asked = work.settings.engine
    if asked == "auto" and resumed:
        asked = "openvino" if resumed.startswith("openvino") else "torch"
    implementations: list[Implementation] = []
    if asked == "openvino":
        if work.settings.engine == "openvino":
            openvino_cpu.need("--engine openvino", "openvino", otherwise="leave --engine out")
        openvino_cpu.need(
            "the cache was started with openvino and", "openvino", otherwise="give --force"
        )
        implementations.append(openvino_cpu.openvino_implementation(work)[0])
    elif resumed == WINOGRAD:
        found = winograd_implementation(work)
        if found is None:
            raise UserError(
                "the cache was started with Winograd's convolutions, which give other features "
                "here: go on where it was started, or give --force"
            )
        implementations.append(found)
    else:
        implementations.append(torch_implementation(work))
    seconds = autotune.expected_seconds(work, implementations[0])
    if seconds < autotune.LONG_JOB_S:
        defaults = {"batch_size": work.batch_size, "threads": work.threads}
        return _engine(work, autotune.Candidate(implementation=implementations[0], **defaults), {})
    if asked == "auto":
        implementations += filter(None, [winograd_implementation(work)])
        try:
            if openvino_cpu.is_installed("openvino"):
                implementations.append(openvino_cpu.openvino_implementation(work)[0])
        except FeatcacheError as problem:
            say(f"running the network in torch: {problem}")
    best, timings = autotune.tune(work, implementations, seconds)
    return _engine(work, best, timings)


def _engine(work: Workload, chosen: autotune.Candidate, timings: dict[str, float]) -> Engine:
    workers = work.settings.workers
    return Engine(
        name=chosen.implementation.name,
        precision="float32",
        device="cpu",
        batch_size=chosen.batch_size,
        threads=chosen.threads,
        workers=chosen.threads if workers is None else workers,
        run=chosen.implementation.forward,
        timings=timings,
        max_error=chosen.implementation.max_error,
        recorded=chosen.implementation.recorded,
    )

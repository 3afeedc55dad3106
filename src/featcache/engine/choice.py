"""Which engine runs a job: as asked for, as the unfinished cache began, or the fastest here.

On a CPU, images are spread over threads that each decode and compute with one core; nothing waits
at a barrier, and a neighbour on the machine costs only its share. On a GPU, threads decode and one
stream computes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.config import ExtractConfig, Preprocessing
from featcache.data import ImageSplit
from featcache.engine import int8, openvino_cpu
from featcache.engine.autotune import Candidate, Measure, all_at_once, race
from featcache.engine.base import (
    TOLERANCE,
    Engine,
    Float32,
    Run,
    UInt8,
    relative_error,
    sample_pixels,
)
from featcache.engine.gpu import gpu_engine
from featcache.engine.torch_cpu import fused_run, plain_features, plain_run
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import num_cores, pick_device, recorded_engine, say

if TYPE_CHECKING:
    from torch import nn

CHECKED_IMAGES = 4
# A self-test has to be repaid, and so has loading another engine: two or three seconds together.
LONG_JOB_S = 60.0
SELF_TEST_SHARE = 0.02
SELF_TEST_S = 2.0
# Below so many images even the question is not worth its pass over the network.
SELF_TEST_IMAGES = 1000
# One engine at a time in the process: self-tests would spoil each other's timings, and
# torch.jit.trace, which OpenVINO's converter needs, keeps its state in a global.
_BUILDING = threading.RLock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What there is to do.

    Attributes:
        config: Overrides: engine, precision, batch size, workers.
        backbone: The frozen network, on the CPU.
        prep: Its preprocessing.
        num_images: Forward passes ahead.
        threads: Callers at once.
        pixels: Images to compare forms on, uint8 [n, H, W, 3].
        wanted: The plain network's features of them, float32 [n, D].
    """

    config: ExtractConfig
    backbone: nn.Module
    prep: Preprocessing
    num_images: int
    threads: int
    pixels: UInt8
    wanted: Float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the network that gives the right features; see `Engine` for the attributes."""

    name: str
    run: Run
    error: float | None
    recorded: str


def device_of(config: ExtractConfig, begun: str | None = None) -> str:
    """Where to run: `auto` takes a GPU, unless what was asked for or begun runs on the CPU only.

    Args:
        config: Device, engine and precision.
        begun: What made the rows that are there already.

    Raises:
        UserError: The device asked for is not there.
    """
    openvino = config.engine == "openvino" or config.precision == "int8"
    if config.device == "auto" and (openvino or (begun or "").startswith("openvino")):
        return "cpu"
    return pick_device(config.device)


def choose_engine(
    config: ExtractConfig,
    backbone: nn.Module,
    prep: Preprocessing,
    device: str,
    num_images: int,
    train: ImageSplit | None = None,
    begun: str | None = None,
) -> Engine:
    """Pick the form, batch size and threads for a job, and check the features it gives.

    Safe in any thread, beside others that use torch or this very network: the engine gets a copy.
    Code of your own that calls torch.jit.trace must not do so at the same time as this.

    Args:
        config: Overrides: engine, precision, batch size, workers.
        backbone: The frozen network, on the CPU; it is not changed.
        prep: Its preprocessing.
        device: cpu, cuda or mps.
        num_images: Forward passes ahead; a short job skips the timing.
        train: Images that int8 may calibrate on.
        begun: What made the rows that are there already; `auto` goes on with it.

    Raises:
        UserError: The engine or precision asked for cannot be had here.
    """
    with _BUILDING:
        private = copy.deepcopy(backbone)
        if device != "cpu":
            return gpu_engine(config, private, prep, device)
        return _cpu_engine(config, private, prep, num_images, train, begun)


def _cpu_engine(
    config: ExtractConfig,
    backbone: nn.Module,
    prep: Preprocessing,
    num_images: int,
    train: ImageSplit | None,
    begun: str | None,
) -> Engine:
    """`choose_engine` on a CPU, of a network that is the engine's own."""
    if config.precision == "amp":
        raise UserError("--precision amp needs a GPU; on a CPU use float32, or int8 with openvino")
    import torch

    torch.set_num_threads(1)
    plain = plain_run(backbone, prep)
    pixels = sample_pixels(prep, CHECKED_IMAGES)
    job = Job(
        config=config,
        backbone=backbone,
        prep=prep,
        num_images=num_images,
        threads=max(1, num_cores() if config.workers is None else config.workers),
        pixels=pixels,
        wanted=plain_features(plain, pixels, config.backbone),
    )
    if config.precision == "int8":
        return _int8_engine(job, train)
    asked = begun.split("-")[0] if config.engine == "auto" and begun else config.engine
    if asked == "openvino":
        if config.engine == "openvino":
            openvino_cpu.need("--engine openvino", "openvino", otherwise="leave --engine out")
        openvino_cpu.need(
            "the cache was begun with openvino and", "openvino", otherwise="give --force"
        )
        return _fastest(job, [_vino_form(job)[0]])
    fused = fused_run(backbone, prep, pixels, job.wanted)
    run, error = (plain, None) if fused is None else fused
    torch_form = Form(name="torch", run=run, error=error, recorded="torch")
    return _fastest(job, [torch_form], try_openvino=asked == "auto")


def _vino_form(job: Job) -> tuple[Form, Any]:
    """The network in OpenVINO, and the model behind it.

    Raises:
        FeatcacheError: It cannot be converted, or gives other features.
    """
    try:
        model = openvino_cpu.convert(job.backbone, job.prep)
        run = openvino_cpu.compiled_run(model, job.threads)
        error = relative_error(run(job.pixels), job.wanted)
    except Exception as problem:  # the converter's own errors have no common class
        reason = (str(problem).splitlines() or [""])[0]
        raise FeatcacheError(
            f"OpenVINO cannot run this network ({type(problem).__name__}: {reason[:100]}): "
            "use --engine torch"
        ) from problem
    if not error <= TOLERANCE:
        raise FeatcacheError(f"OpenVINO's features are off by {error:.1e}: use --engine torch")
    recorded = recorded_engine("openvino")
    form = Form(name="openvino", run=run, error=error, recorded=recorded)
    return form, model


def _fastest(job: Job, forms: list[Form], *, try_openvino: bool = False) -> Engine:
    """The best form, batch size and number of threads: measured where the job repays it."""
    expected = _expected_seconds(job, forms[0])
    if expected < LONG_JOB_S:
        batch = job.config.batch_size or default_batch(job.prep.image_px)
        return _engine(job, forms[0], batch, job.threads, {})
    if try_openvino and openvino_cpu.is_installed("openvino"):
        try:
            forms = [*forms, _vino_form(job)[0]]
        except FeatcacheError as problem:
            say(f"running the network in torch: {problem}")
    with all_at_once(job.prep, job.threads) as measure:
        best, timings = choose_by(job, forms, measure, min(SELF_TEST_S, SELF_TEST_SHARE * expected))
    form = next(f for f in forms if f.name == best.engine)
    return _engine(job, form, best.batch_size, best.threads, timings)


def choose_by(
    job: Job, forms: list[Form], measure: Measure, budget_s: float
) -> tuple[Candidate, dict[str, float]]:
    """Race the forms, then for the winner twice the batch, then as many threads as real cores."""
    batch = job.config.batch_size or default_batch(job.prep.image_px)
    options = {"batch_size": batch, "threads": job.threads}
    entrants = [Candidate(engine=f.name, run=f.run, **options) for f in forms]
    best, timings = race(entrants, measure, budget_s / 2)
    changes: list[dict[str, int]] = []
    if job.config.batch_size is None:
        changes.append({"batch_size": 2 * batch})
    if job.config.workers is None and (real := physical_cores()) < job.threads:
        changes.append({"threads": real})
    for change in changes:
        other = dataclasses.replace(best, **change)  # type: ignore[arg-type]
        best, more = race([best, other], measure, budget_s / 2 / len(changes))
        timings |= more
    return best, timings


def _expected_seconds(job: Job, form: Form) -> float:
    """How long the job will take, judged by one pass over a few images."""
    if job.num_images < SELF_TEST_IMAGES:
        return 0.0
    start = time.perf_counter()
    form.run(job.pixels)
    each = (time.perf_counter() - start) / len(job.pixels)
    return each * job.num_images / job.threads


def default_batch(image_px: int) -> int:
    """A power of two near the batch size that keeps a ResNet's maps in a core's cache.

    Measured: 8 at 224 px, 32 at 128 px, 64 at 64 px; larger ones gain nothing.
    """
    power = round(math.log2(10 * (224 / image_px) ** 2))
    return 1 << min(6, max(2, power))


def _engine(
    job: Job, form: Form, batch_size: int, threads: int, timings: dict[str, float]
) -> Engine:
    return Engine(
        name=form.name,
        precision="float32",
        device="cpu",
        batch_size=batch_size,
        threads=threads,
        run=form.run,
        timings=timings,
        max_error=form.error,
        recorded=form.recorded,
    )


def _int8_engine(job: Job, train: ImageSplit | None) -> Engine:
    """Quantise the network and compare it with float32 on images that it was not calibrated on.

    Raises:
        UserError: Not installed, too few train images, or too far from float32.
    """
    openvino_cpu.need("--precision int8", "openvino", "nncf", otherwise="leave --precision out")
    if train is None:
        raise UserError("--precision int8 calibrates on train images, and there is no train split")
    calibration, others = int8.pick_pixels(train, job.prep, job.threads)
    say(f"calibrating int8 on {len(calibration)} train images, checking on {len(others)} others")
    exact, model = _vino_form(job)
    batch = job.config.batch_size or default_batch(job.prep.image_px)
    batches = [others[i : i + batch] for i in range(0, len(others), batch)]
    pool = ThreadPoolExecutor(job.threads)
    try:
        exactly = pool.map(exact.run, batches)  # begun now: quantising mostly needs one core
        model = int8.quantize(model, calibration)
        run = openvino_cpu.compiled_run(model, job.threads)
        wanted, got = (np.concatenate(list(f)) for f in (exactly, pool.map(run, batches)))
    finally:
        pool.shutdown(cancel_futures=True)
    found: dict[str, Any] = {"num_calibrated": len(calibration), **int8.compare(got, wanted)}
    int8.refuse_if_far(found)
    model_hash = int8.hash_of(model)
    return Engine(
        name="openvino",
        precision="int8",
        device="cpu",
        batch_size=batch,
        threads=job.threads,
        run=run,
        timings={},
        max_error=relative_error(got, wanted),
        recorded=f"{exact.recorded}+{recorded_engine('nncf')}:{model_hash[:16]}",
        int8={**found, "model_sha256": model_hash},
    )


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads of one core counted once."""
    groups = set()
    try:
        for cpu in os.sched_getaffinity(0):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            groups.add(siblings.read_text(encoding="ascii"))
    except (OSError, AttributeError):  # not Linux
        return num_cores()
    return len(groups)

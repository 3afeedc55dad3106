"""The network in 8-bit integers: calibrated on train images, checked on others before use.

The images to calibrate on depend on the images' content alone, so that the same dataset gives the
same quantized network again and an interrupted run can resume. The quantized network's hash is
recorded with the rows; rows of two different networks are never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from featcache.config import Preprocessing, Views
from featcache.data import BadImage, ImageSplit, iterate_pixels
from featcache.display import say
from featcache.engine import openvino_cpu
from featcache.engine.base import (
    CosineStats,
    Engine,
    Float32,
    Int8Check,
    UInt8,
    Workload,
    relative_error,
)
from featcache.errors import UserError
from featcache.runtime import recorded_engine

NUM_CALIBRATION = 64
NUM_CHECKED = 256
CALIBRATION_BATCH = 8  # does not change the ranges; NNCF has a cost per batch
MIN_IMAGES = 32
MIN_COSINE = 0.99


def int8_engine(work: Workload, train: ImageSplit | None) -> Engine:
    """Quantize the network and compare it with float32 on images that it was not calibrated on.

    Raises:
        UserError: Not installed, too few train images, or too far from float32.
    """
    openvino_cpu.need("--precision int8", "openvino", "nncf", otherwise="leave --precision out")
    if train is None:
        raise UserError("--precision int8 calibrates on train images, and there is no train split")
    calibration, others = pick_pixels(train, work.prep, work.threads)
    say(f"calibrating int8 on {len(calibration)} train images, checking on {len(others)} others")
    exact, model = openvino_cpu.openvino_implementation(work)
    step = work.batch_size
    batches = [others[i : i + step] for i in range(0, len(others), step)]
    pool = ThreadPoolExecutor(work.threads)
    try:
        exactly = pool.map(exact.forward, batches)  # already running: NNCF mostly needs one core
        model = quantize(model, calibration)
        forward = openvino_cpu.compiled_forward(model, work.threads)
        wanted, got = (np.concatenate(list(f)) for f in (exactly, pool.map(forward, batches)))
    finally:
        pool.shutdown(cancel_futures=True)
    cosine = cosine_stats(got, wanted)
    refuse_if_far(cosine, len(others))
    model_hash = hash_of(model)
    return Engine(
        name="openvino",
        precision="int8",
        device="cpu",
        batch_size=step,
        threads=work.threads,
        workers=work.threads if work.settings.workers is None else work.settings.workers,
        run=forward,
        timings={},
        max_error=relative_error(got, wanted),
        recorded=f"{exact.recorded}+{recorded_engine('nncf')}:{model_hash[:16]}",
        int8=Int8Check(
            num_calibrated=len(calibration),
            num_checked=len(others),
            cosine=cosine,
            model_sha256=model_hash,
        ),
    )


def pick_pixels(split: ImageSplit, prep: Preprocessing, workers: int) -> tuple[UInt8, UInt8]:
    """Decode the images that calibrate and those that check, no image in both.

    They are the ones with the smallest content hashes: a random choice that depends on nothing
    else and changes little when a dataset grows a little.

    Args:
        split: The train images; unreadable ones are skipped.
        prep: Resize and crop.
        workers: Threads that decode.

    Returns:
        Pixels uint8 [n, H, W, 3] to calibrate on, and [m, H, W, 3] to check on.

    Raises:
        UserError: There are too few different images.
    """
    _, first = np.unique(split.content.view("S32").ravel(), return_index=True)
    wanted = first[: 2 * (NUM_CALIBRATION + NUM_CHECKED)]
    found: list[UInt8] = []
    rows = iterate_pixels(split, wanted.tolist(), prep, Views(), workers=workers)
    with contextlib.closing(rows):
        for _, pixels in rows:
            if not isinstance(pixels, BadImage):
                found.append(pixels[0])
            if len(found) == NUM_CALIBRATION + NUM_CHECKED:
                break
    if len(found) < MIN_IMAGES:
        raise UserError(
            f"--precision int8: {len(found)} different train images are too few to calibrate and "
            f"check with: give at least {MIN_IMAGES}, or use --precision float32"
        )
    num = min(NUM_CALIBRATION, len(found) // 2)
    return np.stack(found[:num]), np.stack(found[num:])


def quantize(model: Any, pixels: UInt8) -> Any:
    """Quantize an OpenVINO model after training.

    Ranges are the smallest and largest activations seen, and biases stay as they are: NNCF's
    defaults (mean of the ranges, corrected biases) lower the median cosine similarity on
    photographs from 0.9992 to 0.9904, and the worst of 256 from 0.997 to 0.935.

    Args:
        model: From pixels uint8 [n, H, W, 3] to features.
        pixels: Images to calibrate on, uint8 [n, H, W, 3].
    """
    with _quietly():
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        step = CALIBRATION_BATCH
        batches = [pixels[i : i + step] for i in range(0, len(pixels), step)]
        choices = AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            batchwise_statistics=True,
            disable_bias_correction=True,
        )
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            advanced_parameters=choices,
        )


def hash_of(model: Any) -> str:
    """sha256, as hex, of a model's operations in order, with their shapes and constants."""
    digest = hashlib.sha256()
    for op in model.get_ordered_ops():
        shape = op.get_output_partial_shape(0) if op.get_output_size() else ""
        digest.update(f"{op.get_type_name()}:{shape};".encode())
        if op.get_type_name() == "Constant":
            digest.update(np.ascontiguousarray(op.get_data()).tobytes())
    return digest.hexdigest()


def cosine_stats(got: Float32, wanted: Float32) -> CosineStats:
    """Cosine similarity of two sets of features [n, D], row by row."""
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = (got * wanted).sum(axis=1) / np.maximum(lengths, 1e-12)
    cosine = np.where((got == wanted).all(axis=1), 1.0, cosine)  # rows of zeros included
    return CosineStats(median=float(np.median(cosine)), worst=float(cosine.min()))


def refuse_if_far(cosine: CosineStats, num_checked: int) -> None:
    """Refuse a quantized network whose features are too far from float32's.

    Raises:
        UserError: The median cosine similarity is too low.
    """
    median = cosine["median"]
    if not median >= MIN_COSINE:
        raise UserError(
            f"--precision int8 changes these features too much: median cosine {median:.4f} with "
            f"float32 on {num_checked} train images, at least {MIN_COSINE} is needed; "
            "use --precision float32"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep NNCF from printing on stdout, warning, and sending telemetry."""
    os.environ.setdefault("NNCF_CI", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

"""The network in 8-bit integers: calibrated on train images, checked on others before use.

Which images calibrate follows from their content alone, so that the same dataset gives the same
quantised network again, and a run that was interrupted can go on. The network's own hash is
recorded with the rows; should it differ nevertheless, the rows are not mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from featcache.config import Preprocessing, Views
from featcache.data import BadImage, ImageSplit, iterate_pixels
from featcache.engine.base import Float32, UInt8
from featcache.errors import UserError

NUM_CALIBRATION = 64
NUM_CHECKED = 256
CALIBRATION_BATCH = 8  # the same ranges in any batches; NNCF's work for each costs more than one's
MIN_IMAGES = 32
MIN_COSINE = 0.99


def pick_pixels(split: ImageSplit, prep: Preprocessing, workers: int) -> tuple[UInt8, UInt8]:
    """Decode the images that calibrate and those that check, no image in both.

    They are the ones with the smallest content hashes: a random choice that depends on nothing
    else, and that hardly changes when a dataset grows a little.

    Args:
        split: The train images; those that cannot be read are passed over.
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
            f"to check, {MIN_IMAGES} are needed; use --precision float32"
        )
    num = min(NUM_CALIBRATION, len(found) // 2)
    return np.stack(found[:num]), np.stack(found[num:])


def quantize(model: Any, pixels: UInt8) -> Any:
    """Quantise an OpenVINO model after training.

    Ranges are the least and largest activations seen, and biases stay as they are: NNCF's own
    choices (mean of the ranges, corrected biases) brought the median cosine similarity on
    photographs from 0.9992 down to 0.9904, and the worst of 256 from 0.997 to 0.935.

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


def compare(got: Float32, wanted: Float32) -> dict[str, Any]:
    """How alike two sets of features [n, D] are, as JSON: cosine similarity of their rows."""
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = (got * wanted).sum(axis=1) / np.maximum(lengths, 1e-12)
    cosine = np.where((got == wanted).all(axis=1), 1.0, cosine)  # rows of zeros included
    return {
        "num_checked": len(cosine),
        "cosine": {"median": float(np.median(cosine)), "worst": float(cosine.min())},
    }


def refuse_if_far(found: dict[str, Any]) -> None:
    """Refuse a quantised network that has lost its features.

    Raises:
        UserError: The median cosine similarity is too low.
    """
    median = found["cosine"]["median"]
    if not median >= MIN_COSINE:
        raise UserError(
            f"--precision int8 changes these features too much: median cosine {median:.4f} with "
            f"float32 on {found['num_checked']} train images, {MIN_COSINE} is the least; "
            "use --precision float32"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep NNCF from printing on stdout, warning, and reporting its use to its makers."""
    os.environ.setdefault("NNCF_CI", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

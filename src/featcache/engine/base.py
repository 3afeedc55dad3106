"""What an engine is, and how close to the plain network it has to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import Preprocessing

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Run = Callable[[UInt8], Float32]
# Starts a batch on a device; the returned function waits for the features and tells how many
# seconds the device was busy with them.
Start = Callable[[UInt8], Callable[[], tuple[Float32, float]]]

# A faster form must give the plain network's features within this, relative to the largest.
TOLERANCE = 1e-4
AMP_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to run the network: from pixels [n, H, W, 3] uint8 to features [n, D] float32.

    Attributes:
        name: torch or openvino.
        precision: float32, int8 or amp.
        device: cpu, cuda or mps.
        batch_size: Images per call.
        threads: Callers that may be inside `run` at once.
        run: Computes the features of a batch.
        timings: Images per second of what was tried, by its label.
        max_error: Largest difference from the plain network, relative to its largest feature.
        recorded: What the cache records, with what can change a row; the name unless given.
        start: Begins a batch without waiting for it; on a GPU only.
        int8: How the quantised network was calibrated and checked.
    """

    name: str
    precision: str
    device: str
    batch_size: int
    threads: int
    run: Run
    timings: dict[str, float]
    max_error: float | None
    recorded: str = ""
    start: Start | None = None
    int8: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """The choice, as JSON."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("run", "start")]
        told = {name: getattr(self, name) for name in fields}
        told["recorded"] = self.recorded or self.name
        if self.int8 is None:
            del told["int8"]
        return told

    def sentence(self) -> str:
        """The choice, for people."""
        callers = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        text = f"{self.name} {self.precision} on {self.device}, batch {self.batch_size}, {callers}"
        if self.max_error is not None and self.int8 is None:
            text += f", within {self.max_error:.0e} of the plain network"
        if self.int8 is not None:
            cosine = self.int8["cosine"]
            text += (
                f", cosine with float32 on {self.int8['num_checked']} train images: "
                f"median {cosine['median']:.4f}, worst {cosine['worst']:.4f}"
            )
        if self.timings:
            rates = ", ".join(f"{label} {rate:.0f}" for label, rate in self.timings.items())
            text += f"; images/s in the self-test: {rates}"
        return text


def sample_pixels(prep: Preprocessing, num: int, seed: int = 0) -> UInt8:
    """Noise with structure at several scales, uint8 [num, H, W, 3], to check and time with."""
    rng = np.random.default_rng(seed)
    side = prep.image_px
    coarse = rng.integers(0, 256, (num, 8, 8, 3))
    grid = np.arange(side) * 8 // side
    fine = rng.integers(-32, 33, (num, side, side, 3))
    pixels: UInt8 = np.clip(coarse[:, grid][:, :, grid] + fine, 0, 255).astype(np.uint8)
    return pixels


def relative_error(got: Float32, wanted: Float32) -> float:
    """Largest absolute difference over the largest magnitude wanted; inf where not finite."""
    error = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))
    return error if np.isfinite(error) else float("inf")

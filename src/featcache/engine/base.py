"""What an engine is, what a user may ask of it, and how accurate it has to be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Optional, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from featcache.config import ExtractConfig, Precision, Preprocessing
from featcache.config.checks import check_range, check_types

if TYPE_CHECKING:
    from torch import nn

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
# Pixels [n, H, W, 3] to features [n, D].
Forward = Callable[[UInt8], Float32]
# Starts a batch on a device; the returned function waits for the features and also returns how
# many seconds the device spent on them.
AsyncForward = Callable[[UInt8], Callable[[], tuple[Float32, float]]]

# A faster implementation must give the plain network's features within this, relative to the
# largest.
TOLERANCE = 1e-4
AMP_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the user asks of the engine; see `ExtractConfig` for the fields.

    `backbone` names the network in messages.

    Raises:
        UserError: A value of another type, or out of range.
    """

    backbone: str
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    precision: Precision = "float32"
    batch_size: Optional[int] = None  # noqa: UP045 - the form that check_types reads
    workers: Optional[int] = None  # noqa: UP045

    def __post_init__(self) -> None:
        check_types(self)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("workers", self.workers, 0, 1024)

    @classmethod
    def of(cls, config: ExtractConfig) -> Self:
        """The engine's part of a command's settings."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A network and how much it has to compute, on a CPU.

    Attributes:
        settings: Engine, precision, batch size and workers asked for.
        network: The frozen network, on the CPU.
        prep: Its preprocessing.
        num_images: Forward passes ahead.
        threads: Concurrent callers.
        sample: Images to compare implementations on, uint8 [n, H, W, 3].
        reference: The plain network's features of the sample, float32 [n, D].
    """

    settings: EngineSettings
    network: nn.Module
    prep: Preprocessing
    num_images: int
    threads: int
    sample: UInt8
    reference: Float32

    @property
    def batch_size(self) -> int:
        """Images per call: as asked for, or the default for this image size."""
        return self.settings.batch_size or default_batch(self.prep.image_px)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """The network in one of its forms, checked to give the plain network's features.

    See `Engine` for the attributes.
    """

    name: str
    forward: Forward
    max_error: float | None
    recorded: str


class CosineStats(TypedDict):
    """Cosine similarity of features with those in float32."""

    median: float
    worst: float


class Int8Check(TypedDict):
    """How a quantized network was calibrated, and how it compares with float32."""

    num_calibrated: int
    num_checked: int
    cosine: CosineStats
    model_sha256: str


class EngineInfo(TypedDict, total=False):
    """An engine in reports; of a cache that was there already only `name` is known."""

    name: str
    precision: str
    device: str
    batch_size: int
    threads: int
    timings: dict[str, float]
    max_error: float | None
    recorded: str
    int8: Int8Check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to run the network: from pixels [n, H, W, 3] uint8 to features [n, D] float32.

    Attributes:
        name: torch, winograd (torch with Winograd's convolutions) or openvino.
        precision: float32, int8 or amp.
        device: cpu, cuda or mps.
        batch_size: Images per call.
        threads: Threads that may call `run` at once.
        workers: Threads that read and decode, and on a CPU call `run`; 0 for the calling thread.
        run: Computes the features of a batch.
        timings: Images per second of what was measured, by its label.
        max_error: Largest difference from the plain network, relative to its largest feature.
        recorded: What the cache records: name and whatever can change a row; `name` by default.
        start: Starts a batch without waiting for it; on a GPU only.
        int8: How the quantized network was calibrated and checked.
    """

    name: str
    precision: str
    device: str
    batch_size: int
    threads: int
    workers: int
    run: Forward
    timings: dict[str, float]
    max_error: float | None
    recorded: str = ""
    start: AsyncForward | None = None
    int8: Int8Check | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "recorded", self.recorded or self.name)

    def describe(self) -> EngineInfo:
        """The choice, as JSON."""
        info: EngineInfo = {
            "name": self.name,
            "precision": self.precision,
            "device": self.device,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "timings": self.timings,
            "max_error": self.max_error,
            "recorded": self.recorded,
        }
        return info if self.int8 is None else {**info, "int8": self.int8}

    def sentence(self) -> str:
        """The choice, for people."""
        callers = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        text = f"{self.name} {self.precision} on {self.device}, batch {self.batch_size}, {callers}"
        if self.int8 is not None:
            cosine = self.int8["cosine"]
            text += (
                f", cosine with float32 on {self.int8['num_checked']} train images: "
                f"median {cosine['median']:.4f}, worst {cosine['worst']:.4f}"
            )
        elif self.max_error is not None:
            text += f", within {self.max_error:.0e} of the plain network"
        if self.timings:
            rates = ", ".join(f"{label} {rate:.0f}" for label, rate in self.timings.items())
            text += f"; images/s in the self-test: {rates}"
        return text


def default_batch(image_px: int) -> int:
    """A power of two near the batch size that keeps a ResNet's maps in a core's cache.

    Measured: 8 at 224 px, 32 at 128 px, 64 at 64 px; larger ones gain nothing.
    """
    power = round(math.log2(10 * (224 / image_px) ** 2))
    return 1 << min(6, max(2, power))


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

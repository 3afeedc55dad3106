"""What runs the frozen network: chosen, checked against the plain network, and timed."""

from featcache.engine.base import (
    AMP_TOLERANCE,
    TOLERANCE,
    Engine,
    EngineInfo,
    EngineSettings,
    default_batch,
    relative_error,
    sample_pixels,
)
from featcache.engine.choice import choose_engine

__all__ = [
    "AMP_TOLERANCE",
    "TOLERANCE",
    "Engine",
    "EngineInfo",
    "EngineSettings",
    "choose_engine",
    "default_batch",
    "relative_error",
    "sample_pixels",
]

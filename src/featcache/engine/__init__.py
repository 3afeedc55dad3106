"""What runs the frozen network: chosen, checked against the plain network, and timed."""

from featcache.engine.base import (
    Engine,
    EngineInfo,
    EngineSettings,
    sample_pixels,
)
from featcache.engine.choice import choose_engine

__all__ = [
    "Engine",
    "EngineInfo",
    "EngineSettings",
    "choose_engine",
    "sample_pixels",
]

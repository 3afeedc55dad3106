"""Every setting of every command, as frozen dataclasses checked when they are built.

The command line is generated from these classes.
"""

from featcache.config.commands import (
    BackboneConfig,
    Backend,
    DataConfig,
    ExtractConfig,
    FinetuneConfig,
    InfoConfig,
    OutputConfig,
    Solver,
    TrainHeadConfig,
    VerifyConfig,
)
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneInfo,
    CacheMeta,
    DatasetInfo,
    Interpolation,
    Preprocessing,
    Resize,
    Views,
    flatten,
)

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BackboneConfig",
    "BackboneInfo",
    "Backend",
    "CacheMeta",
    "DataConfig",
    "DatasetInfo",
    "ExtractConfig",
    "FinetuneConfig",
    "InfoConfig",
    "Interpolation",
    "OutputConfig",
    "Preprocessing",
    "Resize",
    "Solver",
    "TrainHeadConfig",
    "VerifyConfig",
    "Views",
    "flatten",
]

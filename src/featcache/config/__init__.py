"""Every setting of every command, as frozen dataclasses checked when they are built.

The command line is generated from these classes.
"""

from featcache.config.classifier_commands import (
    AuditConfig,
    ClassifierConfig,
    ExportConfig,
    Format,
    PredictConfig,
)
from featcache.config.commands import (
    Backend,
    CompareConfig,
    ExtractConfig,
    FinetuneConfig,
    InfoConfig,
    ReportConfig,
    Solver,
    TrainHeadConfig,
    VerifyConfig,
)
from featcache.config.options import BackboneConfig, DataConfig, OutputConfig
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneInfo,
    CacheMeta,
    DatasetInfo,
    Interpolation,
    Pool,
    Preprocessing,
    Resize,
    StageColumns,
    StageInput,
    Views,
    flatten,
)
from featcache.config.settings import config_json

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AuditConfig",
    "BackboneConfig",
    "BackboneInfo",
    "Backend",
    "CacheMeta",
    "ClassifierConfig",
    "CompareConfig",
    "DataConfig",
    "DatasetInfo",
    "ExportConfig",
    "ExtractConfig",
    "FinetuneConfig",
    "Format",
    "InfoConfig",
    "Interpolation",
    "OutputConfig",
    "Pool",
    "PredictConfig",
    "Preprocessing",
    "ReportConfig",
    "Resize",
    "Solver",
    "StageColumns",
    "StageInput",
    "TrainHeadConfig",
    "VerifyConfig",
    "Views",
    "config_json",
    "flatten",
]

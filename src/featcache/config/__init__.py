"""Every setting of every command, as frozen dataclasses checked when they are built.

The command line is generated from these classes.
"""

from featcache.config.cache_commands import InfoConfig, MergeConfig, VerifyConfig
from featcache.config.classifier_commands import (
    AuditConfig,
    ExportConfig,
    Format,
    PredictConfig,
)
from featcache.config.commands import (
    CompareConfig,
    ExtractConfig,
    FinetuneConfig,
    ReportConfig,
    Solver,
    TrainHeadConfig,
)
from featcache.config.options import BackboneConfig, DataConfig, OutputConfig
from featcache.config.records import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OWN_MODULE,
    TIMM,
    BackboneInfo,
    CacheMeta,
    DatasetInfo,
    JsonObject,
    Pool,
    Precision,
    Preprocessing,
    StageColumns,
    StageInput,
    Task,
    Views,
    flatten,
    layer_of,
    weights_text,
)
from featcache.config.settings import config_json

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OWN_MODULE",
    "TIMM",
    "AuditConfig",
    "BackboneConfig",
    "BackboneInfo",
    "CacheMeta",
    "CompareConfig",
    "DataConfig",
    "DatasetInfo",
    "ExportConfig",
    "ExtractConfig",
    "FinetuneConfig",
    "Format",
    "InfoConfig",
    "JsonObject",
    "MergeConfig",
    "OutputConfig",
    "Pool",
    "Precision",
    "PredictConfig",
    "Preprocessing",
    "ReportConfig",
    "Solver",
    "StageColumns",
    "StageInput",
    "Task",
    "TrainHeadConfig",
    "VerifyConfig",
    "Views",
    "config_json",
    "flatten",
    "layer_of",
    "weights_text",
]

"""Run a frozen backbone once, cache its features, fit heads in milliseconds.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib

# typing takes a third of the time before a command can answer Ctrl-C
TYPE_CHECKING = False

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers and completion
    from featcache.api import compare_training as compare_training
    from featcache.api import export_classifier as export_classifier
    from featcache.api import extract_features as extract_features
    from featcache.api import finetune_network as finetune_network
    from featcache.api import predict_pictures as predict_pictures
    from featcache.api import train_head as train_head
    from featcache.api import write_report as write_report
    from featcache.cache import FeatureCache as FeatureCache
    from featcache.cache import FeatureDataset as FeatureDataset
    from featcache.config import CompareConfig as CompareConfig
    from featcache.config import ExportConfig as ExportConfig
    from featcache.config import ExtractConfig as ExtractConfig
    from featcache.config import FinetuneConfig as FinetuneConfig
    from featcache.config import PredictConfig as PredictConfig
    from featcache.config import ReportConfig as ReportConfig
    from featcache.config import TrainHeadConfig as TrainHeadConfig
    from featcache.errors import CacheError as CacheError
    from featcache.errors import FeatcacheError as FeatcacheError
    from featcache.errors import StorageError as StorageError
    from featcache.errors import UserError as UserError
    from featcache.heads import LinearHead as LinearHead
    from featcache.predict import Classifier as Classifier
    from featcache.predict import Prediction as Prediction

# Public name: the module it lives in. Functions are not called like their packages, because
# importing a package's module binds the package's name here.
_HOMES = {
    "CacheError": "errors",
    "Classifier": "predict",
    "CompareConfig": "config",
    "ExportConfig": "config",
    "ExtractConfig": "config",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "FeatureDataset": "cache",
    "FinetuneConfig": "config",
    "LinearHead": "heads",
    "PredictConfig": "config",
    "Prediction": "predict",
    "ReportConfig": "config",
    "StorageError": "errors",
    "TrainHeadConfig": "config",
    "UserError": "errors",
    "compare_training": "api",
    "export_classifier": "api",
    "extract_features": "api",
    "finetune_network": "api",
    "predict_pictures": "api",
    "train_head": "api",
    "write_report": "api",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'featcache' has no attribute {name!r}")
        return getattr(importlib.import_module(f"featcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

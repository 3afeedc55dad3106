"""Run a frozen backbone once, cache its features, fit heads in milliseconds.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FeatcacheError": "errors",
    "UserError": "errors",
    "CacheError": "errors",
    "StorageError": "errors",
    "ExtractConfig": "config",
    "TrainHeadConfig": "config",
    "FinetuneConfig": "config",
    "PredictConfig": "config",
    "ExportConfig": "config",
    "FeatureCache": "cache",
    "extract": "extract",
    "train_head": "heads",
    "finetune": "finetune",
    "LinearHead": "heads",
    "Classifier": "predict",
    "Prediction": "predict",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

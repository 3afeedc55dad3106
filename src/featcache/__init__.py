"""Run a frozen backbone once, cache its features, fit heads in milliseconds.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a third of the time before a command can answer Ctrl-C
    from typing import Any

__version__ = "0.1.0"

# Public name: the module it lives in, and its name there. Functions are not called like their
# packages, because importing a package's module binds the package's name here.
_HOMES = {
    "CacheError": "errors",
    "Classifier": "predict",
    "ExportConfig": "config",
    "ExtractConfig": "config",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "FeatureDataset": "cache",
    "FinetuneConfig": "config",
    "LinearHead": "heads",
    "PredictConfig": "config",
    "Prediction": "predict",
    "StorageError": "errors",
    "TrainHeadConfig": "config",
    "UserError": "errors",
    "extract_features": "extract",
    "finetune_network": "finetune",
    "train_head": "heads",
}
_RENAMED = {"extract_features": "extract", "finetune_network": "finetune"}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    module = importlib.import_module(f"featcache.{_HOMES[name]}")
    return getattr(module, _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

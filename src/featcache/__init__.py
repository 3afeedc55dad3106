"""Run a frozen backbone once, cache its features, fit heads in milliseconds.

Commands, each with a settings class (`help(featcache.ExtractConfig)` explains the fields):

    extract_features(ExtractConfig)    cache the features of a dataset's images
    merge_shards(MergeConfig)          make one cache of the shards of several machines
    train_head(TrainHeadConfig)        fit a head on a cache
    audit_cache(AuditConfig)           find wrong labels, leaks and odd images in a cache
    finetune_network(FinetuneConfig)   train the whole network on the images
    predict_images(PredictConfig)      classify files and folders
    export_classifier(ExportConfig)    write backbone and head as ONNX or torch.export
    compare_training(CompareConfig)    learning curve of cached head and fine-tuning, with advice
    write_report(ReportConfig)         one HTML page from the reports of runs

Building blocks:

    FeatureCache            a cache file: splits, class names, metadata
    FeatureDataset          a cache's split as a torch Dataset
    FeatureExtractor        a scikit-learn transformer from pictures to features
    FeatureHeadClassifier   a scikit-learn estimator for features
    LinearHead              a fitted linear head: predict, predict_proba, score
    Classifier              backbone and head together: images in, predictions out
    Prediction              what a Classifier says about one image
    Preprocessing           how an image becomes the input of a network of your own

Errors (all of them are FeatcacheError; the message says what to do next):

    FeatcacheError   base class
    UserError        wrong input
    CacheError       a UserError: not a cache, damaged, or made with different settings
    StorageError     the file system refused or failed

Public names load their module on first use, so importing the package is fast.
"""

from __future__ import annotations

import importlib

# Importing typing takes a third of the time until a command can handle Ctrl-C.
TYPE_CHECKING = False

__version__ = "0.2.0"

if TYPE_CHECKING:  # the same names, for type checkers and completion
    from featcache.api import audit_cache as audit_cache
    from featcache.api import compare_training as compare_training
    from featcache.api import export_classifier as export_classifier
    from featcache.api import extract_features as extract_features
    from featcache.api import finetune_network as finetune_network
    from featcache.api import merge_shards as merge_shards
    from featcache.api import predict_images as predict_images
    from featcache.api import train_head as train_head
    from featcache.api import write_report as write_report
    from featcache.cache import FeatureCache as FeatureCache
    from featcache.cache import FeatureDataset as FeatureDataset
    from featcache.config import AuditConfig as AuditConfig
    from featcache.config import CompareConfig as CompareConfig
    from featcache.config import ExportConfig as ExportConfig
    from featcache.config import ExtractConfig as ExtractConfig
    from featcache.config import FinetuneConfig as FinetuneConfig
    from featcache.config import MergeConfig as MergeConfig
    from featcache.config import PredictConfig as PredictConfig
    from featcache.config import Preprocessing as Preprocessing
    from featcache.config import ReportConfig as ReportConfig
    from featcache.config import TrainHeadConfig as TrainHeadConfig
    from featcache.errors import CacheError as CacheError
    from featcache.errors import FeatcacheError as FeatcacheError
    from featcache.errors import StorageError as StorageError
    from featcache.errors import UserError as UserError
    from featcache.heads import LinearHead as LinearHead
    from featcache.heads.estimator import FeatureHeadClassifier as FeatureHeadClassifier
    from featcache.predict import Classifier as Classifier
    from featcache.predict import Prediction as Prediction
    from featcache.predict.estimator import FeatureExtractor as FeatureExtractor

# Public names and their modules. No public name equals a module's: importing featcache.NAME would
# replace it.
_HOMES = {
    "AuditConfig": "config",
    "CacheError": "errors",
    "Classifier": "predict",
    "CompareConfig": "config",
    "ExportConfig": "config",
    "ExtractConfig": "config",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "FeatureDataset": "cache",
    "FeatureExtractor": "predict.estimator",
    "FeatureHeadClassifier": "heads.estimator",
    "FinetuneConfig": "config",
    "LinearHead": "heads",
    "MergeConfig": "config",
    "PredictConfig": "config",
    "Preprocessing": "config",
    "Prediction": "predict",
    "ReportConfig": "config",
    "StorageError": "errors",
    "TrainHeadConfig": "config",
    "UserError": "errors",
    "audit_cache": "api",
    "compare_training": "api",
    "export_classifier": "api",
    "extract_features": "api",
    "finetune_network": "api",
    "merge_shards": "api",
    "predict_images": "api",
    "train_head": "api",
    "write_report": "api",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'featcache' has no attribute {name!r}")
        return getattr(importlib.import_module(f"featcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

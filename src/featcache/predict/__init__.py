"""LoadedClassifier classifiers on new pictures."""

from featcache.predict.classifier import Classifier, Prediction
from featcache.predict.command import predict, summary_lines
from featcache.predict.load import LoadedClassifier, load_classifier, provenance_json

__all__ = [
    "Classifier",
    "LoadedClassifier",
    "Prediction",
    "load_classifier",
    "predict",
    "provenance_json",
    "summary_lines",
]

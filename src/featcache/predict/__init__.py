"""Trained classifiers on new pictures."""

from featcache.predict.classifier import Classifier, Prediction
from featcache.predict.load import Trained, load_trained, provenance_json
from featcache.predict.run import predict, summary_lines

__all__ = [
    "Classifier",
    "Prediction",
    "Trained",
    "load_trained",
    "predict",
    "provenance_json",
    "summary_lines",
]

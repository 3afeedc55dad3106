"""Trained classifiers on new images."""

from featcache.predict.classifier import Classifier, Prediction
from featcache.predict.command import PredictReport, predict, summary_lines
from featcache.predict.load import ClassifierOrigin, LoadedClassifier, load_classifier, origin_of

__all__ = [
    "Classifier",
    "ClassifierOrigin",
    "LoadedClassifier",
    "PredictReport",
    "Prediction",
    "load_classifier",
    "origin_of",
    "predict",
    "summary_lines",
]

"""Frozen networks: a network without its head, its weights, their identity."""

from featcache.backbone.identity import file_sha256, identify
from featcache.backbone.load import build_classifier, load_backbone
from featcache.backbone.networks import (
    build_network,
    check_name,
    classifiers,
    feature_dim_of,
    head_of,
    state_sha256,
)
from featcache.backbone.own import OwnNetwork
from featcache.backbone.weights import (
    BUNDLED_FILE,
    WeightsFile,
    own_preprocessing,
    read_state,
    read_weights,
    weights_of,
)

__all__ = [
    "BUNDLED_FILE",
    "OwnNetwork",
    "WeightsFile",
    "build_classifier",
    "build_network",
    "check_name",
    "classifiers",
    "feature_dim_of",
    "file_sha256",
    "head_of",
    "identify",
    "load_backbone",
    "own_preprocessing",
    "read_state",
    "read_weights",
    "state_sha256",
    "weights_of",
]

"""Settings shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported: OpenMP threads that spin for each other make small tests slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from data_helpers import make_pets
from featcache.cache import FeatureCache
from trained_helpers import extracted_cache, linear_head, write_head

# A shell's background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
CIFAR = REPO.parent / "shared" / "data" / "cifar10-2500"


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes: 33 train images (one more than a batch) and 12 test images."""
    return make_pets(tmp_path_factory.mktemp("pets"))


@pytest.fixture(scope="session")
def cifar() -> Path:
    """Real CIFAR-10 images in class folders: 2,000 train and 500 test."""
    if not CIFAR.is_dir():
        pytest.skip("needs the CIFAR-10 subset in ../shared/data, which this checkout lacks")
    return CIFAR


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `cache` and `head_file`."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def cache(root: Path) -> FeatureCache:
    """Features of 16 train images, by a random resnet18 at 32 px."""
    return extracted_cache(root)


@pytest.fixture(scope="module")
def head_file(root: Path, cache: FeatureCache) -> Path:
    """A linear head on the cache, with drawn weights."""
    return write_head(root / "head.safetensors", linear_head(cache))

"""Fixtures of the cache's tests. Helpers that make and damage caches are in cache_helpers.py."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test makes its cache; the folder holds nothing else."""
    return tmp_path / "x.h5"

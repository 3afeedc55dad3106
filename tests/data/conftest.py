"""Fixtures of the data tests: datasets whose cache and data folders are in tmp_path."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_helpers import Load, Message, config, make_folder
from featcache import file_hashes
from featcache.data import load_dataset
from featcache.errors import UserError


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda dataset, **settings: load_dataset(config(dataset, tmp_path, **settings))


@pytest.fixture
def message(load: Load) -> Message:
    def refused(dataset: object, **settings: object) -> str:
        with pytest.raises(UserError) as caught:
            load(dataset, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of class folders, cat and dog: 4 train and 2 test images of each."""
    return make_folder(tmp_path / "pets")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on: files written by the test are settled."""
    now = time.time
    monkeypatch.setattr(file_hashes.time, "time", lambda: now() + 10)

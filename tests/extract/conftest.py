"""Fixtures of the extraction tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from featcache.cache import CacheWriter
from featcache.config import ExtractConfig
from featcache.extract import extract

Interrupt = Callable[[ExtractConfig, int], None]


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """A function that extracts until a number of blocks is written, then presses Ctrl-C."""

    def run(config: ExtractConfig, num_blocks: int) -> None:
        write, written = CacheWriter.write_block, []

        def stop(self: CacheWriter, *block: object) -> None:
            if len(written) == num_blocks:
                raise KeyboardInterrupt
            written.append(block)
            write(self, *block)

        with monkeypatch.context() as patched:
            patched.setattr(CacheWriter, "write_block", stop)
            with pytest.raises(KeyboardInterrupt):
                extract(config)

    return run

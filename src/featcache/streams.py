"""Standard streams that are closed, full, or have no reader."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from featcache.errors import StorageError


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """Turn an OSError of standard output into a StorageError; BrokenPipeError stays as it is.

    Raises:
        StorageError: Standard output is closed or full.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write to standard output: {error.strerror}") from error


def write_stdout(text: str) -> None:
    """Write to stdout and flush it.

    Raises:
        StorageError: Standard output is closed or full.
    """
    with stdout_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def open_closed_streams() -> None:
    """Open the null device for each closed standard stream.

    Otherwise the next file we open would get the stream's descriptor. Reading stdin and writing
    stdout still fail; stderr discards everything.
    """
    modes = {"stdin": os.O_WRONLY, "stdout": os.O_RDONLY, "stderr": os.O_RDWR}
    for name, mode in modes.items():
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, mode)  # the lowest free descriptor
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "r" if name == "stdin" else "w", closefd=False))


def drop_unwritten() -> None:
    """Discard output that cannot be written, or the interpreter would fail at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""Standard streams as a command finds them: closed, full, or without a reader."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from featcache.errors import StorageError


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """Turn an OSError of standard output into a StorageError; one without a reader stays as it is.

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
    """Write to stdout, now.

    Raises:
        StorageError: Standard output is closed or full.
    """
    with stdout_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def open_closed_streams() -> None:
    """Put a file where a standard stream is closed, so that no file of ours gets its number.

    To read standard input or to write to standard output then fails; stderr takes everything.
    """
    modes = {"stdin": os.O_WRONLY, "stdout": os.O_RDONLY, "stderr": os.O_RDWR}
    for name, mode in modes.items():
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, mode)  # the lowest number that is free
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "r" if name == "stdin" else "w", closefd=False))


def drop_unwritten() -> None:
    """Keep the interpreter from writing at its end what could not be written before."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

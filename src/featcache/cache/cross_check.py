"""Whether the HDF5 library sees the same in a file, run in a child process with tight limits.

Readers never need this; `verify` uses it to make sure that other HDF5 tools find the same datasets
at the same places. The library can crash or loop forever on a damaged file, so it runs in a child
process with limited memory and time, and with its plug-ins off. This file is also the program that
the child runs, so it imports nothing of featcache.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.cache.layout import Layout

MAX_MEMORY_BYTES = 2**31
MAX_CPU_SECONDS = 30
MAX_SECONDS = 300
"""Wall seconds, for a machine that is busy with other things."""
_NO_LIBRARY = 3


class CrossCheckUnavailable(Exception):  # noqa: N818
    """The HDF5 library could not be run, which says nothing about the file."""


def cross_check_hdf5(path: Path, layout: Layout) -> str | None:
    """Ask the HDF5 library where the datasets are.

    Returns:
        None if it agrees with the layout record, else what differs.

    Raises:
        CrossCheckUnavailable: The child process did not start, took too long, or ran out of memory.
    """
    wanted = {
        name: [extent.offset, extent.dtype, list(extent.shape)]
        for name, extent in layout.extents.items()
    }
    # The plug-in switch keeps HDF5 from loading code that a file names as its filter.
    environment = {**os.environ, "HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"}
    try:
        child = subprocess.run(  # noqa: S603
            # -P: this folder's modules must not hide the standard library's.
            [sys.executable, "-P", __file__, str(path.absolute())],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=MAX_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CrossCheckUnavailable(f"no answer in {MAX_SECONDS} s") from None
    except OSError as error:
        raise CrossCheckUnavailable(f"{error.strerror or error}") from error
    lines = child.stderr.strip().splitlines() or [f"status {child.returncode}"]
    if child.returncode in (_NO_LIBRARY, -signal.SIGKILL):  # the latter when memory runs out
        raise CrossCheckUnavailable(f"{lines[-1]:.200}")
    if child.returncode == -signal.SIGXCPU:
        return f"the HDF5 library needs more than {MAX_CPU_SECONDS} s of CPU time for it"
    if child.returncode:
        return f"the HDF5 library cannot read it: {lines[-1]:.200}"
    return child.stdout.strip() or None


def differences(path: str, wanted: dict[str, list[Any]]) -> str:
    """Compare the file's HDF5 objects with `wanted`; runs in the child.

    Returns:
        The first difference, or an empty text.
    """
    import h5py

    groups = {""} | {name.rpartition("/")[0] for name in wanted}
    with h5py.File(path, "r", locking=False) as file:
        if file.userblock_size:
            return "it has a user block"
        for group in sorted(groups):
            prefix = f"{group}/" if group else ""
            here = file[group or "/"]
            names = {
                name[len(prefix) :].partition("/")[0] for name in wanted if name.startswith(prefix)
            }
            if len(here) != len(names) or set(here) != names:
                return f"other objects in /{group}"
            if any(type(here.get(name, getlink=True)) is not h5py.HardLink for name in names):
                return f"a link instead of an object in /{group}"
        for name, (offset, dtype, shape) in wanted.items():
            if difference := _difference(h5py, file[name], offset, dtype, tuple(shape)):
                return f"{name}: {difference}"
    return ""


def _difference(h5py: Any, dataset: Any, offset: int, dtype: str, shape: tuple[int, ...]) -> str:
    if not isinstance(dataset, h5py.Dataset):
        return "not a dataset"
    create = dataset.id.get_create_plist()
    plain = create.get_layout() == h5py.h5d.CONTIGUOUS and not create.get_external_count()
    if not plain or create.get_nfilters():
        return "not plain contiguous data"
    if (dataset.dtype.str, dataset.shape, dataset.id.get_offset()) != (dtype, shape, offset):
        return f"{dataset.dtype.str} {dataset.shape} at {dataset.id.get_offset()}"
    return ""


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):  # macOS lacks this limit
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_processor() -> None:
    """Limit the CPU time from now on; the parent limits the total time."""
    import resource

    seconds = math.ceil(time.process_time()) + MAX_CPU_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or seconds < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


if __name__ == "__main__":
    _limit_memory()
    try:
        import h5py  # noqa: F401
    except (ImportError, OSError, MemoryError) as error:
        sys.stderr.write(f"h5py cannot be loaded: {error}\n")
        sys.exit(_NO_LIBRARY)
    _limit_processor()
    sys.stdout.write(differences(sys.argv[1], json.load(sys.stdin)))

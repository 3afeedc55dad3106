"""Seeds, device, threads, stage timing, versions, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import StorageError

NUMERIC_LIBRARIES = ("featcache", "torch", "torchvision", "pillow")
ABANDONED_S = 24 * 3600.0
"""A temporary that nobody touched for so long was left by a killed writer."""


class StageTimer:
    """Adds up wall seconds by stage name.

    Example:
        timer = StageTimer()
        with timer("network"):
            ...
        timer.seconds["network"]
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the wall seconds of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


def num_cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def version_of(distribution: str) -> str:
    """The installed version of a package, without importing it."""
    # Imported late, with the parts of the standard library for mail that it needs: --help waits.
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def numeric_versions() -> dict[str, str]:
    """Versions, as major.minor, of the libraries that can change a feature."""
    return {name: ".".join(version_of(name).split(".")[:2]) for name in NUMERIC_LIBRARIES}


def recorded_engine(package: str) -> str:
    """What a cache records of an engine: its package, with the version unless that is torch's.

    torch is among `numeric_versions` already; an absent package has no version.
    """
    version = ".".join(version_of(package).split(".")[:2])
    return package if package == "torch" or version == "absent" else f"{package}-{version}"


def environment() -> dict[str, Any]:
    """Machine and versions, for reports."""
    libraries = (*NUMERIC_LIBRARIES, "numpy", "scikit-learn", "h5py")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "num_cores": num_cores(),
        **{name: version_of(name) for name in libraries},
    }


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Undo an engine's choice of torch's threads, which belongs to the whole process."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a short block.

    For libraries that call back into Python: an interrupt there comes out as an error of theirs.
    """
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if held:
            raise KeyboardInterrupt


def pick_device(name: str) -> str:
    """Resolve auto, cpu, cuda or mps to a device that is there.

    Raises:
        UserError: The device asked for is not available.
    """
    import torch

    from featcache.errors import UserError

    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none; use --device cpu or auto")
    return name


def import_torchvision(part: str) -> Any:
    """Import a part of torchvision (models, datasets) without torch's compiler.

    One of its detectors asks the compiler for one function when it is imported, which takes as long
    as importing torch itself; here that function finds the compiler when it is called.
    """
    compiler = "torch._dynamo"
    if compiler not in sys.modules and "torchvision" not in sys.modules:
        import torch  # noqa: F401  (the compiler is a part of it, so it has to be there first)

        late = types.ModuleType(f"{compiler}.utils")
        late.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        package = types.ModuleType(compiler)
        package.utils = late  # type: ignore[attr-defined]
        sys.modules |= {compiler: package, late.__name__: late}
        try:
            importlib.import_module("torchvision")
        finally:
            del sys.modules[compiler], sys.modules[late.__name__]
    return importlib.import_module(f"torchvision.{part}")


def load_optimizers() -> None:
    """Have torch load its compiler, as it does for the first optimizer, before a clock runs."""
    import torch

    torch.optim.SGD([torch.zeros(1)])


def _is_compile_supported(device_type: str) -> bool:
    utils = importlib.import_module("torch._dynamo.utils")
    return bool(utils.is_compile_supported(device_type))


def say(text: str) -> None:
    """One line for people, on stderr; file names that are not UTF-8 are escaped."""
    text = text.encode(errors="backslashreplace").decode()
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(
            f"cannot write {path}: {reason}; {room}choose another place with "
            "--output or --cache-dir, then run the same command again"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new.

    Raises:
        StorageError: The file system refused.
    """
    with storage_errors(path), replacing(path) as draft:
        draft.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft of `path`, which takes its place when the block ends without an error.

    The draft lies beside `path` in a new folder with a random name that only this user may enter,
    so it collides with no other process, container or thread, no link can be planted in its way,
    and whatever a library leaves beside the draft goes with the folder.

    Raises:
        OSError: The file system refused; `path` is as it was.
    """
    with _private_folder(path) as folder:
        draft = folder / path.name
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path, older_s=ABANDONED_S)
    folder = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path, num_bytes: int = 0) -> None:
    """Find out now, not after an hour's work, that `num_bytes` cannot be written to `path`.

    Raises:
        StorageError: The folder cannot be written to, or has too little room.
    """
    with storage_errors(path), _private_folder(path):
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def temporaries_of(path: Path) -> list[Path]:
    """What writers of `path` are writing now, or left when they were killed."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_temporaries(path: Path, older_s: float = 0.0) -> None:
    """Remove what killed writers of `path` left.

    Args:
        path: What they were writing.
        older_s: Leave alone what was touched in so many seconds. 0 is for callers that hold the
            lock on `path`: nobody else is writing it.
    """
    for left in temporaries_of(path):
        with contextlib.suppress(OSError):
            inside = left.iterdir() if left.is_dir() and not left.is_symlink() else ()
            touched = max(p.lstat().st_mtime for p in (left, *inside))
            if older_s and touched > time.time() - older_s:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # of version 0.1.0
                left.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())

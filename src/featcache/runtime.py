"""The machine and the process: cores, devices, threads, seeds, versions, interrupts, timers.

Also how to show something to people: `say` and `progress` while work runs, `Facts` of a result.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import platform
import signal
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache import __version__

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

NUMERIC_LIBRARIES = ("torch", "torchvision", "pillow")
FEATURES_VERSION = "0.2"
"""The version of featcache that last changed a feature. Raise it when the same image gets other
features than before: every existing cache is then refused and has to be extracted again."""
CGROUP_ROOT = Path("/sys/fs/cgroup")


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
    """Number of processors that this process may use, by its affinity and a container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(group: Path = Path("/proc/self/cgroup"), root: Path = CGROUP_ROOT) -> float:
    """The CPU quota of this process's control group (version 2) and of every group above it.

    Returns:
        In processors; infinity if there is no limit.
    """
    quota = math.inf
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = group.read_text(encoding="utf-8").splitlines()
        place = root / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):
                granted, period = (folder / "cpu.max").read_text(encoding="ascii").split()
                quota = min(quota, int(granted) / int(period))
            if folder == root:
                break
    return quota


def available_memory() -> int:
    """Bytes of memory that can be used without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # Linux
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def version_of(distribution: str) -> str:
    """The installed version of a package, without importing it."""
    # Imported late, with the parts of the standard library for mail that it needs: --help waits.
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def numeric_versions(backbone: str) -> dict[str, str]:
    """Versions, as major.minor, of what can change a feature: the libraries and our own code.

    Args:
        backbone: The network's name; one of timm's depends on timm too.
    """
    libraries = (*NUMERIC_LIBRARIES, *(["timm"] if backbone.startswith("timm/") else []))
    versions = {name: ".".join(version_of(name).split(".")[:2]) for name in libraries}
    return {"featcache": FEATURES_VERSION, **versions}


def recorded_engine(package: str) -> str:
    """How a cache records an engine: the package and its version, for example openvino-2025.3.

    torch has no version here because `numeric_versions` records it.
    """
    version = ".".join(version_of(package).split(".")[:2])
    return package if package == "torch" or version == "absent" else f"{package}-{version}"


def environment() -> dict[str, str | int]:
    """Machine and versions, for reports."""
    libraries = (*NUMERIC_LIBRARIES, "numpy", "scikit-learn", "h5py")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "num_cores": num_cores(),
        "featcache": __version__,
        **{name: version_of(name) for name in libraries},
    }


def processor_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore torch's thread count, which is global to the process, when the block ends.

    If blocks of several threads overlap, the count that the first of them found is restored.
    """
    import torch

    with _KEEPING:
        _kept.append(_kept[0] if _kept else torch.get_num_threads())
    try:
        yield
    finally:
        with _KEEPING:
            torch.set_num_threads(_kept.pop())


@functools.cache
def computing_threads(num: int, num_cores_each: int) -> ThreadPoolExecutor:
    """Threads for work in torch that is divided by hand, each with its own cores."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    usual = torch.get_num_threads()
    pool, ready = ThreadPoolExecutor(num, "computing"), threading.Barrier(num)

    def start(_: int) -> None:
        torch.get_num_threads()  # else the thread's first operation would take the default again
        torch.set_num_threads(num_cores_each)
        ready.wait()

    list(pool.map(start, range(num)))
    torch.set_num_threads(usual)  # the default of all threads to come
    return pool


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have the C library keep what is freed for the next allocation, until the block ends.

    By default glibc gives blocks of more than 32 MB back to the system at once. A training step
    then spends a tenth of its time on getting zeroed pages for the same maps again (224 px, batches
    of 32). Other C libraries are left alone.
    """
    import ctypes  # late: every start would pay for it

    try:
        library = ctypes.CDLL(None)
        options, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    m_trim_threshold, m_mmap_max = -1, -4
    options(m_mmap_max, 0)
    options(m_trim_threshold, -1)
    try:
        yield
    finally:
        options(m_mmap_max, 65536)  # the defaults
        options(m_trim_threshold, 128 * 1024)
        trim(0)


_KEEPING = threading.Lock()
_kept: list[int] = []


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the end of a short block.

    Some libraries that call back into Python turn an interrupt there into an error of their own.
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


@contextlib.contextmanager
def interrupts_first() -> Iterator[None]:
    """Raise KeyboardInterrupt where C code (an import, say) turned Ctrl-C into another error."""
    came: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pick_device(name: str) -> str:
    """Resolve auto, cpu, cuda or mps to an available device.

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


def use_local_gpu(index: int) -> None:
    """Make cuda mean one GPU of this machine, for the process of this number on it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())


def import_torchvision(part: str) -> Any:
    """Import a part of torchvision (models, datasets) without importing torch's compiler.

    One of torchvision's detectors imports a function from the compiler, which takes as long as
    importing torch itself. A stand-in here imports the compiler when that function is called.
    """
    with _IMPORTING:
        _import_without_compiler()
    return importlib.import_module(f"torchvision.{part}")


_IMPORTING = threading.Lock()


def _import_without_compiler() -> None:
    compiler = "torch._dynamo"
    if compiler not in sys.modules and "torchvision" not in sys.modules:
        import torch  # noqa: F401  (the parent package has to be imported first)

        late = types.ModuleType(f"{compiler}.utils")
        late.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        package = types.ModuleType(compiler)
        package.utils = late  # type: ignore[attr-defined]
        sys.modules |= {compiler: package, late.__name__: late}
        try:
            importlib.import_module("torchvision")
        finally:
            del sys.modules[compiler], sys.modules[late.__name__]


def load_optimizers() -> None:
    """Make torch import its compiler, as the first optimizer does, before anything is timed."""
    import torch

    torch.optim.SGD([torch.zeros(1)])


def _is_compile_supported(device_type: str) -> bool:
    utils = importlib.import_module("torch._dynamo.utils")
    return bool(utils.is_compile_supported(device_type))

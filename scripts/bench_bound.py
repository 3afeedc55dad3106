"""Part of bench_extract.py: how many float32 operations a second this machine can do at best.

No single library tells: MKL's matrix product runs at a fraction of an AMD processor's speed, and
each of the others is behind somewhere. So the bound is the best of four independent measurements:

- multiplications with additions in a loop that touches no memory, compiled here by the C compiler
  for this very processor (left out, saying so, where there is none);
- oneDNN's matrix product with packed weights, which convolutions use;
- MKL's, or whatever else torch's matrix product is built with;
- OpenBLAS's, or whatever numpy's is, in a process where OPENBLAS_CORETYPE does not choose for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.display import say
from featcache.errors import FeatcacheError

if TYPE_CHECKING:
    from bench_extract import Measure, Reading

SIDE = 2048
NOISE = 0.05
"""How far above the bound a float32 rate may be: both are the best of several rounds, and a
neighbor on the machine may have been busier in those of the bound."""
LOOP = """
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH)));
/* 16 independent sums hide an addition's latency. Returns the number of operations. */
double loop(long turns, float *result) {
    vec sum[16], factor, more;
    for (int j = 0; j < WIDTH; j++) { factor[j] = result[0]; more[j] = result[1]; }
    for (int i = 0; i < 16; i++) sum[i] = more + (float)i;
    for (long turn = 0; turn < turns; turn++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = sum[i] * factor + more;
    for (int i = 0; i < 16; i++) for (int j = 0; j < WIDTH; j++) result[0] += sum[i][j];
    return turns * 16.0 * WIDTH * 2;
}
"""
TURNS = 2_000_000
FLAGS = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC")

Call = Callable[[], float]
"""Does some work and returns how many floating-point operations it was."""


def calls(folder: Path) -> dict[str, Call]:
    """What can be measured in this process, by name, one core each."""
    found = {"matrix product, oneDNN": onednn_product(), "matrix product, torch": torch_product()}
    loop = fma_loop(folder)
    return found if loop is None else {"multiply-add loop": loop, **found}


def bounds(folder: Path) -> dict[str, Measure]:
    """Every measurement on all cores, by name."""
    from bench_extract import on_every_core

    rows: dict[str, Measure] = {
        name: lambda call=call: on_every_core(call) for name, call in calls(folder).items()
    }
    child = process_with({"OPENBLAS_CORETYPE": None, "OPENBLAS_NUM_THREADS": "1"})
    return {**rows, "matrix product, numpy": lambda: child.submit(_numpy_reading).result()}


def check_bound(rows: list[dict[str, Any]], names: Mapping[str, Any]) -> None:
    """Refuse a bound that a direct float32 network exceeds.

    Raises:
        FeatcacheError: One does, by more than noise.
    """
    for row in rows:
        share = row["share_of_bound"]
        if row["name"] not in names and row["is_direct"] and share > 1 + NOISE:
            raise FeatcacheError(
                f"{row['name']} reached {share:.2f} of the bound, more than noise ({NOISE:.0%}): "
                "the bound is wrong, or the machine was busier when it was measured; run this again"
            )


def fma_loop(folder: Path) -> Call | None:
    """The loop in C; None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        say("no C compiler (cc): the bound is the best matrix product only")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "loop.c", folder / "loop.so"
    source.write_text(LOOP)
    for native in ("-march=native", "-mcpu=native"):
        command = [compiler, *FLAGS, native, "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
            break
    else:
        say(f"{compiler} cannot compile for this processor: the bound is the best matrix product")
        return None
    loop = ctypes.CDLL(str(library.absolute())).loop
    loop.restype, loop.argtypes = ctypes.c_double, (ctypes.c_long, ctypes.POINTER(ctypes.c_float))

    def call() -> float:
        return float(loop(TURNS, (ctypes.c_float * 2)(0.5, 0.25)))

    return call


def onednn_product() -> Call:
    """A matrix product whose second factor was packed before."""
    a, b = _factors()
    import torch

    packed = torch.ops.mkldnn._reorder_linear_weight(b, SIDE)

    def call() -> float:
        torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
        return 2.0 * SIDE**3

    return call


def torch_product() -> Call:
    """A plain matrix product."""
    a, b = _factors()
    import torch

    def call() -> float:
        torch.mm(a, b)
        return 2.0 * SIDE**3

    return call


def _factors() -> Any:
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # never bfloat16, for which AMX is faster
    return torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)


def _numpy_reading() -> Reading:
    import dataclasses

    import numpy as np
    from threadpoolctl import threadpool_info

    from bench_extract import on_every_core

    a, b = np.random.default_rng(0).random((2, SIDE, SIDE), dtype=np.float32)

    def call() -> float:
        np.matmul(a, b)
        return 2.0 * SIDE**3

    libraries = [
        f"{found['internal_api']} {found['version']} {found.get('architecture', '')}".strip()
        for found in threadpool_info()
        if found["user_api"] == "blas"
    ]
    return dataclasses.replace(on_every_core(call), detail={"libraries": libraries})


def process_with(variables: Mapping[str, str | None]) -> ProcessPoolExecutor:
    """One process of its own, started with these environment variables; None removes one."""
    with _environment(variables):
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    return pool


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        _set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            _set(name, value)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value

"""Part of bench_extract.py: where the fused network's time goes, layer by layer.

Batches of the size that extraction uses go through the network in torch's fused form on one
thread, one layer after the other, in turns with what bounds them (bench_bound.py). Seconds are the
thread's processor time, so that a busy neighbor matters little; medians count.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bench_bound import calls
from featcache.display import say

if TYPE_CHECKING:
    from bench_extract import BenchConfig

PASSES = 6
"""Batches in each round."""


def compare_layers(config: BenchConfig) -> dict[str, Any]:
    """Measure the bound and every layer, in turns."""
    import torch

    torch.set_num_threads(1)
    network, pixels, prep = _fused(config)
    seconds: dict[str, list[float]] = defaultdict(list)
    work: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(config.rounds + 1):
        for name, call in calls(config.folder).items():
            start = time.thread_time()
            flops = call() + call()
            rates[name].append(flops / (time.thread_time() - start))
        for _ in range(PASSES):
            _timed_pass(network, pixels, prep, seconds, work)
        if not number:  # warming up
            seconds.clear()
            rates.clear()
        say(f"round {number} of {config.rounds}")
    bound = {name: max(found) for name, found in rates.items()}
    best = max(bound, key=lambda name: bound[name])
    rows = [
        _row(name, 1000 * statistics.median(found) / len(pixels), work.get(name), bound[best])
        for name, found in seconds.items()
    ]
    return {
        "command": "bench-layers",
        "batch_size": len(pixels),
        "bound_gflops": {name: rate / 1e9 for name, rate in bound.items()},
        "layers": rows,
        "summary": _lines(rows, bound, best),
    }


def _fused(config: BenchConfig) -> tuple[Any, Any, Any]:
    """The fused network, a batch of pixels, and their preprocessing."""
    import torch

    from featcache.backbone import load_backbone, own_preprocessing
    from featcache.engine import sample_pixels
    from featcache.engine.base import default_batch
    from featcache.engine.fusion import fuse_for_cpu

    settings = config.extract_config("digits")
    prep = settings.preprocessing(own_preprocessing(settings))
    plain = load_backbone(settings, settings.seed).to(memory_format=torch.channels_last)
    pixels = sample_pixels(prep, default_batch(prep.image_px))
    return fuse_for_cpu(plain), torch.from_numpy(pixels), prep


def _timed_pass(
    network: Any, pixels: Any, prep: Any, seconds: dict[str, list[float]], work: dict[str, Any]
) -> None:
    """One batch; adds every layer's seconds, and notes what a convolution has to compute."""
    import torch
    from torch import fx

    from featcache.data import normalize
    from featcache.engine.fusion import FusedConv

    modules = dict(network.named_modules())

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            start = time.thread_time()
            out = super().run_node(n)
            seconds[n.name].append(time.thread_time() - start)
            module = modules.get(str(n.target)) if n.op == "call_module" else None
            if isinstance(module, FusedConv):
                flops = 2.0 * module.weight[0].numel() * out[0].numel()
                shape = "x".join(map(str, module.weight.shape))
                work[n.name] = {"flops": flops, "weight": shape, "side": out.shape[-1]}
            return out

    with torch.inference_mode():
        start = time.thread_time()
        images = normalize(pixels, prep)
        seconds["normalize"].append(time.thread_time() - start)
        Timed(network).run(images)


def _row(name: str, ms: float, work: dict[str, Any] | None, bound: float) -> dict[str, Any]:
    row = {"name": name, "ms_per_image": ms}
    if work is None:
        return row
    rate = 1000 * work["flops"] / ms
    return {**row, **work, "gflops": rate / 1e9, "share_of_bound": rate / bound}


def _lines(rows: list[dict[str, Any]], bound: dict[str, float], best: str) -> list[str]:
    lines = [f"{name}: {rate / 1e9:.0f} GFLOP/s on one core" for name, rate in bound.items()]
    lines.append(f"{'':28}{'weight':>16} output px  ms/image  GFLOP/s  of the best ({best})")
    for row in rows:
        if "flops" in row:
            lines.append(
                f"{row['name']:28}{row['weight']:>16}{row['side']:>10}{row['ms_per_image']:>10.2f}"
                f"{row['gflops']:>9.0f}{row['share_of_bound']:>10.2f}"
            )
        elif row["ms_per_image"] >= 0.01:
            lines.append(f"{row['name']:54}{row['ms_per_image']:>10.2f}")
    total = sum(row["ms_per_image"] for row in rows)
    rate = 1000 * sum(row.get("flops", 0.0) for row in rows) / total
    share = rate / bound[best]
    lines.append(f"{'all':54}{total:>10.2f}{rate / 1e9:>9.0f}{share:>10.2f}")
    return lines

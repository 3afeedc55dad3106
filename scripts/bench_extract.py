"""How close extraction comes to what the machine can do.

    python scripts/bench_extract.py                     # the roofline, about six minutes
    python scripts/bench_extract.py --layers            # the network, layer by layer
    python scripts/bench_extract.py --pixels            # decoding and resizing, by format
    python scripts/bench_extract.py --engine openvino --precision int8
    python scripts/bench_extract.py --notebook FOLDER   # the course notebook's job, both ways
    python scripts/bench_extract.py --memory            # peak memory of 2,500 and 25,000 images
    python scripts/bench_extract.py --choices           # what it chooses against fixed choices
    python scripts/bench_extract.py --backbones         # other networks against a plain loop

The roofline measures, in turns so that a neighbor on the machine disturbs all alike: what bounds
a direct float32 convolution on every core (bench_bound.py); the bare network as a notebook runs it;
the bare network in each form that extraction can run; and extract-features end to end from images
in memory and from JPEG photographs that the script makes, resized by Pillow as featcache 0.1 did,
as they are now, and with --fast-decode. The best round counts for each row. "Per CPU second"
divides by processor time instead of wall time and multiplies by the cores: on a busy machine it
still says what a quiet one would do. Engines are chosen as for a long job. If a direct float32
network exceeds the bound by more than noise, the script fails; with Winograd's convolutions, which
take fewer operations than are counted, it may.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from bench_bound import bounds, check_bound, process_with
from bench_pixels import compare_pixels, resized_by_pillow
from featcache import cli
from featcache.config import ExtractConfig, OutputConfig, config_json
from featcache.display import say
from featcache.errors import UserError
from featcache.files import write_json
from featcache.runtime import environment, num_cores, version_of

NOTEBOOK_BATCH = 32
PHOTO_PX = (1024, 768)
STAGES = ("read", "decode", "resize", "network")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """Measure extraction against the machine's bound, the notebook's loop, or its memory."""

    weights: str = "bundled"
    """As in extract-features; the values of the weights do not change the speed."""
    image_px: int = 224
    """Side of the network's input."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What extracts end to end; the bare network is measured in every form there is."""
    precision: Literal["float32", "int8"] = "float32"
    """Likewise."""
    num_images: int = 400
    """Images of each end-to-end run."""
    rounds: int = 5
    """How many times everything is measured."""
    notebook: Path | None = None
    """Compare with the notebook's own loop on this folder (train/ and test/) instead."""
    memory: bool = False
    """Compare the peak memory of 2,500 and 25,000 images instead."""
    choices: bool = False
    """Compare what extraction chooses by itself with fixed engines and batch sizes instead."""
    layers: bool = False
    """Show where the fused network's time goes instead."""
    pixels: bool = False
    """Measure decoding and resizing by format instead."""
    backbones: bool = False
    """Compare networks of torchvision and timm with a plain eager loop, each at its own input size,
    instead."""
    folder: Path = Path("cache/bench-extract")
    """Where images, caches and the JSON report go."""
    docs: Path | None = None
    """Put the figures into this Markdown file, between its markers for them."""

    def extract_config(self, dataset: str, **changes: Any) -> ExtractConfig:
        """Settings of one end-to-end run."""
        options = {
            "weights": self.weights,
            "image_px": self.image_px,
            "device": "cpu",  # whose bound it is held against
            "engine": self.engine,
            "precision": self.precision,
            "cache_dir": self.folder / "cache",
            "force": True,
        }
        return ExtractConfig(dataset=dataset, **{**options, **changes})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Images (or floating-point operations) per second, by the wall and by the processor.

    `per_cpu_s` is None where the processor time cannot be separated from that of start-up.
    """

    per_s: float
    per_cpu_s: float | None
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


Measure = Callable[[], Reading]

# The network of the notebook's process.
_NOTEBOOK: list[Callable[[], Any]] = []


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run the mode that was asked for; returns its JSON report."""
    if config.notebook is not None:
        from bench_notebook import compare_with_notebook

        report = compare_with_notebook(config, config.notebook)
    elif config.memory:
        from bench_memory import compare_memory

        report = compare_memory(config)
    elif config.backbones:
        from bench_backbones import compare_backbones

        report = compare_backbones(config)
    elif config.layers:
        from bench_layers import compare_layers

        report = compare_layers(config)
    elif config.pixels:
        report = compare_pixels(config)
    elif config.choices:
        report = compare_choices(config)
    else:
        report = roofline(config)
    report |= {"settings": config_json(config), "environment": environment()}
    write_json(config.folder / f"{report['command']}.json", report)
    if "flops_per_image" in report:
        check_bound(report["rows"], report["bounds_gflops"])
    if config.docs is not None:
        fill(config.docs, _block_name(config, report), as_text(summary_lines(report), report))
    return report


def _block_name(config: BenchConfig, report: dict[str, Any]) -> str:
    """Which pair of markers a run's figures go between."""
    if "flops_per_image" not in report:
        return str(report["command"])
    return "-".join([report["command"], config.engine, config.precision])


def fill(path: Path, name: str, block: list[str]) -> None:
    """Replace what stands between a file's markers `<!-- NAME -->` and `<!-- end NAME -->`."""
    text, (begin, end) = path.read_text(), (f"<!-- {name} -->", f"<!-- end {name} -->")
    if begin not in text or end not in text:
        raise UserError(f"--docs {path} has no markers {begin} and {end}: add them")
    head, rest = text.split(begin, 1)
    path.write_text("\n".join([head + begin, *block, end]) + rest.split(end, 1)[1])


def as_text(lines: list[str], report: dict[str, Any]) -> list[str]:
    """Figures for a page, with the machine and the versions that gave them."""
    machine = f"{report['environment']['processor']}, {report['environment']['num_cores']} cores"
    versions = ", ".join(f"{n} {version_of(n)}" for n in ("torch", "openvino", "nncf"))
    return ["```text", *lines, "", f"{machine}; {versions}", "```"]


def roofline(config: BenchConfig) -> dict[str, Any]:
    """Measure every row in turns."""
    photographs = make_photographs(config.folder / "photographs", config.num_images)
    bound_rows = bounds(config.folder)
    flops, network_rows = measures(config, photographs)
    rows = {**bound_rows, **network_rows}
    readings: dict[str, list[Reading]] = {name: [] for name in rows}
    for name, measure in rows.items():
        say(f"warming up: {name}")
        measure()
    for number in range(config.rounds):
        for name, measure in rows.items():
            readings[name].append(measure())
            say(f"round {number + 1}: {name}: {readings[name][-1].per_s:.1f}/s")
    rates = {name: max(r.per_s for r in readings[name]) for name in bound_rows}
    best = max(rates, key=lambda name: rates[name])
    bound = rates[best]
    bound_cpu = max(r.per_cpu_s or 0.0 for name in bound_rows for r in readings[name])
    table = [
        _row(name, found, (bound, bound_cpu), None if name in bound_rows else flops)
        for name, found in readings.items()
    ]
    for row in table:
        row["is_direct"] = _is_direct(row, config)
    return {
        "command": "bench-extract",
        "flops_per_image": flops,
        "bound": best,
        "bound_gflops": bound / 1e9,
        "bounds_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "bound_images_per_s": bound / flops,
        "rows": table,
    }


def _is_direct(row: dict[str, Any], config: BenchConfig) -> bool:
    """Whether a row computes in float32 all operations that are counted: the bound holds then."""
    int8 = "int8" in row["name"] or (config.precision == "int8" and "extract" in row["name"])
    return not int8 and row.get("engine", {}).get("name") != "winograd"


def compare_choices(config: BenchConfig) -> dict[str, Any]:
    """Extract the same images with automatic and with fixed choices, in turns.

    Start-up counts: converting a network or measuring engines has to pay for itself.
    """
    from featcache.engine.openvino_cpu import is_installed
    from featcache.extract import extract

    fixed: list[dict[str, Any]] = [
        {"engine": engine, "batch_size": batch}
        for engine in ("torch", "openvino")
        if engine == "torch" or is_installed("openvino")
        for batch in (8, 16)
    ]
    part = {"num_train": min(4 * config.num_images, 1400), "num_test": min(config.num_images, 350)}
    runs = {"automatic": config.extract_config("digits", **part)}
    for options in fixed:
        name = f"{options['engine']} batch {options['batch_size']}"
        runs[name] = config.extract_config("digits", **part, **options)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(config.rounds):
        for name, settings in runs.items():
            start = time.perf_counter()
            images = sum(split["num_samples"] for split in extract(settings)["splits"].values())
            rates[name].append(images / (time.perf_counter() - start))
            say(f"round {number + 1}: {name}: {rates[name][-1]:.1f} images/s")
    best = {name: max(found) for name, found in rates.items()}
    fastest = max((name for name in best if name != "automatic"), key=lambda name: best[name])
    share = best["automatic"] / best[fastest]
    return {
        "command": "bench-choices",
        "images_per_s": rates,
        "share_of_best_fixed": share,
        "summary": [
            *(f"{name:20}{rate:8.1f} images/s" for name, rate in best.items()),
            f"automatic choice: {share:.2f} of the best fixed choice ({fastest})",
        ],
    }


def _row(
    name: str, found: list[Reading], bounds: tuple[float, float], flops: float | None
) -> dict[str, Any]:
    """A row of the table; no operations per image where operations themselves were counted."""
    best = max(found, key=lambda reading: reading.per_s)
    best_cpu = max((r.per_cpu_s for r in found if r.per_cpu_s is not None), default=None)
    images, flops = flops is not None, flops or 1.0
    return {
        "name": name,
        "images_per_s": best.per_s if images else None,
        "images_per_s_rounds": [reading.per_s for reading in found] if images else None,
        "gflops": best.per_s * flops / 1e9,
        "share_of_bound": best.per_s * flops / bounds[0],
        "images_per_cpu_s": best_cpu if images else None,
        "share_of_bound_per_cpu_s": None if best_cpu is None else best_cpu * flops / bounds[1],
        **best.detail,
    }


def measures(config: BenchConfig, photographs: Path) -> tuple[float, dict[str, Measure]]:
    """The floating-point operations of one image, and what is measured, by name."""
    from featcache.backbone import load_backbone
    from featcache.data import load_dataset

    settings = config.extract_config(str(photographs))
    backbone = load_backbone(settings, settings.seed)
    flops = flops_of(backbone, config.image_px)
    rows: dict[str, Measure] = {"bare network, notebook": notebook_network(settings)}
    train = load_dataset(settings).splits["train"]
    rows |= engine_forms(config, train)
    digits = min(config.num_images, 1400)
    memory = config.extract_config("digits", num_train=digits, num_test=10)
    rows["extract-features, memory"] = end_to_end(memory)
    rows["extract-features, JPEG, Pillow"] = _with_pillow(end_to_end(settings))
    rows["extract-features, JPEG"] = end_to_end(settings)
    fast = dataclasses.replace(settings, fast_decode=True)
    rows["extract-features, JPEG, fast"] = end_to_end(fast)
    return flops, rows


def _with_pillow(measure: Measure) -> Measure:
    def measured() -> Reading:
        with resized_by_pillow():
            return measure()

    return measured


def flops_of(backbone: Any, image_px: int) -> float:
    """Multiplications and additions of one image's convolutions and matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, image_px, image_px))
    return float(counter.get_total_flops())


def timed(work: Callable[[], float]) -> Reading:
    """Time work that returns how much it did."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Reading(per_s=done / wall, per_cpu_s=done / cpu * num_cores())


def on_every_core(call: Callable[[], float], seconds: float = 1.0) -> Reading:
    """Call from one thread per core for a second; what the calls return is added up."""

    def work() -> float:
        done, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            done += call()
        return done

    def everywhere() -> float:
        with ThreadPoolExecutor(num_cores()) as pool:
            return sum(pool.map(lambda _: work(), range(num_cores())))

    return timed(everywhere)


def notebook_network(settings: ExtractConfig) -> Measure:
    """The network as a notebook runs it: as it was built, batch 32, every core on one batch.

    In a process of its own, since featcache's commands let OpenMP's waiting threads sleep and a
    notebook does not.
    """
    notebook = process_with({"OMP_WAIT_POLICY": None})
    notebook.submit(_open_notebook, settings).result()
    return lambda: notebook.submit(_run_notebook).result()


def _open_notebook(settings: ExtractConfig) -> None:
    import torch

    from featcache.backbone import load_backbone

    assert settings.image_px is not None
    network = load_backbone(settings, settings.seed)
    images = torch.rand(NOTEBOOK_BATCH, 3, settings.image_px, settings.image_px)
    _NOTEBOOK.append(lambda: network(images))


def _run_notebook() -> Reading:
    import torch

    def batches() -> float:
        done, end = 0.0, time.perf_counter() + 1.0
        with torch.no_grad():
            while time.perf_counter() < end:
                _NOTEBOOK[0]()
                done += NOTEBOOK_BATCH
        return done

    return timed(batches)


def engine_forms(config: BenchConfig, train: Any) -> dict[str, Measure]:
    """The bare network in each form that extraction can run here."""
    from featcache.engine.openvino_cpu import is_installed

    forms = {"bare network, torch": ("torch", "float32")}
    if is_installed("openvino"):
        forms["bare network, openvino"] = ("openvino", "float32")
    if is_installed("openvino", "nncf"):
        forms["bare network, int8"] = ("openvino", "int8")
    rows = {name: bare(config, train, *form) for name, form in forms.items()}
    with as_a_long_job():
        rows["bare network, chosen"] = bare(config, train, config.engine, "float32")
    return rows


@contextlib.contextmanager
def as_a_long_job() -> Iterator[None]:
    """Choose by measurement, as for a job of many minutes, however few images there are."""
    with mock.patch("featcache.engine.autotune.expected_seconds", return_value=1000.0):
        yield


def bare(config: BenchConfig, train: Any, engine: Any, precision: Any, **network: Any) -> Measure:
    """A form of the network alone, from pixels in memory, called as extraction calls it.

    Args:
        config: The script's settings.
        train: Images that int8 calibrates on.
        engine: As in extract-features.
        precision: Likewise.
        network: Settings of another network than the script's.
    """
    from featcache.backbone import load_backbone, own_preprocessing
    from featcache.engine import EngineSettings, choose_engine, sample_pixels

    settings = config.extract_config("digits", engine=engine, precision=precision, **network)
    prep = settings.preprocessing(own_preprocessing(settings))
    backbone = load_backbone(settings, settings.seed)
    chosen = choose_engine(
        EngineSettings.of(settings), backbone, prep, num_images=config.num_images, train=train
    )
    pixels = sample_pixels(prep, chosen.batch_size)
    detail = {"engine": chosen.describe()}

    def call() -> float:
        chosen.run(pixels)
        return float(len(pixels))

    return lambda: dataclasses.replace(on_every_core(call), detail=detail)


def end_to_end(settings: ExtractConfig) -> Measure:
    """extract-features as a whole; the rate excludes start-up, which is reported separately."""
    from featcache.extract import extract

    def measure() -> Reading:
        with as_a_long_job():
            report = extract(settings)
        seconds = sum(split["seconds"] for split in report["splits"].values())
        images = sum(split["num_samples"] for split in report["splits"].values())
        return Reading(
            per_s=images / seconds,
            per_cpu_s=None,
            detail=_time_shares(report, seconds, images),
        )

    return measure


def _time_shares(report: dict[str, Any], seconds: float, images: int) -> dict[str, Any]:
    """Shares of the threads' time by stage, and of the main thread's by write and waiting."""
    stages, threads = report["stage_seconds"], report["engine"]["threads"]
    shares = {name: stages.get(name, 0.0) / (threads * seconds) for name in STAGES}
    return {
        "engine": report["engine"],
        "num_images": images,
        "thread_shares": {**shares, "idle": 1 - sum(shares.values())},
        "main_thread_shares": {n: stages.get(n, 0.0) / seconds for n in ("write", "wait")},
        "milliseconds_per_image": {n: 1000 * stages.get(n, 0.0) / images for n in STAGES},
        "start_up_s": stages.get("start_up", 0.0),
        "finish_s": stages.get("finish", 0.0),
    }


def make_photographs(root: Path, num: int) -> Path:
    """Write `num` JPEG files of photographic size and detail, unless they are there already."""
    for split, count in (("train", num), ("test", 2)):
        for i in range(count):
            path = root / split / f"class{i % 2}" / f"{i:04d}.jpg"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph(i if split == "train" else -i - 1).save(path, "JPEG", quality=88)
    return root


def photograph(seed: int) -> Any:
    """An image with detail at every scale, so that its file is as large as a photograph's."""
    from PIL import Image

    rng = np.random.default_rng(abs(seed) * 2 + (seed < 0))
    width, height = PHOTO_PX
    total = np.zeros((height, width, 3), np.float32)
    for step, strength in ((256, 1.5), (64, 1.0), (16, 0.6), (4, 0.4), (1, 0.12)):
        field = rng.normal(128, 40, (height // step, width // step, 3))
        coarse = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
        fine = coarse.resize(PHOTO_PX, Image.Resampling.BICUBIC)
        total += (np.asarray(fine, np.float32) - 128) * strength
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    if report["command"] != "bench-extract":
        return list(report["summary"])
    lines = [f"{'':30}images/s  GFLOP/s  of bound  images per CPU second × cores"]
    for row in report["rows"]:
        bare_rate = "" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        cpu_rate = "" if row["images_per_cpu_s"] is None else f"{row['images_per_cpu_s']:.1f}"
        cpu_share = row["share_of_bound_per_cpu_s"]
        line = f"{row['name']:30}{bare_rate:>8}{row['gflops']:>9.0f}{row['share_of_bound']:>10.2f}"
        lines.append(line + ("" if cpu_share is None else f"{cpu_rate:>10} ({cpu_share:.2f})"))
    for row in report["rows"]:
        if "thread_shares" in row:
            shares = {**row["thread_shares"], **row["main_thread_shares"]}
            text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            lines.append(f"{row['name']}: {text}; start-up after imports {row['start_up_s']:.1f} s")
    return [*lines, f"bound: {report['bound']}"]


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("bench-extract", BenchConfig, bench, argv, summary_lines)


if __name__ == "__main__":
    sys.exit(main())

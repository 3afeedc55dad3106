"""Part of bench_extract.py: what an image's decoding and resizing cost, by format.

On one thread, in seconds of the processor, in turns: with Pillow's resizing, with torch's, and with
--fast-decode. Also by how much the pixels differ from Pillow's, and the features of the float32
network from those of Pillow's pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from bench_extract import BenchConfig

NUM_IMAGES = 12
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {"quality": 88}),
    "JPEG 4:4:4": ("JPEG", {"quality": 88, "subsampling": 0}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {"quality": 88}),
}
PILLOW, TORCH, FAST = "Pillow resizes", "torch resizes", "--fast-decode"


@contextlib.contextmanager
def resized_by_pillow() -> Iterator[None]:
    """Pixels as featcache 0.1 made them: Pillow resizes whatever the processor."""
    with mock.patch("featcache.data.pixels._torch_is_fast", return_value=False):
        yield


def compare_pixels(config: BenchConfig) -> dict[str, Any]:
    """Measure every format in every way, in turns."""
    import torch

    from bench_extract import photograph
    from featcache.backbone import load_backbone, own_preprocessing
    from featcache.engine.torch_cpu import torch_forward

    torch.set_num_threads(1)
    settings = config.extract_config("digits")
    prep = settings.preprocessing(own_preprocessing(settings))
    network = torch_forward(load_backbone(settings, settings.seed), prep)
    photographs = [photograph(i) for i in range(NUM_IMAGES)]
    table = []
    for name, (kind, options) in FORMATS.items():
        files = [_encoded(image, kind, options) for image in photographs]
        seconds: dict[str, list[tuple[float, float]]] = {PILLOW: [], TORCH: [], FAST: []}
        pixels: dict[str, Any] = {}
        for _ in range(config.rounds):
            for way, found in seconds.items():
                pixels[way], *spent = _decoded(files, prep, way)
                found.append((spent[0], spent[1]))
        features = {way: network(made) for way, made in pixels.items()}
        for way, found in seconds.items():
            if way != FAST or kind == "JPEG":
                table.append(_row(name, way, found, pixels, features))
    return {"command": "bench-pixels", "rows": table, "summary": _lines(table)}


def _encoded(image: Any, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _decoded(files: list[bytes], prep: Any, way: str) -> tuple[Any, float, float]:
    """Pixels of all files, and seconds of decoding and resizing."""
    from featcache.config import Views
    from featcache.data.images import decoded
    from featcache.data.pixels import least_px, to_pixels

    prep = dataclasses.replace(prep, fast_decode=way == FAST)
    made, decode_s, resize_s = [], 0.0, 0.0
    with resized_by_pillow() if way == PILLOW else contextlib.nullcontext():
        for data in files:
            start = time.thread_time()
            with decoded(data, least_px(prep, Views())) as image:
                middle = time.thread_time()
                made.append(to_pixels(image, prep))
            decode_s, resize_s = decode_s + middle - start, resize_s + time.thread_time() - middle
    return np.stack(made), decode_s, resize_s


def _row(
    name: str,
    way: str,
    seconds: list[tuple[float, float]],
    pixels: dict[str, Any],
    features: dict[str, Any],
) -> dict[str, Any]:
    from featcache.engine.int8 import cosine_stats

    off = np.abs(pixels[way].astype(int) - pixels[PILLOW])
    apart = np.linalg.norm(features[way] - features[PILLOW], axis=1)
    length = np.linalg.norm(features[PILLOW], axis=1)
    decode, resize = (1000 * statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "format": name,
        "way": way,
        "decode_ms": decode / NUM_IMAGES,
        "resize_ms": resize / NUM_IMAGES,
        "largest_pixel_difference": int(off.max()),
        "share_of_pixels_that_differ": float((off > 0).mean()),
        "relative_feature_difference": float((apart / length).max()),
        "cosine": cosine_stats(features[way], features[PILLOW]),
    }


def _lines(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'ms of one core per image':29}decode  resize   sum  pixels that differ  "
        "features (length of difference, cosine)"
    ]
    for row in table:
        total = row["decode_ms"] + row["resize_ms"]
        differ = f"{row['share_of_pixels_that_differ']:.2%} by {row['largest_pixel_difference']}"
        lines.append(
            f"{row['format']:12}{row['way']:16}{row['decode_ms']:>7.2f}{row['resize_ms']:>8.2f}"
            f"{total:>6.2f}{differ:>20}   {row['relative_feature_difference']:.1e}, "
            f"{row['cosine']['worst']:.5f}"
        )
    return lines

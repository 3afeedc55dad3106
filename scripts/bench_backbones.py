"""Images per second of many backbones, as featcache runs them against a plain eager loop.

    python scripts/bench_extract.py --backbones --rounds 3

For each network, random weights at its own input size: batches of 32 through the network as its
library builds it, on every core, as a notebook would; and the form that extraction chooses, called
as extraction calls it. Both start from uint8 pixels in memory and normalize them. The two are
measured in turns and the best round of each counts.
"""

from __future__ import annotations

from typing import Any

from bench_extract import NOTEBOOK_BATCH, BenchConfig, Measure, bare, timed
from featcache.display import say
from featcache.errors import UserError
from featcache.runtime import num_cores

NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"),
    *("vit_b_16", "swin_t", "timm/resnet18", "timm/vit_tiny_patch16_224"),
    *("timm/vit_small_patch14_dinov2", "timm/convnextv2_atto", "timm/mobilenetv4_conv_small"),
)
DINO_PX = 224
"""DINOv2's own 518 px would take most of the time; people feed it 224 px too."""


def compare_backbones(config: BenchConfig) -> dict[str, Any]:
    """Measure every network both ways, in turns; those of timm are skipped where it is absent."""
    table = []
    for name in NETWORKS:
        try:
            table.append(_compared(config, name))
        except UserError as error:
            say(f"skipped {name}: {error}")
            continue
        row = table[-1]
        say(f"{name}: {row['images_per_s']:.1f} images/s, plain {row['plain_images_per_s']:.1f}")
    lines = [f"{'':32}  px  plain loop  featcache  ratio  engine"]
    lines += [
        f"{row['backbone']:32}{row['image_px']:>4}{row['plain_images_per_s']:>12.1f}"
        f"{row['images_per_s']:>11.1f}{row['ratio']:>7.2f}  {row['engine']}"
        for row in table
    ]
    return {"command": "bench-backbones", "networks": table, "summary": lines}


def _compared(config: BenchConfig, name: str) -> dict[str, Any]:
    """One network, both ways."""
    image_px = DINO_PX if "dinov2" in name else None
    network = {"backbone": name, "weights": "random", "image_px": image_px}
    ours = bare(config, None, config.engine, "float32", **network)
    plain, side = _plain_loop(config, network)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    engine = ""
    for _ in range(config.rounds):
        rates["plain"].append(plain().per_s)
        reading = ours()
        rates["ours"].append(reading.per_s)
        engine = reading.detail["engine"]["name"]
    best = {way: max(found) for way, found in rates.items()}
    return {
        "backbone": name,
        "image_px": side,
        "images_per_s": best["ours"],
        "plain_images_per_s": best["plain"],
        "ratio": best["ours"] / best["plain"],
        "rounds": rates,
        "engine": engine,
    }


def _plain_loop(config: BenchConfig, network: dict[str, Any]) -> tuple[Measure, int]:
    """Eager batches of 32 on every core, and the side of the network's input."""
    import torch

    from featcache.backbone import load_backbone, own_preprocessing
    from featcache.data import normalize
    from featcache.engine import sample_pixels

    settings = config.extract_config("digits", **network)
    prep = settings.preprocessing(own_preprocessing(settings))
    eager = load_backbone(settings, settings.seed)
    pixels = torch.from_numpy(sample_pixels(prep, NOTEBOOK_BATCH))

    def batch() -> float:
        with torch.inference_mode():
            eager(normalize(pixels, prep).contiguous())
        return float(NOTEBOOK_BATCH)

    def measure() -> Any:
        torch.set_num_threads(num_cores())
        try:
            return timed(batch)
        finally:
            torch.set_num_threads(1)

    batch()
    return measure, prep.image_px

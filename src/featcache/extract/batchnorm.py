"""BatchNorm statistics of the user's own images: `extract-features --batchnorm adapt`.

Pretrained statistics describe the images of the pretraining. Estimating them again on train images,
without labels, makes another network (arXiv:2006.16971): its weights go into a file of their own,
with a hash of its own, and from then on it is frozen like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.backbone import identify, load_backbone
from featcache.config import BackboneInfo, ExtractConfig
from featcache.data import ImageDataset, ImageSplit, iterate_batches, normalize
from featcache.data.sampling import stratified_rows
from featcache.display import say
from featcache.errors import UserError
from featcache.runtime import num_cores, numeric_versions, torch_threads_kept
from featcache.tensor_files import read_metadata, write_safetensors

if TYPE_CHECKING:
    from torch import nn

MAX_IMAGES = 2048
"""Train images that the statistics are estimated on; more change them little."""
BATCH_SIZE = 64


def with_adapted_batchnorm(config: ExtractConfig, dataset: ImageDataset) -> ExtractConfig:
    """The settings with the weights file that `--batchnorm adapt` means, written if need be.

    Args:
        config: The command's settings.
        dataset: Its train split gives the sample; other splits are not read.

    Raises:
        UserError: The network has no BatchNorm layers, or there are too few train images.
        StorageError: The weights cannot be written.
    """
    if config.batchnorm == "frozen":
        return config
    # The file is of the network itself.
    plain = dataclasses.replace(config, layers="last", from_stage=None)
    info = identify(plain, config.seed, config.cache_dir)
    train = dataset.splits["train"]
    num_images = min(len(train), MAX_IMAGES)
    decides = {
        "backbone": info.to_dict(),
        "dataset": dataset.fingerprint,
        "num_images": num_images,
        "seed": config.seed,
        "versions": numeric_versions(config.backbone),
    }
    record = json.dumps(decides, sort_keys=True)
    key = hashlib.sha256(record.encode()).hexdigest()
    stem = Path(info.weights).stem
    # Beside the cache, where its heads are written and look for it.
    folder = config.cache_dir if config.output is None else config.output.parent
    path = folder / f"{stem}-batchnorm-{key[:8]}.safetensors"
    if not (path.is_file() and read_metadata(path).get("batchnorm") == record):
        say(f"estimating BatchNorm statistics on {num_images} train images")
        network = load_backbone(plain, config.seed, info)
        rows = stratified_rows(
            train.ids, train.labels, num_images, seed=config.seed, purpose="batchnorm"
        )
        with torch_threads_kept():
            estimate_statistics(network, train, rows, config, info)
        prep = json.dumps(info.preprocessing.to_dict())
        state = network.state_dict()
        write_safetensors(path, state, {"preprocessing": prep, "batchnorm": record})
    return dataclasses.replace(config, weights=str(path))


def estimate_statistics(
    network: nn.Module,
    train: ImageSplit,
    rows: np.ndarray,
    config: ExtractConfig,
    info: BackboneInfo,
) -> None:
    """Replace every BatchNorm's mean and variance by their averages over batches of images.

    Raises:
        UserError: There is no such layer, or fewer than two images.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        raise UserError(f"{info.backbone} has no BatchNorm layers: leave --batchnorm adapt out")
    if len(rows) < 2:
        raise UserError("--batchnorm adapt needs at least 2 train images")
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over batches
        layer.train()
    workers = num_cores() if config.workers is None else config.workers
    # Batches mix the classes, and none is a lone image.
    order = np.random.default_rng([config.seed, 0xBA7C]).permutation(rows)
    batch_size = min(BATCH_SIZE, max(2, len(order) // 2))
    order = order[: len(order) - len(order) % batch_size]
    skip = None if config.on_error == "fail" else (lambda row, bad: None)
    with torch.no_grad():
        for pixels, _, _ in iterate_batches(
            train, order, batch_size, info.preprocessing, workers=workers, on_bad=skip
        ):
            if len(pixels) > 1:
                network(normalize(torch.from_numpy(pixels), info.preprocessing))
    network.eval()

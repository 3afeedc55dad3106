"""Frozen networks: a torchvision classifier without its head, its weights, and their identity."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from featcache.config import BackboneConfig, BackboneInfo, Preprocessing
from featcache.errors import UserError, one_of
from featcache.memo import Memo, is_settled, stamp_of
from featcache.recipe import init_linear
from featcache.runtime import version_of

if TYPE_CHECKING:
    import torch
    from torch import nn

BUNDLED_BACKBONE = "resnet18"
BUNDLED_FILE = Path(__file__).parent / "weights" / "resnet18_tinyimagenet64.safetensors"
NAMED_WEIGHTS = ("imagenet", "bundled", "random")
WAYS_OUT = (
    "use --weights bundled (ResNet18, 64 px, offline) or --weights FILE (.safetensors or .pth)"
)
# Wrappers that training scripts put around a state dict, outermost first.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "backbone")
KEY_PREFIXES = ("module.", "model.", "net.", "backbone.", "encoder.", "_orig_mod.")
# A small archive may unpack to anything; a checkpoint is stored, not compressed.
MAX_UNPACK_RATIO = 4

State = dict[str, "torch.Tensor"]


def classifiers() -> list[str]:
    """Names of torchvision's classification networks."""
    from torchvision import models

    return [name for name in models.list_models(module=models) if not name.startswith("quantized")]


def build_network(name: str) -> nn.Module:
    """Build a torchvision classification network with its ImageNet head, weights not loaded.

    Raises:
        UserError: torchvision has no such network.
    """
    from torchvision import models

    if name not in classifiers():
        raise UserError(one_of(name, classifiers(), "backbone"))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads only serve training from scratch; the input transform belongs to
        # the published weights, which expect 0.5/0.5 normalisation inside ImageNet's.
        options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    network: nn.Module = models.get_model(name, weights=None, **options)
    return network


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the classification head: the last linear layer, or SqueezeNet's last convolution.

    Returns:
        Its dotted name in `model`, and the layer itself.
    """
    from torch import nn

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    linear = [(n, m) for n, m in layers if isinstance(m, nn.Linear)]
    assert layers, "a classification network has a linear layer or a convolution"
    return linear[-1] if linear else layers[-1]


def feature_dim_of(head: nn.Module) -> int:
    """Width of the features that enter `head`."""
    from torch import nn

    return head.in_features if isinstance(head, nn.Linear) else cast(nn.Conv2d, head).in_channels


def load_backbone(config: BackboneConfig, seed: int) -> nn.Module:
    """Load the frozen network without its head, on the CPU, in eval mode.

    Args:
        config: Which backbone and weights.
        seed: Draws `random` weights.

    Returns:
        A module mapping float32 images [N, 3, H, W] to features [N, D]; no parameter needs
        a gradient.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    model = _loaded_network(config, seed)
    from torch import nn

    model.set_submodule(head_of(model)[0], nn.Identity())
    return model.requires_grad_(False).eval()


def build_classifier(config: BackboneConfig, num_classes: int, seed: int) -> nn.Module:
    """Load the whole network with a fresh head for `num_classes`, every parameter trainable.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    import torch
    from torch import nn

    model = _loaded_network(config, seed)
    name, old = head_of(model)
    dim = feature_dim_of(old)
    weight, bias = (torch.from_numpy(array) for array in init_linear(dim, num_classes, seed))
    head: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Linear):
        head = nn.Linear(dim, num_classes)
    else:
        head, weight = nn.Conv2d(dim, num_classes, 1), weight[:, :, None, None]
    head.load_state_dict({"weight": weight, "bias": bias})
    model.set_submodule(name, head)
    return model


def state_sha256(module: nn.Module) -> str:
    """sha256 over every parameter and buffer, names included: the proof that nothing moved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def identify(config: BackboneConfig, seed: int, cache_dir: Path) -> BackboneInfo:
    """Say which network and weights a command means, without torch where that is already known.

    Answers are remembered in `cache_dir` under the weights file's size, times and inode.

    Raises:
        UserError: Unknown backbone, or weights that cannot be had or do not fit.
    """
    is_file = config.weights not in NAMED_WEIGHTS
    spec = str(_weights_file(config).absolute()) if is_file else config.weights
    # Random weights depend on the seed and on how this torch draws.
    drawn = f"{seed}:{version_of('torch')}:{version_of('torchvision')}"
    key = f"backbone:{config.backbone}:{spec}:{drawn if spec == 'random' else ''}"
    known = _remembered(memo := Memo(cache_dir), key)
    if known is None:
        path, known = _identity(config, seed)
        status = os.stat(path) if path else None
        if status is None or is_settled(status, time.time()):
            memo.put(f"{key}:path", (), path)
            memo.put(key, stamp_of(status) if status else (), known)
            memo.save()
    own = Preprocessing.from_dict(known["preprocessing"])
    return BackboneInfo(
        backbone=config.backbone,
        weights=Path(spec).name if is_file else spec,
        weights_sha256=known["weights_sha256"],
        feature_dim=known["feature_dim"],
        preprocessing=config.preprocessing(own),
    )


def _identity(config: BackboneConfig, seed: int) -> tuple[str, dict[str, Any]]:
    """Compute what `identify` remembers: the weights file ("" for random) and its facts."""
    import dataclasses

    model = _loaded_network(config, seed)
    file = weights_file(config)
    return str(file or ""), {
        "weights_sha256": file_sha256(file) if file else state_sha256(model),
        "feature_dim": feature_dim_of(head_of(model)[1]),
        "preprocessing": dataclasses.asdict(own_preprocessing(config)),
    }


def _remembered(memo: Memo, key: str) -> dict[str, Any] | None:
    """What `identify` found earlier, if the weights file is still the same."""
    path = memo.get(f"{key}:path", ())
    if not isinstance(path, str):
        return None
    try:
        known = memo.get(key, stamp_of(os.stat(path)) if path else ())
    except OSError:
        return None
    return known if isinstance(known, dict) else None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(config: BackboneConfig) -> Path | None:
    """The file that holds the weights, once they are loaded; None for random weights."""
    if config.weights == "random":
        return None
    if config.weights == "imagenet":
        import torch

        url = _imagenet_weights(config.backbone).url
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    return _weights_file(config)


def _weights_file(config: BackboneConfig) -> Path:
    """The file of bundled weights or of weights given by path.

    Raises:
        UserError: There is no such file, or it belongs to another backbone.
    """
    if config.weights == "bundled":
        if config.backbone != BUNDLED_BACKBONE:
            raise UserError(
                f"--weights bundled is a {BUNDLED_BACKBONE}, not a {config.backbone}: "
                f"use --backbone {BUNDLED_BACKBONE}, or --weights imagenet, random or FILE"
            )
        return BUNDLED_FILE
    path = Path(config.weights)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"--weights {config.weights!r}: give imagenet, bundled, random, "
            "or a file that ends in .safetensors or .pth" + _near_weights(config.weights)
        )
    if not path.is_file():
        raise UserError(f"--weights {config.weights!r}: there is no such file; check the path")
    return path


def _near_weights(given: str) -> str:
    import difflib

    near = difflib.get_close_matches(given, NAMED_WEIGHTS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _imagenet_weights(backbone: str) -> Any:
    """Default ImageNet weights of a classification network."""
    from torchvision import models

    if backbone not in classifiers():
        raise UserError(one_of(backbone, classifiers(), "backbone"))
    return models.get_model_weights(backbone).DEFAULT


def own_preprocessing(config: BackboneConfig) -> Preprocessing:
    """The preprocessing that the weights were made for.

    A safetensors file may carry it as JSON in its metadata; otherwise it is that of torchvision's
    ImageNet weights of the same network.
    """
    if config.weights not in ("imagenet", "random"):
        path = _weights_file(config)
        if path.suffix == ".safetensors":
            stored = safetensors_metadata(path).get("preprocessing")
            if stored is not None:
                return _stored_preprocessing(path, stored)
    preset = _imagenet_weights(config.backbone).transforms()
    return Preprocessing(
        image_px=preset.crop_size[0],
        resize="crop",
        resize_px=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _stored_preprocessing(path: Path, stored: str) -> Preprocessing:
    try:
        values = json.loads(stored)
        values.setdefault("resize_px", values["image_px"])
        return Preprocessing.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata holds no usable preprocessing: {error}") from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file.

    Raises:
        UserError: Not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}; give another file") from error


def _loaded_network(config: BackboneConfig, seed: int) -> nn.Module:
    """A network with its original head, weights loaded wherever they exist but for the head."""
    import torch

    if config.weights not in ("imagenet", "random"):
        _weights_file(config)  # complain of a missing file before building anything
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(config.backbone)
    if config.weights == "random":
        return model
    if config.weights == "imagenet":
        state, source = _download(config.backbone), "torchvision's weights"
    else:
        path = _weights_file(config)
        state, source = read_state(path), str(path)
    _load_matching(model, state, source, config.backbone)
    return model


def _download(backbone: str) -> State:
    """Fetch torchvision's weights, hash-checked, or take them from torch.hub's folder."""
    from http.client import HTTPException

    weights = _imagenet_weights(backbone)
    try:
        state: State = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, ValueError, EOFError) as error:
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise UserError(
            f"the ImageNet weights of {backbone} could not be downloaded ({reason}); {WAYS_OUT}"
        ) from error
    return state


def read_state(path: Path) -> State:
    """Read a state dict from a .safetensors or .pth file; nothing in the file is executed.

    Raises:
        UserError: The file is not one, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _unwrapped(_read_checkpoint(path), path)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} claims more memory than there is; give another file") from error
    except Exception as error:  # every library error here means: not a usable weights file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as weights ({reason[:120]}); "
            "give a .safetensors file or a .pth state dict"
        ) from error


def _read_checkpoint(path: Path) -> object:
    import torch

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > MAX_UNPACK_RATIO * path.stat().st_size + 2**20:
            raise UserError(f"{path} unpacks to {unpacked} bytes, far above its size; not loaded")
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(loaded: object, path: Path) -> State:
    import torch

    for key in STATE_DICT_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors; give a state dict")
    return state


def _without_prefix(state: State, wanted: set[str]) -> State:
    """Strip the prefixes that wrappers put before every key, until keys match the network's."""
    while not wanted & state.keys():
        prefix = next((p for p in KEY_PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def _load_matching(model: nn.Module, state: State, source: str, backbone: str) -> None:
    """Load everything but the head; a network of another shape is the user's mistake."""
    own = model.state_dict()
    state = _without_prefix(state, set(own))
    head = head_of(model)[0] + "."
    body = {k: v for k, v in own.items() if not k.startswith(head)}
    auxiliary = ("aux", "AuxLogits")
    given = {k: v for k, v in state.items() if not k.startswith((head, *auxiliary))}
    counters = {k for k in body if k.endswith("num_batches_tracked")}
    problems = list(_mismatches(body, given, counters))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} does not fit --backbone {backbone}: {'; '.join(problems[:3])}{more}; "
            "name the backbone that the weights were made for"
        )
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")
        own[name].copy_(tensor)


def _mismatches(body: State, given: State, optional: set[str]) -> Iterator[str]:
    for name in sorted(body.keys() - given.keys() - optional):
        yield f"{name} is missing"
    for name in sorted(given.keys() - body.keys()):
        yield f"{name} is not in the network"
    for name in sorted(body.keys() & given.keys()):
        if body[name].shape != given[name].shape:
            yield f"{name} is {list(given[name].shape)}, wanted {list(body[name].shape)}"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Check that the module's parameters and buffers are the same after the block as before."""
    before = state_sha256(module)
    yield
    assert state_sha256(module) == before, "the frozen network moved"

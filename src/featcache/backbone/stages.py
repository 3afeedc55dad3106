"""Outputs of layers inside a network from one forward pass, pooled and set side by side.

A network without its head gives the D values of its last layer. Its earlier layers, pooled over
space, hold information that the last one has discarded, and a linear head can use it (Head2Toe,
arXiv:2201.03529). Where "last" is asked for too, its columns come last and are exactly what the
network alone gives.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from featcache.backbone.networks import is_timm
from featcache.config import Pool, StageColumns
from featcache.errors import UserError, listed, shown

# The modules whose outputs are the stages, by torchvision's class. timm's networks say themselves;
# others are one sequence of blocks, which is cut where the resolution falls.
STAGES = {
    "ResNet": ("layer1", "layer2", "layer3", "layer4"),
    "RegNet": tuple(f"trunk_output.block{i}" for i in range(1, 5)),
    "DenseNet": tuple(f"features.denseblock{i}" for i in range(1, 5)),
    "ShuffleNetV2": ("stage2", "stage3", "stage4"),
    "ConvNeXt": ("features.1", "features.3", "features.5", "features.7"),
    "SwinTransformer": ("features.1", "features.3", "features.5", "features.7"),
    "MaxVit": ("blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    "GoogLeNet": ("inception3b", "inception4e", "inception5b"),
    "Inception3": ("Mixed_5d", "Mixed_6e", "Mixed_7c"),
}
# Where the blocks of transformers are, and the modules that give their final tokens.
BLOCKS = ("blocks", "encoder.layers")
FINAL_TOKENS = ("norm", "encoder.ln")
PROBE_PX = 64
GROUPS: dict[Pool, tuple[str, ...]] = {
    "avg": ("mean",),
    "avg+std": ("mean", "std"),
    "max": ("max",),
    "gem": ("gem",),
}
POOLINGS = ("mean", "std", "max", "gem", "cls")
GEM_POWER = 3
GEM_FLOOR = 1e-6

_pass = threading.local()
"""`outputs`: pooled outputs of the forward pass in this thread, by group."""


class Pooling(nn.Module):
    """A layer's output as one row per image: float32 [N, C].

    Takes maps [N, C, H, W] or [N, H, W, C], tokens [N, T, C], or rows [N, C]. Of tokens, those in
    front that stand for no patch are left out, unless the class token, the first, is asked for.

    Args:
        how: "mean" or "std" (of the population) over space, "max", "gem" (generalized mean,
            arXiv:1711.02512), or "cls".
        num_prefix_tokens: Tokens in front of the patches: class and register tokens.
        channels_last: Whether maps have their channels last, where their shape does not tell.
    """

    def __init__(self, how: str, num_prefix_tokens: int, channels_last: bool) -> None:
        super().__init__()
        self.how, self.num_prefix_tokens, self.channels_last = how, num_prefix_tokens, channels_last

    def forward(self, output: Tensor) -> Tensor:
        """Pool; see the class."""
        values = output.float()
        if values.dim() == 3:
            # Patches form a square. Some networks add their class token after most blocks.
            num_patches = values.shape[1] - self.num_prefix_tokens
            has_prefix = math.isqrt(max(0, num_patches)) ** 2 == num_patches
            if self.how == "cls" and has_prefix:
                return values[:, 0]
            return self._over(values[:, self.num_prefix_tokens :] if has_prefix else values, (1,))
        if values.dim() == 2 and self.how != "cls":
            return values
        _, rows, columns, last = values.shape
        channels_last = self.channels_last or rows == columns != last
        return self._over(values, (1, 2) if channels_last else (2, 3))

    def _over(self, values: Tensor, space: tuple[int, ...]) -> Tensor:
        if self.how == "cls":
            raise UserError("--layers: there is no class token in the output of this module")
        if self.how == "max":
            return values.amax(space)
        if self.how == "gem":
            return values.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(space).pow(1 / GEM_POWER)
        mean = values.mean(space, keepdim=True)
        if self.how == "mean":
            return mean.flatten(1)
        centered = values - mean
        variance = (centered * centered).mean(space)
        varies = variance > 0  # the root of zero has no gradient
        return torch.where(varies, variance, 1.0).sqrt() * varies


def pooling_of(network: nn.Module, group: str) -> Pooling:
    """How a layer's output becomes a group of columns; "last" is rows already."""
    prefix = getattr(network, "num_prefix_tokens", 1 if _has_class_token(network) else 0)
    channels_last = getattr(network, "output_fmt", None) == "NHWC"
    return Pooling(group.rpartition(".")[2], prefix, channels_last)


class Tap:
    """A hook that pools a module's output as soon as it is there: layers may work in place.

    It keeps nothing itself, so that threads may run one network at once.
    """

    def __init__(self, pools: dict[str, Pooling]) -> None:
        self.pools = pools

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Pool the output for the forward pass of this thread, if there is one."""
        outputs = getattr(_pass, "outputs", None)
        if outputs is not None:
            outputs |= {group: pool(output) for group, pool in self.pools.items()}


class StageFeatures(nn.Module):
    """A frozen network that gives the pooled outputs of its layers, and its own output as "last".

    Args:
        network: Without its head: float32 images [N, 3, H, W] to features [N, D]. It gets hooks.
        columns: Names of the groups of columns, in order, as `stage_columns` gives them.

    Raises:
        UserError: The network has no such module.
    """

    def __init__(self, network: nn.Module, columns: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.columns = network, columns
        taps: dict[str, dict[str, Pooling]] = {}
        for name in columns:
            if name != "last":
                module, _, how = name.rpartition(".")
                pool = pooling_of(network, name)
                taps.setdefault(module or _final_tokens(network, how), {})[name] = pool
        self.pools = nn.ModuleList(pool for pools in taps.values() for pool in pools.values())
        for module, pools in taps.items():
            _module(network, module).register_forward_hook(Tap(pools))

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, num_columns] of images [N, 3, H, W]."""
        outputs = self.outputs(images)
        if not outputs.keys() >= set(self.columns):  # while engines record what it computes
            raise RuntimeError(f"{type(self.network).__name__} is not traced layer by layer")
        return torch.cat([outputs[name] for name in self.columns], dim=1)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Every group's columns [N, width], and those of "last", by name."""
        _pass.outputs = outputs = dict[str, Tensor]()
        try:
            outputs["last"] = self.network(images).flatten(1)
        finally:
            _pass.outputs = None
        return outputs


class SideBySide(nn.Module):
    """The features of a network that gives a dict of them, side by side in the dict's order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, sum of D] of images [N, 3, H, W]."""
        return torch.cat(list(self.network(images).values()), dim=1)


def stage_columns(
    network: nn.Module, image_px: int, pool: Pool, layers: tuple[str, ...] = ("stages",)
) -> StageColumns:
    """Which groups of columns a network's layers give, and how wide each is.

    Args:
        network: Frozen, without its head; it is not changed.
        image_px: Side of its input.
        pool: How layers are pooled whose names do not say it.
        layers: What `--layers` names.

    Raises:
        UserError: The network has no such layer, or does not take images of this size.
    """
    asked = dict.fromkeys(g for layer in layers for g in _groups(network, layer, pool))
    by_layer: dict[str, list[str]] = {}
    for name in asked:
        by_layer.setdefault(name.rpartition(".")[0] or name, []).append(name)
    if "last" in by_layer:
        by_layer["last"] = by_layer.pop("last")  # to the end
    outputs = _probe(network, image_px, tuple(_flat(by_layer)))
    for groups in by_layer.values():
        for name in groups[1:]:  # rows [N, C] have no space to pool
            if torch.equal(outputs[name], outputs[groups[0]]):
                del outputs[name]
    if "stages" in layers:
        final, last = f"{stage_names(network)[-1]}.mean", outputs["last"]
        same = final in outputs and outputs[final].shape == last.shape
        if same and torch.allclose(outputs[final], last):
            del outputs[final]  # a ResNet's last layer is just that
    widths = {name: outputs[name].shape[1] for name in _flat(by_layer) if name in outputs}
    return StageColumns(pool=pool, names=tuple(widths), widths=tuple(widths.values()))


def _flat(by_layer: dict[str, list[str]]) -> list[str]:
    return [name for groups in by_layer.values() for name in groups]


def _probe(network: nn.Module, image_px: int, groups: tuple[str, ...]) -> dict[str, Tensor]:
    """What every group gives for one image of noise, [1, width]."""
    whole = StageFeatures(copy.deepcopy(network), groups)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            outputs = whole.outputs(torch.randn(1, 3, image_px, image_px, generator=generator))
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        reason = shown(" ".join(str(error).split()), 100) or type(error).__name__
        raise UserError(
            f"--layers: {type(network).__name__} cannot give {listed(groups, 3)} for images of "
            f"{image_px} px ({reason}): give another --image-px, or other layers"
        ) from error
    if unused := sorted(set(groups) - outputs.keys()):
        raise UserError(
            f"--layers: {type(network).__name__} does not use {unused[0]}: leave it out"
        )
    return outputs


def _groups(network: nn.Module, layer: str, pool: Pool) -> Iterator[str]:
    """The groups of columns that one word of `--layers` means."""
    module, _, how = layer.rpartition(".")
    if layer in ("last", "cls", "mean"):
        yield layer
    elif layer == "cls+mean":
        yield from ("cls", "mean")
    elif layer == "stages":
        yield from (f"{stage}.{how}" for stage in stage_names(network) for how in GROUPS[pool])
        yield "last"
    elif counted := re.fullmatch(r"last(\d+)", layer):
        hows = ("cls", "mean") if _has_class_token(network) else ("mean",)
        blocks = _blocks(network, layer, int(counted[1]))
        yield from (f"{block}.{how}" for block in blocks for how in hows)
    elif module and how in POOLINGS:
        yield layer
    else:
        yield from (f"{layer}.{how}" for how in GROUPS[pool])


def _module(network: nn.Module, name: str) -> nn.Module:
    """A module of the network by its dotted name.

    Raises:
        UserError: There is none.
    """
    known: dict[str, nn.Module] = dict(network.named_modules())
    if name in known and name:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3) or [n for n in known if n and "." not in n]
    raise UserError(
        f"--layers: {type(network).__name__} has no module {name!r:.80}; there are "
        f"{listed(near, 8)}, and deeper ones with dots"
    )


def _has_class_token(network: nn.Module) -> bool:
    names = (name.rpartition(".")[2] for name, _ in network.named_parameters())
    return any(name in ("cls_token", "class_token") for name in names)


def _final_tokens(network: nn.Module, how: str) -> str:
    """The module that gives a transformer's tokens after all blocks.

    Raises:
        UserError: The network is no transformer, or has no class token.
    """
    kind = type(network).__name__
    of_swin = "SwinTransformer" in kind or getattr(network, "output_fmt", None) == "NHWC"
    if of_swin or _has_class_token(network) or hasattr(network, "num_prefix_tokens"):
        known = dict(network.named_modules())
        for name in FINAL_TOKENS:
            if name in known:
                if how == "cls" and not _has_class_token(network):
                    raise UserError(f"--layers: {kind} has no class token: give mean or last")
                return name
    raise UserError(
        f"--layers {how} is for transformers, and {kind} is none: give last, stages or modules"
    )


def _blocks(network: nn.Module, layer: str, num: int) -> list[str]:
    """The last blocks of a transformer.

    Raises:
        UserError: There are not as many.
    """
    known = dict(network.named_modules())
    path = next((path for path in BLOCKS if path in known), None)
    names = [f"{path}.{n}" for n, _ in known[path].named_children()] if path else []
    if not 1 <= num <= len(names):
        raise UserError(
            f"--layers {layer}: {type(network).__name__} has {len(names)} transformer blocks in a "
            "row; give stages or names of modules"
        )
    return names[-num:]


def stage_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that end a stage, first to last.

    Raises:
        UserError: The network is none whose stages are known.
    """
    kind = type(network).__name__
    if is_timm(network):
        stages = [(str(s["module"]), s["reduction"]) for s in network.feature_info]  # type: ignore
        same_size = len({reduction for _, reduction in stages}) == 1
        return _quarters([n for n, _ in stages]) if same_size else tuple(n for n, _ in stages)
    if kind in STAGES:
        return STAGES[kind]
    known = dict(network.named_modules())
    if kind == "VisionTransformer":
        layers = known["encoder.layers"].named_children()
        return _quarters([f"encoder.layers.{name}" for name, _ in layers])
    sequence = "layers" if kind == "MNASNet" else "features"
    if not isinstance(known.get(sequence), nn.Sequential):
        raise UserError(f"--layers stages: the stages of {kind} are not known; name its modules")
    return tuple(_before_reductions(network, sequence))


def _quarters(blocks: list[str]) -> tuple[str, ...]:
    """Four of a row of equal blocks, evenly spaced, the last one included."""
    return tuple(dict.fromkeys(blocks[len(blocks) * i // 4 - 1] for i in range(1, 5)))


def _before_reductions(network: nn.Module, sequence: str) -> Iterator[str]:
    """Blocks of a sequence after which the resolution falls, and the last block."""
    x, name, side = torch.zeros(1, 3, PROBE_PX, PROBE_PX), "", 0
    with torch.inference_mode():
        for following, block in network.get_submodule(sequence).named_children():
            x = block(x)
            if name and x.shape[2] < side:
                yield f"{sequence}.{name}"
            name, side = following, x.shape[2]
    yield f"{sequence}.{name}"

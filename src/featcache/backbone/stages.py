"""Features of every stage of a network from one forward pass, pooled and set side by side.

A network without its head gives the D values of its last layer. Its earlier stages, pooled over
space, hold information that the last one has discarded, and a linear head can use it (Head2Toe,
arXiv:2201.03529). The last D columns stay exactly what the network alone gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from featcache.config import Pool, StageColumns

# The modules whose outputs are the stages, by torchvision's class. Other networks are one sequence
# of blocks, which is cut where the resolution falls.
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
# Axes of a stage's output that pooling removes, where they are not those of [N, C, H, W].
SPACE = {"SwinTransformer": (1, 2), "VisionTransformer": (1,)}
PROBE_PX = 64


class StageFeatures(nn.Module):
    """A frozen network that gives the pooled output of its stages, then its last layer.

    Args:
        network: Without its head: float32 images [N, 3, H, W] to features [N, D].
        columns: Names of the groups of columns, in order, as `stage_columns` gives them.
    """

    def __init__(self, network: nn.Module, columns: tuple[str, ...]) -> None:
        super().__init__()
        self.groups = [name.rpartition(".")[::2] for name in columns if name != "last"]
        self.space = SPACE.get(type(network).__name__, (2, 3))
        returned = {stage: stage for stage, _ in self.groups} | {last_node(network): "last"}
        self.body = extractor(network, returned)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, num_columns] of images [N, 3, H, W]."""
        outputs: dict[str, Tensor] = self.body(images)
        pooled = [self._pooled(outputs[stage], how) for stage, how in self.groups]
        return torch.cat([*pooled, outputs["last"].flatten(1)], dim=1)

    def _pooled(self, maps: Tensor, how: str) -> Tensor:
        mean = maps.mean(self.space, keepdim=True)
        if how == "mean":
            return mean.flatten(1)
        centred = maps - mean
        return (centred * centred).mean(self.space).sqrt()


def last_node(network: nn.Module) -> str:
    """The name of what a network computes last."""
    from torchvision.models.feature_extraction import get_graph_node_names

    _, nodes = get_graph_node_names(network.eval())
    return str(nodes[-1])


def extractor(network: nn.Module, returned: dict[str, str]) -> fx.GraphModule:
    """A network that gives outputs of some of its nodes, in eval mode; modules are shared.

    Args:
        network: Left in eval mode.
        returned: By a node's name, the key of its output in the dict that the module gives.
    """
    from torchvision.models.feature_extraction import create_feature_extractor

    found = create_feature_extractor(network.eval(), returned)
    # torchvision's class keeps a second graph, for training, and a copy of it takes that one.
    return fx.GraphModule(found, found.graph)


def stage_columns(network: nn.Module, image_px: int, pool: Pool) -> StageColumns:
    """Which groups of columns a network's stages give, and how wide each is.

    Args:
        network: Without its head.
        image_px: Side of its input.
        pool: "avg" for each channel's mean over space, "avg+std" for its deviation too.
    """
    hows = ("mean", "std") if pool == "avg+std" else ("mean",)
    stages = stage_names(network)
    names = (*(f"{stage}.{how}" for stage in stages for how in hows), "last")
    whole = StageFeatures(network, names)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        outputs = whole.body(torch.randn(1, 3, image_px, image_px, generator=generator))
    means = {stage: outputs[stage].mean(whole.space) for stage in stages}
    last = outputs["last"].flatten(1)
    widths = {name: means[name.rpartition(".")[0]].shape[1] for name in names[:-1]}
    final = means[stages[-1]]
    if final.shape == last.shape and torch.allclose(final, last):
        del widths[f"{stages[-1]}.mean"]  # a ResNet's last layer is just that
    widths["last"] = last.shape[1]
    return StageColumns(pool=pool, names=tuple(widths), widths=tuple(widths.values()))


def stage_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that end a stage, first to last."""
    kind = type(network).__name__
    if kind in STAGES:
        return STAGES[kind]
    if kind == "VisionTransformer":  # four blocks, evenly spaced
        depth = len(list(network.get_submodule("encoder.layers").children()))
        blocks = [depth * quarter // 4 - 1 for quarter in range(1, 5)]
        return tuple(f"encoder.layers.encoder_layer_{block}" for block in blocks)
    return tuple(_before_reductions(network, "layers" if kind == "MNASNet" else "features"))


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

"""A network cut before one of its stages: a frozen front, and the tail that may be trained.

The input of a stage is the output of the stage before it, so that what lies between two stages (a
transition, a reduction) belongs to the later one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from featcache.backbone.networks import build_network
from featcache.backbone.stages import stage_names
from featcache.config import StageInput
from featcache.errors import UserError, one_of


class Front(nn.Module):
    """The network up to a stage: images [N, 3, H, W] to that stage's inputs, flattened to [N, D].

    Args:
        network: With or without its head; modules are shared, not copied.
        stage: A name of `stage_names`, not the first.
    """

    def __init__(self, network: nn.Module, stage: str) -> None:
        super().__init__()
        self.body = extractor(network, {_before(network, stage): "inputs"})

    def forward(self, images: Tensor) -> Tensor:
        """Activations [N, D] of images [N, 3, H, W]."""
        inputs: Tensor = self.body(images)["inputs"]
        return inputs.flatten(1)


def last_node(network: nn.Module) -> str:
    """The name of what a network computes last."""
    from torchvision.models.feature_extraction import get_graph_node_names

    with _named_trace_error():
        _, nodes = get_graph_node_names(network.eval())
    return str(nodes[-1])


@contextlib.contextmanager
def _named_trace_error() -> Iterator[None]:
    """Say in one line that a network's code depends on its input, so that it cannot be cut."""
    try:
        yield
    except fx.proxy.TraceError as error:
        raise UserError(
            f"--from-stage: this network cannot be cut before a stage ({error}); use --unfreeze"
        ) from error


def extractor(network: nn.Module, returned: dict[str, str]) -> fx.GraphModule:
    """A network that gives outputs of some of its nodes, in eval mode; modules are shared.

    Args:
        network: Left in eval mode.
        returned: By a node's name, the key of its output in the dict that the module gives.

    Raises:
        UserError: The network's code cannot be traced.
    """
    from torchvision.models.feature_extraction import create_feature_extractor

    with _named_trace_error():
        found = create_feature_extractor(network.eval(), returned)
    # torchvision's class keeps a second graph, for training, and a copy of it takes that one.
    return fx.GraphModule(found, found.graph)


def stage_input(network: nn.Module, stage: str, image_px: int) -> StageInput:
    """The shape of a stage's input, for images of a size.

    Raises:
        UserError: The network has no such stage, or it is the first one.
    """
    body = Front(network, stage).body
    with torch.inference_mode():
        inputs: Tensor = body(torch.zeros(1, 3, image_px, image_px))["inputs"]
    return StageInput(stage=stage, shape=tuple(inputs.shape[1:]))


def tail_of(network: nn.Module, stage: str) -> fx.GraphModule:
    """The network from a stage on, as a module from that stage's inputs to the logits.

    Modules and parameters are those of `network`: what trains the tail trains the network.

    Args:
        network: The whole classifier; left in eval mode.
        stage: A name of `stage_names`, not the first.

    Raises:
        UserError: The network has no such stage, or it is the first one.
    """
    returned = {_before(network, stage): "inputs", last_node(network): "logits"}
    graph = extractor(network, returned).graph
    nodes = list(graph.nodes)
    images, output = nodes[0], nodes[-1]
    ends = output.args[0]
    assert isinstance(ends, dict)
    inputs, logits = ends["inputs"], ends["logits"]
    with graph.inserting_before(images):
        given = graph.placeholder("inputs")
    inputs.replace_all_uses_with(given)
    output.args = (logits,)
    for node in nodes[1:]:
        if node.op == "placeholder" and node.args:  # an optional argument of the network's forward
            _set_to_default(node)
    for node in reversed(nodes[:-1]):
        if not node.users:  # the front, and checks of the size of images
            graph.erase_node(node)
    if [node for node in graph.nodes if node.op == "placeholder"] != [given]:
        raise UserError(
            f"--from-stage {stage}: what follows needs more than that stage's input, so this "
            f"network cannot be cut there; give another stage, or --unfreeze {stage}"
        )
    return fx.GraphModule(network, graph)


def _set_to_default(argument: fx.Node) -> None:
    """Give every user of an optional argument its default instead."""
    (default,) = argument.args

    def given(node: fx.Node) -> fx.node.Argument:
        return default if node is argument else node

    for user in list(argument.users):
        user.args = fx.node.map_arg(user.args, given)
        user.kwargs = fx.node.map_arg(user.kwargs, given)


def names_in_tail(network: nn.Module, tail: fx.GraphModule) -> tuple[str, ...]:
    """Dotted names of the network's modules and parameters that make up a tail, as few as do."""
    targets = {str(n.target) for n in tail.graph.nodes if n.op in ("call_module", "get_attr")}

    def inside(name: str) -> bool:
        return any(name == target or name.startswith(f"{target}.") for target in targets)

    def tops(module: nn.Module, prefix: str) -> Iterator[str]:
        own = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        if own and prefix and all(map(inside, own)):
            yield prefix[:-1]
            return
        for name, _ in module.named_parameters(recurse=False):
            if inside(f"{prefix}{name}"):
                yield f"{prefix}{name}"
        for name, child in module.named_children():
            yield from tops(child, f"{prefix}{name}.")

    return tuple(tops(network, ""))


def last_stage(backbone: str) -> str:
    """The name of the last stage of one of torchvision's networks.

    Raises:
        UserError: There is no such network.
    """
    return stage_names(build_network(backbone, seed=None))[-1]


def _before(network: nn.Module, stage: str) -> str:
    """The stage that ends where `stage` begins.

    Raises:
        UserError: The network has no such stage, or it is the first one.
    """
    first, *others = stage_names(network)
    if stage == first:
        raise UserError(
            f"--from-stage {stage} is the first stage, which trains the whole network: give one of "
            f"{', '.join(others)}, or leave --from-stage out"
        )
    if stage not in others:
        raise UserError(f"--from-stage: {one_of(stage, others, 'stage')}")
    return (first, *others)[others.index(stage)]

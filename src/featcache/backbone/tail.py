"""A network cut before one of its stages: a frozen front, and the tail that may be trained.

The input of a stage is the output of the stage before it, so that what lies between two stages (a
transition, a reduction) belongs to the later one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from featcache.backbone.networks import build_network, head_of
from featcache.backbone.stages import pooling_of, stage_names
from featcache.config import StageColumns, StageInput, layer_of
from featcache.errors import UserError, one_of


class Front(nn.Module):
    """The network up to a stage: images [N, 3, H, W] to rows [N, D] of what the tail needs.

    A row is the stage's input, flattened, and after it the columns of the stages before.

    Args:
        network: With or without its head; modules are shared, not copied.
        stage: A name of `stage_names`, not the first.
        columns: Of stages before `stage`.
    """

    def __init__(self, network: nn.Module, stage: str, columns: StageColumns | None = None) -> None:
        super().__init__()
        self.columns = _Columns(network, columns)
        self.inputs = _before(network, stage)
        self.body = extractor(network, {name: name for name in (self.inputs, *self.columns.layers)})

    def forward(self, images: Tensor) -> Tensor:
        """Rows [N, D] of images [N, 3, H, W]."""
        outputs = self.body(images)
        return torch.cat([outputs[self.inputs].flatten(1), *self.columns(outputs)], dim=1)


class _Columns(nn.Module):
    """Pooled outputs of layers, from a dict of their outputs."""

    def __init__(self, network: nn.Module, columns: StageColumns | None) -> None:
        super().__init__()
        names = columns.names if columns else ()
        self.groups = [layer_of(name) for name in names]
        self.layers = tuple(dict.fromkeys(self.groups))
        self.pools = nn.ModuleList(pooling_of(network, name) for name in names)

    def forward(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        """The groups of columns [N, width], in order."""
        return [pool(outputs[g]) for g, pool in zip(self.groups, self.pools, strict=True)]


class StageHead(nn.Linear):
    """A linear head on standardized columns; `mean` and `scale` are those of the frozen network."""

    def __init__(self, num_columns: int, num_classes: int) -> None:
        super().__init__(num_columns, num_classes)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(num_columns))
        self.register_buffer("scale", torch.ones(num_columns))

    def forward(self, columns: Tensor) -> Tensor:
        """Logits [N, C] of raw columns [N, D]."""
        return super().forward((columns - self.mean) / self.scale)

    def folded(self) -> dict[str, Tensor]:
        """Weight [C, D] and bias [C] of a plain linear layer that gives the same logits."""
        weight = self.weight / self.scale
        return {"weight": weight, "bias": self.bias - weight @ self.mean}


class StagesTail(nn.Module):
    """What follows a cut, with a head on all stages: rows [N, D] as `Front` gives them to logits.

    Args:
        network: The whole classifier, whose head is replaced; modules are shared.
        stage: Where it is cut.
        columns: Of all stages, as `stage_columns` gives them.
        image_px: Side of the network's input.

    Raises:
        UserError: The network cannot be cut there, or its head is not a linear layer.
    """

    def __init__(
        self, network: nn.Module, stage: str, columns: StageColumns, image_px: int
    ) -> None:
        super().__init__()
        name, head = head_of(network)
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"--layers stages: the head of {type(network).__name__} is no linear layer; leave "
                "--layers out"
            )
        self.shape = stage_input(network, stage, image_px).shape
        early, late = split_columns(network, stage, columns)
        self.num_early = early.num_columns if early else 0
        self.columns = _Columns(network, late)
        self.body = _cut(network, stage, [n for n in self.columns.layers if n != "last"], name)
        self.head = StageHead(columns.num_columns, len(head.weight))
        network.set_submodule(name, self.head)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [N, C] of rows [N, D]."""
        flat, early = rows.tensor_split([rows.shape[1] - self.num_early], dim=1)
        outputs = self.body(flat.reshape(len(rows), *self.shape))
        logits: Tensor = self.head(torch.cat([early, *self.columns(outputs)], dim=1))
        return logits


def split_columns(
    network: nn.Module, stage: str, columns: StageColumns
) -> tuple[StageColumns | None, StageColumns | None]:
    """The columns of the stages before a cut, and the others."""
    names = stage_names(network)
    before = names[: names.index(_before(network, stage)) + 1]
    others = set(columns.layers()) - set(before)
    return columns.of_layers(before), columns.of_layers(others)


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
    body = extractor(network, {_before(network, stage): "inputs"})
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
    return _cut(network, stage)


def _cut(
    network: nn.Module, stage: str, layers: Sequence[str] = (), head: str | None = None
) -> fx.GraphModule:
    """What follows a cut, from the stage's inputs to the logits.

    With a `head`, to a dict of the outputs of `layers` and, as "last", of what the head takes.
    """
    ending = last_node(network) if head is None else head
    returned = {_before(network, stage): "inputs", ending: "logits", **{n: n for n in layers}}
    graph = extractor(network, returned).graph
    nodes = list(graph.nodes)
    images, output = nodes[0], nodes[-1]
    ends = output.args[0]
    assert isinstance(ends, dict)
    outputs = dict(ends)
    inputs, logits = outputs.pop("inputs"), outputs.pop("logits")
    with graph.inserting_before(images):
        given = graph.placeholder("inputs")
    inputs.replace_all_uses_with(given)
    output.args = (logits,) if head is None else ({**outputs, "last": logits.args[0]},)
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


@functools.cache
def tail_layers(backbone: str) -> Literal["last", "stages"]:
    """What the head of a tail can take: all stages, if the network's own is a linear layer.

    Raises:
        UserError: There is no such network.
    """
    _, head = head_of(build_network(backbone, seed=None))
    return "stages" if isinstance(head, nn.Linear) else "last"


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

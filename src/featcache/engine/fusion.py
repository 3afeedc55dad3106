"""A frozen network in its fastest CPU form: the same function with fewer passes over memory.

BatchNorm in eval mode is an affine map, so it folds into the convolution before it. What is left
of a residual network is convolution, addition and ReLU; oneDNN applies the last two while a
convolution's output is still in registers, and keeps weights in the layout its kernels want.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from torch import Tensor

ADDITIONS = (operator.add, operator.iadd, torch.add)
# Layers whose output is theirs alone, so that a residual sum may be written over it.
FRESH_OUTPUT = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU)


class FusedConv(nn.Module):
    """A convolution with its weight in oneDNN's own layout and its epilogue fused in.

    Input is float32 [N, C, H, W] in channels-last memory. With a second input, the residual, the
    output is relu(conv(x) + residual), written over the residual.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight: Tensor = conv.weight.detach()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.padding, self.stride, self.dilation = (
            [int(v) for v in values] for values in (conv.padding, conv.stride, conv.dilation)
        )
        self.groups = conv.groups
        self.activation = "none"
        self.packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve; see the class."""
        shape = (self.padding, self.stride, self.dilation, self.groups)
        if self.packed is None:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = reorder(self.weight, *shape, list(x.shape))
        out: Tensor
        convolution = (x, self.packed, self.bias, *shape)
        if residual is None:
            out = torch.ops.mkldnn._convolution_pointwise(*convolution, self.activation, [], "")
        else:
            add_relu = torch.ops.mkldnn._convolution_pointwise_.binary
            out = add_relu(residual, *convolution, "add", 1.0, "relu", [], "")
        return out


class _Tracer(fx.Tracer):
    """Records what a network computes, without touching any other network.

    torch.fx's own `trace` replaces methods of `nn.Module`, and functions that it wraps, for the
    whole process while it runs: networks that compute in other threads meanwhile break. Here the
    modules of one private network get classes of their own instead, for as long as that takes.
    A module that cannot be traced is called as it is.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a network that nobody else uses.

        Raises:
            Exception: Its own `forward` cannot be traced (data-dependent control flow).
        """
        self.root, self.graph = root, fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {}
        forward, args = self.create_args_for_root(type(root).forward, True, concrete_args)
        classes = {module: type(module) for module in root.modules()}
        recording = {kind: self._recording(kind) for kind in set(classes.values())}
        try:
            for module, kind in classes.items():
                module.__class__ = recording[kind]
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
        finally:
            for module, kind in classes.items():
                module.__class__ = kind
        return self.graph

    def _recording(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A subclass whose calls and parameters are recorded."""
        proxies: dict[str, fx.Proxy] = {}

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return kind.__call__(module, *args, **kwargs)

            return self.call_module(module, forward, args, kwargs)

        def attribute(module: nn.Module, name: str) -> Any:
            return self.getattr(name, kind.__getattr__(module, name), proxies)

        methods = {"__call__": call, "__getattr__": attribute, "__module__": kind.__module__}
        return type(kind.__name__, (kind,), methods)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record what a module does, or only that it is called."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            num_before = len(self.graph.nodes)
            try:
                return forward(*args, **kwargs)
            except Exception:  # torch.fx's own and whatever a network makes of its proxies
                for node in reversed(list(self.graph.nodes)[num_before:]):
                    self.graph.erase_node(node)
        output = self.create_proxy("call_module", path, args, kwargs)
        for hook in m._forward_hooks.values():  # what a leaf's own call would do
            hook(m, args, output)
        return output


def _symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """Trace a network in eval mode; the result shares its weights but no module."""
    weights: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for weight in model.parameters():
        weights[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    private = copy.deepcopy(model, weights).eval()
    return fx.GraphModule(private, _Tracer().trace(private), type(model).__name__)


def fold_batchnorm(model: nn.Module) -> fx.GraphModule:
    """Copy a network in eval mode with every BatchNorm folded into the convolution before it.

    Args:
        model: Takes images [N, C, H, W].

    Returns:
        A traced copy that computes the same function up to rounding; weights that did not change
        are shared.

    Raises:
        Exception: The network cannot be traced (data-dependent control flow).
    """
    traced = _symbolic_trace(model)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            traced.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    return traced


def fuse_for_cpu(model: nn.Module) -> fx.GraphModule:
    """Copy a frozen network into its fused form; see the module's docstring.

    Raises:
        Exception: The network cannot be traced, or this build of torch lacks oneDNN's
            fused convolutions; the caller then runs the network as it is and says so.
    """
    traced = fold_batchnorm(model)
    for name, module in list(traced.named_modules()):
        zeros = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
        if zeros and not isinstance(module.padding, str):
            traced.set_submodule(name, FusedConv(module))
    _fuse_relu(traced)
    _fuse_residual(traced)
    traced.graph.lint()
    traced.recompile()
    return traced


def _only_user(node: fx.Node, modules: dict[str, Any], kind: type) -> fx.Node | None:
    """The node that alone uses `node`, if it calls a module of `kind`."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module":
        return users[0] if isinstance(modules[str(users[0].target)], kind) else None
    return None


def _fuse_relu(traced: fx.GraphModule) -> None:
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        conv = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(conv, FusedConv):
            continue
        relu = _only_user(node, modules, nn.ReLU)
        if relu is not None:
            conv.activation = "relu"
            relu.replace_all_uses_with(node)
            traced.graph.erase_node(relu)


def _fuse_residual(traced: fx.GraphModule) -> None:
    """Turn relu(conv(x) + y) into one call, where y is not needed afterwards."""
    modules = dict(traced.named_modules())
    position = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or node.target not in ADDITIONS or len(node.args) != 2:
            continue
        relu = _only_user(node, modules, nn.ReLU)
        for conv, other in (node.args, node.args[::-1]):
            if relu is None or not _may_overwrite(conv, other, node, modules, position):
                continue
            with traced.graph.inserting_before(node):
                fused = traced.graph.call_module(conv.target, (conv.args[0], other))
            position[fused] = position[node]
            relu.replace_all_uses_with(fused)
            for old in (relu, node, conv):
                traced.graph.erase_node(old)
            break


def _may_overwrite(
    conv: Any, other: Any, addition: fx.Node, modules: dict[str, Any], position: dict[fx.Node, int]
) -> bool:
    """Whether conv(x) + other may be computed by `conv` over the memory of `other`."""
    if not (isinstance(conv, fx.Node) and isinstance(other, fx.Node)) or conv is other:
        return False
    if conv.op != "call_module" or other.op != "call_module":
        return False
    first = modules[str(conv.target)]
    owned = isinstance(modules[str(other.target)], (FusedConv, *FRESH_OUTPUT))
    last_use = all(position[user] <= position[addition] for user in other.users)
    plain = isinstance(first, FusedConv) and first.activation == "none"
    return plain and owned and last_use and len(conv.users) == 1 and len(conv.args) == 1

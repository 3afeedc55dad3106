"""Torchvision's classification networks, whole or without their head."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any, cast

from featcache.errors import UserError, one_of
from featcache.runtime import import_torchvision

if TYPE_CHECKING:
    from torch import nn


def classifiers() -> list[str]:
    """Names of torchvision's classification networks."""
    models = import_torchvision("models")
    return [name for name in models.list_models(module=models) if not name.startswith("quantized")]


def build_network(name: str, *, seed: int | None) -> nn.Module:
    """Build a torchvision classification network with its ImageNet head, weights not loaded.

    Torch's own random numbers are neither used nor disturbed, so that threads may do this at once.

    Args:
        name: Torchvision's name of it.
        seed: Draws its weights; without one they are zeros, which is quicker where weights from a
            file replace them.

    Raises:
        UserError: torchvision has no such network.
    """
    models = import_torchvision("models")
    if name not in classifiers():
        raise UserError(one_of(name, classifiers(), "backbone"))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads only serve training from scratch; the input transform belongs to
        # the published weights, which expect 0.5/0.5 normalisation inside ImageNet's.
        options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    with _drawn_by(seed):
        network: nn.Module = models.get_model(name, weights=None, **options)
    return network


def _drawn_by(seed: int | None) -> contextlib.AbstractContextManager[Any]:
    """Draw new weights from a generator of their own, or have zeros for them."""
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    filling: set[Any] = {torch.Tensor.normal_, torch.Tensor.uniform_}
    # These come here whole: what they call would not.
    filling |= {init.normal_, init.uniform_, init.kaiming_uniform_}
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    class Drawn(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if generator is None and func in filling:
                # Not what was in memory: trunc_normal_ draws again until all values are in range.
                with torch.no_grad():
                    return (args[0] if args else kwargs["tensor"]).zero_()
            if func in filling:
                kwargs = {**kwargs, "generator": generator}
            return func(*args, **kwargs)

    return Drawn()


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


def state_sha256(module: nn.Module) -> str:
    """sha256 over every parameter and buffer, names included: the proof that nothing moved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

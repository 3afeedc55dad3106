"""Classification networks of torchvision and timm, whole or without their head."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any, cast

from featcache.backbone import timm_networks
from featcache.config import TIMM
from featcache.errors import UserError, one_of
from featcache.runtime import import_torchvision

if TYPE_CHECKING:
    from torch import nn


def classifiers() -> list[str]:
    """Names of torchvision's classification networks."""
    models = import_torchvision("models")
    return [name for name in models.list_models(module=models) if not name.startswith("quantized")]


def check_name(name: str) -> None:
    """Check that there is a network of this name.

    Raises:
        UserError: There is none, or timm is not installed.
    """
    if name.startswith(TIMM):
        timm_networks.architecture_of(name)
    elif name not in classifiers():
        raise UserError(one_of(name, classifiers(), "backbone"))


def build_network(name: str, *, seed: int | None, image_px: int | None = None) -> nn.Module:
    """Build a classification network with its own head, weights not loaded.

    Torch's own random numbers are neither used nor disturbed, so that threads may do this at once.

    Args:
        name: Torchvision's name of it, or timm/NAME.
        seed: Draws its weights; without one they are zeros, which is quicker where weights from a
            file replace them.
        image_px: Side of its input, for timm's networks that are built for one size.

    Raises:
        UserError: There is no such network.
    """
    check_name(name)
    if name.startswith(TIMM):
        with drawn_by(seed):
            return timm_networks.build(name, image_px)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads only serve training from scratch; the input transform belongs to
        # the published weights, which expect 0.5/0.5 normalization inside ImageNet's.
        options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    with drawn_by(seed):
        network: nn.Module = import_torchvision("models").get_model(name, weights=None, **options)
    return network


def drawn_by(seed: int | None) -> contextlib.AbstractContextManager[Any]:
    """Draw new weights from a generator of their own, or have zeros for them."""
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    filling: set[Any] = {torch.Tensor.normal_, torch.Tensor.uniform_}
    # These come here whole: what they call would not.
    filling |= {init.normal_, init.uniform_, init.kaiming_uniform_}
    making = {torch.randn, torch.rand}
    generator = torch.Generator().manual_seed(seed or 0)

    class Drawn(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if seed is None and func in filling:
                # Not what was in memory: trunc_normal_ draws again until all values are in range.
                with torch.no_grad():
                    return (args[0] if args else kwargs["tensor"]).zero_()
            if func in filling or func in making:
                kwargs = {**kwargs, "generator": generator}
            return func(*args, **kwargs)

    return Drawn()


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classification heads by their dotted names; distilled networks of timm have two.

    Torchvision's networks have one: the last linear layer, or SqueezeNet's last convolution.
    """
    from torch import nn

    if is_timm(model):
        return timm_networks.heads_of(model)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    linear = [(n, m) for n, m in layers if isinstance(m, nn.Linear)]
    assert layers, "a classification network has a linear layer or a convolution"
    return dict([linear[-1] if linear else layers[-1]])


def head_of(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Find the layer to train as a head.

    Returns:
        Its dotted name in `model`, and the layer itself.

    Raises:
        UserError: The network has no single one.
    """
    from torch import nn

    heads = heads_of(model)
    name, head = next(iter(heads.items()), ("", None))
    if len(heads) != 1 or not isinstance(head, (nn.Linear, nn.Conv2d)):
        raise UserError(
            f"{type(model).__name__} has no single linear head and is not fine-tuned: use "
            "extract-features and train-head"
        )
    return name, head


def remove_heads(model: nn.Module) -> int:
    """Take the heads off a network, so that it gives features.

    Returns:
        The width D of the features.
    """
    from torch import nn

    if is_timm(model):
        return timm_networks.remove_heads(model)
    name, head = head_of(model)
    model.set_submodule(name, nn.Identity())
    return feature_dim_of(head)


def is_timm(model: nn.Module) -> bool:
    """Whether a network is one of timm's."""
    return hasattr(model, "get_classifier") and hasattr(model, "reset_classifier")


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

"""Which parts of a network train: parameters, modes and learning rates."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

from featcache.backbone import head_of
from featcache.errors import UserError, one_of
from featcache.finetune.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn


MOMENTUM = 0.9


class Parts:
    """A classifier divided into what trains and what stays.

    Frozen modules are in eval mode throughout, so their BatchNorm buffers do not move either.

    Args:
        model: The whole classifier.
        plan: Says what trains: everything, the head, or the head and named modules.

    Raises:
        UserError: `plan.unfreeze` names no module of this network.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.head_name, self.head = head_of(model)
        self._prefixes = self._trained_prefixes()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def _trained_prefixes(self) -> tuple[str, ...] | None:
        """Dotted names whose modules train; None trains all."""
        if self.plan.freeze_backbone:
            return (self.head_name,)
        if not self.plan.unfreeze:
            return None
        with_parameters = [
            name
            for name, module in self.model.named_modules()
            if name and any(True for _ in module.parameters())
        ]
        for prefix in self.plan.unfreeze:
            if prefix not in with_parameters:
                top = [name for name, _ in self.model.named_children() if name in with_parameters]
                raise UserError(
                    f"--unfreeze: {one_of(prefix, top, 'module')}; a deeper one is named with "
                    "dots, for example layer4.1"
                )
        return (*self.plan.unfreeze, self.head_name)

    def trains(self, name: str) -> bool:
        """Whether the parameter, buffer or module of this dotted name trains."""
        if self._prefixes is None:
            return True
        return any(name == p or name.startswith(f"{p}.") for p in self._prefixes)

    @property
    def trainable_params(self) -> int:
        """How many numbers the optimizer changes."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def moving_state(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers that training may change, by name."""
        return {n: t for n, t in self.model.state_dict().items() if self.trains(n)}

    def frozen_sha256(self) -> str:
        """sha256 over every parameter and buffer that must not move, names included."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            if not self.trains(name):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def train_mode(self) -> None:
        """Put what trains into train mode and everything else into eval mode."""
        from torch.nn.modules.batchnorm import _BatchNorm

        for name, module in self.model.named_modules():
            still = self.plan.bn_eval and isinstance(module, _BatchNorm)
            # A container's own mode matters for those that drop whole blocks.
            module.training = self.trains(name) and not still
        if self.plan.freeze_backbone:
            self.model.eval()

    def uses_batch_statistics(self) -> bool:
        """Whether some BatchNorm layer computes over the batch while training."""
        from torch.nn.modules.batchnorm import _BatchNorm

        self.train_mode()
        return any(m.training for m in self.model.modules() if isinstance(m, _BatchNorm))

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, with a `base_lr` per group for the schedule.

        AdamW's decay spares biases and normalisation, which have one dimension; that of Adam and
        SGD takes everything, as torch does by default and train-head does.
        """
        import torch

        groups: list[dict[str, Any]] = []
        for is_head in (False, True):
            rate = self.plan.lr if is_head else self.plan.backbone_lr
            for decays in (True, False):
                params = [
                    p
                    for name, p in self.model.named_parameters()
                    if p.requires_grad
                    and name.startswith(f"{self.head_name}.") == is_head
                    and (p.ndim > 1 or self.plan.optimizer != "adamw") == decays
                ]
                decay = self.plan.weight_decay if decays else 0.0
                if params:
                    groups.append(
                        {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
                    )
        # One pass over memory instead of several: a tenth of a step's time on a CPU.
        fused = next(self.model.parameters()).device.type in ("cpu", "cuda")
        if self.plan.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=MOMENTUM, fused=fused)
        kind = torch.optim.AdamW if self.plan.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, fused=fused)

    def head_width(self) -> int:
        """Width D of the features that enter the head."""
        weight = cast("torch.Tensor", self.head.weight)
        return int(weight.shape[1])

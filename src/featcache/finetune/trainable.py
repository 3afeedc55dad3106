"""What a fine-tuning run trains and how: the recipe, and the network divided by it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from featcache.backbone import head_of
from featcache.config import BackboneInfo, FinetuneConfig, JsonObject
from featcache.errors import UserError, one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

WARM_UP_SHARE = 0.1
SGD_LR = 1e-2
"""As in train-head; Adam's rate would be too timid."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Every choice that changes the outcome, none left open.

    `lr` is the head's rate, `backbone_lr` that of everything else; `probe` starts from a linear
    probe; `patience` counts epochs without gain on the held-out part of train, None never stops;
    `from_stage` trains this stage and what follows from the stage's cached input, `all_stages` with
    a head on the columns of every stage.
    """

    epochs: int
    lr: float
    backbone_lr: float
    batch_size: int
    optimizer: Literal["adam", "adamw", "sgd"]
    weight_decay: float
    schedule: Literal["constant", "cosine"]
    freeze_backbone: bool
    unfreeze: tuple[str, ...]
    bn_eval: bool
    flip: bool
    probe: bool
    patience: int | None
    holdout: float
    seed: int
    from_stage: str | None = None
    all_stages: bool = False

    def to_dict(self) -> JsonObject:
        """As JSON; without a stage it is what version 0.1.0 wrote."""
        values = dataclasses.asdict(self)
        for name in ("from_stage", "all_stages"):
            if not values[name]:
                del values[name]
        return values


RECIPES: dict[str, dict[str, Any]] = {
    "notebook": {
        "epochs": 3,
        "lr": 1e-3,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "schedule": "constant",
        "bn_eval": False,
        "flip": True,
    },
    "good": {
        "epochs": 5,
        "lr": 1e-3,
        "backbone_lr": 1e-4,
        "optimizer": "adamw",
        "weight_decay": 0.05,
        "schedule": "cosine",
        "bn_eval": True,
        "flip": True,
    },
}

TAIL_OF_GOOD = {"epochs": 8, "backbone_lr": 2e-4}
"""What the good recipe changes with --from-stage: fewer layers move, and an epoch costs less."""
TAIL_OF_ALL_STAGES = {"epochs": 4, "lr": 2e-4, "backbone_lr": 2e-4}
"""And with --layers stages: the head starts nearly as good as it gets."""


def resolve_recipe(config: FinetuneConfig) -> TrainingRecipe:
    """Resolve a command's settings: what the user gave wins over the recipe."""
    assert config.recipe is not None, "set with the settings"
    chosen = dict(RECIPES[config.recipe])
    if config.recipe == "good" and config.from_stage is not None:
        chosen |= TAIL_OF_GOOD if config.layers == "last" else TAIL_OF_ALL_STAGES
    ratio = chosen.get("backbone_lr", chosen["lr"]) / chosen["lr"]
    for name in (*RECIPES["good"],):
        given = getattr(config, name)
        if given is not None:
            chosen[name] = given
    if config.lr is not None and config.backbone_lr is None and config.recipe == "good":
        # Keep the recipe's ratio when only the one rate is given.
        chosen["backbone_lr"] = config.lr * ratio
    if config.lr is None and config.optimizer == "sgd":
        chosen["lr"] = SGD_LR
    chosen.setdefault("backbone_lr", chosen["lr"])
    names = (part.strip(" .") for part in (config.unfreeze or "").split(","))
    return TrainingRecipe(
        **chosen,
        batch_size=config.batch_size,
        freeze_backbone=config.freeze_backbone,
        unfreeze=tuple(name for name in names if name),
        probe=config.recipe == "good" and config.init_head is None,
        patience=config.patience,
        holdout=config.holdout,
        seed=config.seed,
        from_stage=config.from_stage,
        all_stages=config.layers == "stages",
    )


def rate_factor(recipe: TrainingRecipe, step: int, num_steps: int) -> float:
    """What a step multiplies every learning rate by.

    Cosine: a linear rise over the first tenth of the steps, then half a cosine down towards zero.

    Args:
        recipe: Whose schedule counts.
        step: Counted from 0 over the whole run.
        num_steps: Of the whole run.
    """
    if recipe.schedule == "constant":
        return 1.0
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


MOMENTUM = 0.9


class TrainableModel:
    """A classifier divided into what trains and what stays.

    Frozen modules are in eval mode throughout, so their BatchNorm buffers do not move either.

    Args:
        model: The whole classifier.
        recipe: Says what trains: everything, the head, the head and named modules, or the tail
            from a stage on.
        info: The backbone; its columns are what a head on all stages takes.

    Attributes:
        network: What a batch goes through: the model, or its tail, which takes a stage's inputs.
        training_network: The same, as it is called to train.

    Raises:
        UserError: `recipe.unfreeze` or `recipe.from_stage` names no module of this network.
    """

    def __init__(
        self, model: nn.Module, recipe: TrainingRecipe, info: BackboneInfo | None = None
    ) -> None:
        from featcache.finetune.convolutions import choose_convolutions

        self.model, self.network, self.recipe = model, model, recipe
        self.head_name, _ = head_of(model)
        self._prefixes = self._trained_prefixes(info)
        self.head = head_of(model)[1]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))
        choose_convolutions(model)
        self.training_network = self.network

    def _trained_prefixes(self, info: BackboneInfo | None) -> tuple[str, ...] | None:
        """Dotted names whose modules train; None trains all."""
        if self.recipe.freeze_backbone:
            return (self.head_name,)
        if self.recipe.all_stages:
            from featcache.backbone.tail import StagesTail, names_in_tail

            assert self.recipe.from_stage is not None
            assert info is not None
            assert info.stages is not None
            image_px = info.preprocessing.image_px
            tail = StagesTail(self.model, self.recipe.from_stage, info.stages, image_px)
            self.network = tail
            return (*names_in_tail(self.model, tail.body), self.head_name)
        if self.recipe.from_stage is not None:
            from featcache.backbone.tail import names_in_tail, tail_of

            self.network = tail_of(self.model, self.recipe.from_stage)
            return names_in_tail(self.model, self.network)
        if not self.recipe.unfreeze:
            return None
        with_parameters = [
            name
            for name, module in self.model.named_modules()
            if name and any(True for _ in module.parameters())
        ]
        for prefix in self.recipe.unfreeze:
            if prefix not in with_parameters:
                top = [name for name, _ in self.model.named_children() if name in with_parameters]
                raise UserError(
                    f"--unfreeze: {one_of(prefix, top, 'module')}; a deeper one is named with "
                    "dots, for example layer4.1"
                )
        return (*self.recipe.unfreeze, self.head_name)

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

    def final_state(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer by name, for a model file: the head is a plain layer there."""
        from featcache.backbone.tail import StageHead

        state = self.model.state_dict()
        if isinstance(self.head, StageHead):
            prefix = f"{self.head_name}."
            state = {name: t for name, t in state.items() if not name.startswith(prefix)}
            state |= {f"{prefix}{name}": t for name, t in self.head.folded().items()}
        return state

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
            still = self.recipe.bn_eval and isinstance(module, _BatchNorm)
            # A container's own mode matters for those that drop whole blocks.
            module.training = self.trains(name) and not still
        if self.recipe.freeze_backbone:
            self.model.eval()

    def uses_batch_statistics(self) -> bool:
        """Whether some BatchNorm layer computes over the batch while training."""
        from torch.nn.modules.batchnorm import _BatchNorm

        self.train_mode()
        return any(m.training for m in self.model.modules() if isinstance(m, _BatchNorm))

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, with a `base_lr` per group for the schedule.

        AdamW's decay spares biases and normalization, which have one dimension; that of Adam and
        SGD takes everything, as torch does by default and train-head does.
        """
        import torch

        groups: list[dict[str, Any]] = []
        stored = _Stored()
        for is_head in (False, True):
            rate = self.recipe.lr if is_head else self.recipe.backbone_lr
            for decays in (True, False):
                params = [
                    stored.of(p)
                    for name, p in self.model.named_parameters()
                    if p.requires_grad
                    and name.startswith(f"{self.head_name}.") == is_head
                    and (p.ndim > 1 or self.recipe.optimizer != "adamw") == decays
                ]
                decay = self.recipe.weight_decay if decays else 0.0
                if params:
                    groups.append(
                        {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
                    )
        # One pass over memory instead of several: a tenth of a step's time on a CPU.
        fused = next(self.model.parameters()).device.type in ("cpu", "cuda")
        optimizer: torch.optim.Optimizer
        if self.recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, fused=fused)
        else:
            kind = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(groups, fused=fused)
        optimizer.register_step_pre_hook(lambda *_: stored.take_gradients())
        return optimizer

    @property
    def num_classes(self) -> int:
        """Number C of logits."""
        return len(self.head.weight)

    def head_width(self) -> int:
        """Width D of the features that enter the head."""
        return int(self.head.weight.shape[1])


class _Stored:
    """Channels-last weights as an optimizer sees them: in the order in which their numbers lie.

    Of a gradient in another order, torch's fused Adam makes a copy, which it does not even use.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[nn.Parameter, torch.Tensor]] = []

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter [C', C, k, l], or its memory as a tensor [C', k, l, C]."""
        if parameter.is_contiguous() or parameter.ndim != 4:
            return parameter
        self._pairs.append((parameter, parameter.detach().permute(0, 2, 3, 1)))
        return self._pairs[-1][1]

    def take_gradients(self) -> None:
        """Move the parameters' gradients to what the optimizer sees."""
        for parameter, seen in self._pairs:
            if parameter.grad is not None:
                seen.grad, parameter.grad = parameter.grad.permute(0, 2, 3, 1), None

"""What a fine-tuning run does: the recipe's defaults with the user's flags on top."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from featcache.config import FinetuneConfig

EVAL_BATCH_SIZE = 64
WARM_UP_SHARE = 0.1
SGD_LR = 1e-2
"""As in train-head; Adam's rate would be too timid."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every choice that changes the outcome, none left open.

    `lr` is the head's rate, `backbone_lr` that of everything else; `probe` starts from a linear
    probe; `patience` counts epochs without gain on the held-out part of train, None never stops.
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


def make_plan(config: FinetuneConfig) -> Plan:
    """Resolve a command's settings: what the user gave wins over the recipe."""
    chosen = dict(RECIPES[config.recipe])
    for name in (*RECIPES["good"],):
        given = getattr(config, name)
        if given is not None:
            chosen[name] = given
    if config.lr is not None and config.backbone_lr is None and config.recipe == "good":
        # Keep the recipe's ratio when only the one rate is given.
        good = RECIPES["good"]
        chosen["backbone_lr"] = config.lr * good["backbone_lr"] / good["lr"]
    if config.lr is None and config.optimizer == "sgd":
        chosen["lr"] = SGD_LR
    chosen.setdefault("backbone_lr", chosen["lr"])
    names = (part.strip(" .") for part in (config.unfreeze or "").split(","))
    return Plan(
        **chosen,
        batch_size=config.batch_size,
        freeze_backbone=config.freeze_backbone,
        unfreeze=tuple(name for name in names if name),
        probe=config.recipe == "good" and config.init_head is None,
        patience=config.patience,
        holdout=config.holdout,
        seed=config.seed,
    )


def rate_factor(plan: Plan, step: int, num_steps: int) -> float:
    """What a step multiplies every learning rate by.

    Cosine: a linear rise over the first tenth of the steps, then half a cosine down towards zero.

    Args:
        plan: Whose schedule counts.
        step: Counted from 0 over the whole run.
        num_steps: Of the whole run.
    """
    if plan.schedule == "constant":
        return 1.0
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))

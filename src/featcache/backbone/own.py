"""Networks given as modules in Python instead of by name.

Such a network is identified by the name of its class and the hash of its tensors. Its code is not
recorded: what was made with it cannot be made again from its name, only from the module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featcache.backbone.load import OtherWeightsError, frozen
from featcache.backbone.networks import state_sha256
from featcache.config import OWN_MODULE, BackboneConfig, BackboneInfo, Preprocessing, StageColumns
from featcache.errors import UserError, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "own"
ONE = ""
IMAGENET = Preprocessing(image_px=224, resize="crop", resize_px=256)


@dataclass(frozen=True, eq=False)
class OwnNetwork:
    """A user's network, which is copied before it is used.

    Attributes:
        module: From float32 images [N, 3, H, W] to features [N, D], or to a dict of them.
        preprocessing: How an image becomes its input.
    """

    module: nn.Module
    preprocessing: Preprocessing

    @classmethod
    def of(cls, module: object, preprocessing: Preprocessing | None = None) -> OwnNetwork:
        """Check what a user gave; by default images become input as for ImageNet at 224 px.

        Raises:
            UserError: It is no torch module.
        """
        from torch import nn

        if not isinstance(module, nn.Module):
            raise UserError(f"backbone: give a torch module, not a {type(module).__name__}")
        return cls(module, preprocessing or IMAGENET)

    @property
    def name(self) -> str:
        """What caches and heads call it."""
        kind = type(self.module)
        return f"{OWN_MODULE}{kind.__module__}.{kind.__qualname__}".replace("<locals>.", "")

    def identify(self, config: BackboneConfig) -> BackboneInfo:
        """Its identity, for a command whose other settings count.

        Raises:
            UserError: The settings name another network, or it does not give features.
        """
        plain = BackboneConfig()
        if (config.backbone, config.weights) != (plain.backbone, plain.weights):
            raise UserError("a backbone was given as a module: leave --backbone and --weights out")
        if config.cached_stage is not None or getattr(config, "batchnorm", "frozen") != "frozen":
            raise UserError("--from-stage and --batchnorm adapt are for networks by name")
        prep = config.preprocessing(self.preprocessing)
        network, stages = self._copy(), None
        outputs = self._outputs(network, prep.image_px)
        widths = {name: value.shape[1] for name, value in outputs.items()}
        if config.stage_pool is not None:
            from featcache.backbone.stages import stage_columns

            if ONE not in outputs:
                raise UserError(f"{self.name} gives a dict by itself: leave --layers out")
            pool, layers = config.stage_pool, config.asked_layers
            stages = stage_columns(network, prep.image_px, pool, layers)
        elif ONE not in outputs:
            stages = StageColumns(pool="avg", names=tuple(widths), widths=tuple(widths.values()))
        return BackboneInfo(
            backbone=self.name,
            weights=WEIGHTS,
            weights_sha256=state_sha256(network),
            feature_dim=sum(stages.widths if stages else widths.values()),
            preprocessing=prep,
            stages=stages,
        )

    def load(self, info: BackboneInfo) -> nn.Module:
        """A frozen copy that gives the columns of `info`.

        Raises:
            OtherWeightsError: Its tensors are others.
            UserError: It is another network.
        """
        network = self._copy()
        if self.name != info.backbone:
            raise UserError(f"the backbone given is {self.name}, and {info.backbone} is needed")
        if (found := state_sha256(network)) != info.weights_sha256:
            raise OtherWeightsError(self.name, found)
        if ONE in self._outputs(network, info.preprocessing.image_px):
            return frozen(network, info.stages)
        from featcache.backbone.stages import SideBySide

        return frozen(SideBySide(network))

    def _copy(self) -> nn.Module:
        try:
            return frozen(copy.deepcopy(self.module).cpu().float())
        except (RuntimeError, TypeError) as error:
            reason = shown(" ".join(str(error).split()), 100)
            raise UserError(f"{self.name} cannot be copied: {reason}") from error

    def _outputs(self, network: nn.Module, image_px: int) -> dict[str, Tensor]:
        """What it gives for one black image, by name; one tensor has no name."""
        import torch

        try:
            with torch.inference_mode():
                found: Any = network(torch.zeros(1, 3, image_px, image_px))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = shown(" ".join(str(error).split()), 100) or type(error).__name__
            raise UserError(
                f"{self.name} cannot run on images of {image_px} px ({reason}): give another "
                "--image-px, or another preprocessing"
            ) from error
        outputs = found if isinstance(found, dict) else {ONE: found}
        for value in outputs.values():
            if not isinstance(value, torch.Tensor) or value.dim() != 2 or len(value) != 1:
                gives = list(getattr(value, "shape", ())) or type(value).__name__
                raise UserError(
                    f"{self.name} gives {gives} for one image: it has to give features [N, D], "
                    "or a dict of them"
                )
        return {str(name): value for name, value in outputs.items()}

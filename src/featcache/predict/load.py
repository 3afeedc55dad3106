"""A head or model file with the network that it was trained with, proven to be that one.

A head file names its backbone's weights and their sha256; other weights would give other features,
so they are refused. A model file holds all of its network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from featcache.backbone import OwnNetwork, build_classifier, check_name, file_sha256
from featcache.backbone.load import OtherWeightsError, frozen, verified_network
from featcache.backbone.networks import head_of, remove_heads
from featcache.backbone.weights import is_file
from featcache.config import (
    TIMM,
    BackboneConfig,
    BackboneInfo,
    JsonObject,
    Preprocessing,
    Task,
    weights_text,
)
from featcache.errors import CacheError, UserError
from featcache.heads import Decision, Head, LinearHead
from featcache.heads.files import FORMAT as HEAD_FORMAT
from featcache.heads.files import parse_head
from featcache.heads.linear import PLAIN
from featcache.tensor_files import (
    LABEL_THRESHOLD,
    MODEL_FORMAT,
    ModelCard,
    State,
    TensorFile,
    model_card,
    not_finite,
    read_tensor_file,
)

if TYPE_CHECKING:
    from torch import nn

CACHE_SUFFIXES = (".h5", ".hdf5", ".part")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedClassifier:
    """A classifier loaded from a file.

    Attributes:
        path: The file.
        kind: "head" or "model", as train-head and finetune write them.
        network: Frozen, in eval mode, on the CPU: float32 images [N, 3, H, W] to features [N, D],
            or without a head to logits [N, C].
        head: What turns features into classes; None for a model without columns of all stages.
        class_names: C names.
        preprocessing: How an image becomes the network's input.
        backbone: The network's name.
        dtype: As which type the head's train features were stored.
        precision: How they were computed.
        scores: What the classifier scored when it was trained.
        provenance: What it was made from.
        task: Of a model, what an image has: one class, or any of several labels.
    """

    path: Path
    kind: Literal["head", "model"]
    network: nn.Module
    head: Head | None
    class_names: list[str]
    preprocessing: Preprocessing
    backbone: str
    dtype: str
    precision: str
    scores: JsonObject
    provenance: JsonObject
    task: Task = "multiclass"

    @property
    def decision(self) -> Decision:
        """How logits become probabilities and a class."""
        if self.head is not None:
            return self.head.decision
        return _decision(self.task, len(self.class_names))

    def describe(self) -> str:
        """One phrase for people: what classifies."""
        prep = self.preprocessing
        fed = f"{prep.image_px} px {prep.resize}"
        if self.head is None or self.kind == "model":
            return f"fine-tuned {self.backbone}, {fed}"
        weights = weights_text(self.provenance["backbone"])
        return f"{self.head.solver} head on {self.backbone} ({weights}), {fed}"


def load_classifier(
    path: Path, *, weights: str | None = None, seed: int = 42, own: OwnNetwork | None = None
) -> LoadedClassifier:
    """Load a head with its backbone, or a fine-tuned model.

    Args:
        path: A file that train-head or finetune wrote.
        weights: The weights file of a head's backbone, if it is neither in the working directory
            nor in the head's.
        seed: Draws the backbone's weights, if the head was trained on random ones.
        own: The backbone of a head that was trained on features of a module given in Python.

    Raises:
        UserError: The file is missing, damaged or neither of the two, or the weights are missing.
        CacheError: The weights are not those that the head was trained on.
    """
    if path.suffix in CACHE_SUFFIXES and path.is_file():
        raise UserError(f"{path} is a cache, not a classifier: type train-head {path} first")
    file = read_tensor_file(path)
    kind = file.metadata.get("format")
    if kind == MODEL_FORMAT:
        if weights is not None:
            raise UserError(
                f"--weights is for heads; {path} is a fine-tuned model, which has its own: leave "
                "--weights out"
            )
        return _load_model(file)
    if kind == HEAD_FORMAT:
        return _load_with_backbone(file, weights, seed, own)
    raise UserError(
        f"{path} is neither a head nor a fine-tuned model: give a file that train-head or finetune "
        "wrote"
    )


def _load_with_backbone(
    file: TensorFile, weights: str | None, seed: int, own: OwnNetwork | None
) -> LoadedClassifier:
    path, head = file.path, parse_head(file)
    info = _backbone_of(head, path)
    if info.is_own_module:
        network = _own_network(info, path, own)
    elif own is not None:
        raise UserError(f"{path} is for {info.backbone}, which has a name: leave the module out")
    else:
        network = _network_of(info, path, weights, seed)
    provenance = head.provenance
    return LoadedClassifier(
        path=path,
        kind="head",
        network=network,
        head=head,
        class_names=head.class_names,
        preprocessing=info.preprocessing,
        backbone=info.backbone,
        dtype=str(provenance.get("dtype", "float32")),
        precision=str(provenance.get("precision", "float32")),
        scores=head.scores,
        provenance=provenance,
    )


def _backbone_of(head: Head, path: Path) -> BackboneInfo:
    """The backbone that a head's provenance names."""
    try:
        info = BackboneInfo.from_dict(head.provenance["backbone"])
        for name in ("backbone", "weights", "weights_sha256"):
            if not isinstance(getattr(info, name), str):
                raise TypeError(f"{name} is not a string")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say which backbone it is for ({error!s:.100}): run train-head again"
        ) from error
    if not info.is_own_module:
        _check_backbone(info.backbone, path)
    if info.feature_dim != head.feature_dim:
        raise CacheError(
            f"{path} is for {info.feature_dim} features by its provenance, {head.feature_dim} by "
            "its tensors: run train-head again"
        )
    return info


def _check_backbone(name: str, path: Path) -> None:
    try:
        check_name(name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _network_of(info: BackboneInfo, path: Path, weights: str | None, seed: int) -> nn.Module:
    """The backbone with the weights that `info` names, if their hash is the one it records."""
    config = BackboneConfig(
        backbone=info.backbone,
        weights=weights or _find_weights(info, path),
        image_px=info.preprocessing.image_px,
        device="cpu",
    )
    try:
        network = verified_network(config, seed, info.weights_sha256)
    except OtherWeightsError as error:
        raise _trained_on_others(info, path, config, seed, error.found) from error
    dim, wanted = remove_heads(network), info.feature_dim
    if info.stages:
        wanted = dict(zip(info.stages.names, info.stages.widths, strict=True)).get("last", dim)
    if dim != wanted:
        raise CacheError(
            f"{path} is for {wanted} features, {info.backbone} gives {dim}: run train-head again"
        )
    return frozen(network, info.stages)


def _own_network(info: BackboneInfo, path: Path, own: OwnNetwork | None) -> nn.Module:
    """The module that a head was trained on, which has to be given."""
    if own is None:
        raise UserError(
            f"{path} was trained on features of {info.backbone}, a module given in Python, which "
            f"cannot be rebuilt from its name: in Python, Classifier.load({str(path)!r}, "
            "backbone=module)"
        )
    try:
        return own.load(info)
    except OtherWeightsError as error:
        raise CacheError(
            f"{path} was trained on tensors with sha256 {info.weights_sha256}, but those of the "
            f"module given have {error.found}: give the module that made the features"
        ) from error


def _find_weights(info: BackboneInfo, path: Path) -> str:
    """What `--weights` would be; weights files are sought here and beside the head."""
    if not is_file(info.weights):
        named = None if info.backbone.startswith(TIMM) else info.weight_set
        return named or info.weights  # torchvision may have another default by now
    name = Path(info.weights).name
    there = [p for p in (Path(name), path.parent / name) if name and p.is_file()]
    right = [p for p in there if file_sha256(p) == info.weights_sha256]
    if not there:
        raise UserError(
            f"{path} needs the weights file {name} (sha256 {info.weights_sha256}), which is "
            f"neither here nor in {path.parent}: add --weights FILE"
        )
    return str((right or there)[0])


def _trained_on_others(
    info: BackboneInfo, path: Path, config: BackboneConfig, seed: int, found: str
) -> CacheError:
    what = config.weights if is_file(config.weights) else f"--weights {config.weights}"
    advice = "give the file that it was trained on as --weights FILE, or run train-head again"
    if config.weights == "random":
        what = f"the random weights that --seed {seed} draws here"
        same = info.weights == "random"
        advice = "give extract-features' --seed" if same else "leave --weights out"
    return CacheError(
        f"{path} was trained on weights {info.weights} with sha256 {info.weights_sha256}, but "
        f"that of {what} is {found}: {advice}"
    )


def _load_model(file: TensorFile) -> LoadedClassifier:
    path, card = file.path, model_card(file)
    _check_backbone(card.backbone, path)
    network = _model_network(file, card)
    head = _wide_head(network, card) if card.stages else None
    return LoadedClassifier(
        path=path,
        kind="model",
        network=frozen(network, card.stages),
        head=head,
        class_names=card.class_names,
        preprocessing=card.preprocessing,
        backbone=card.backbone,
        dtype="float32",
        precision="float32",
        scores=card.scores,
        provenance=card.provenance,
        task=card.task,
    )


def _model_network(file: TensorFile, card: ModelCard) -> nn.Module:
    """The whole classifier with the tensors of a model file."""
    path, num_classes = file.path, len(card.class_names)
    config = BackboneConfig(
        backbone=card.backbone,
        weights="random",
        image_px=card.preprocessing.image_px,
        device="cpu",
    )
    network, tensors = build_classifier(config, num_classes, 0), file.tensors()
    try:
        if card.stages is not None:
            _widen(network, tensors, card.stages.num_columns)
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} is a damaged model, its tensors are not those of a {card.backbone} with "
            f"{num_classes} classes: write it again with finetune"
        ) from error
    bad = not_finite(network.state_dict())
    if bad is not None:
        raise UserError(
            f"{path} is a damaged model, {bad} has values that are not finite: write it again with "
            "finetune"
        )
    return network


def _widen(network: nn.Module, tensors: State, num_columns: int) -> None:
    """Give a network a head as wide as that in a file.

    Raises:
        RuntimeError: The file's head is not as wide as the file says.
    """
    import torch

    name, _ = head_of(network)
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != num_columns:
        raise RuntimeError(f"{name} is not {num_columns} wide")
    network.set_submodule(name, torch.nn.Linear(num_columns, len(weight)))


def _wide_head(network: nn.Module, card: ModelCard) -> LinearHead:
    """The head of a model whose head takes columns of all stages; it leaves the network."""
    _, layer = head_of(network)
    remove_heads(network)
    return LinearHead.from_linear(
        cast("nn.Linear", layer),
        card.class_names,
        solver="finetune",
        scores=card.scores,
        provenance=card.provenance,
        decision=_decision(card.task, len(card.class_names)),
    )


def _decision(task: Task, num_classes: int) -> Decision:
    """How a fine-tuned model's logits become probabilities and a class."""
    if task == "multilabel":
        return Decision(task=task, label_thresholds=(LABEL_THRESHOLD,) * num_classes)
    return PLAIN


class ClassifierOrigin(TypedDict):
    """What classifies and what it was made from; `preprocessing` is a `config.Preprocessing`."""

    kind: str
    file: str
    backbone: str
    solver: str | None
    preprocessing: JsonObject
    decision: JsonObject
    scores: JsonObject
    trained_on: JsonObject


def origin_of(trained: LoadedClassifier) -> ClassifierOrigin:
    """What classifies and what it was made from, as JSON for reports and exported files."""
    return {
        "kind": trained.kind,
        "file": trained.path.name,
        "backbone": trained.backbone,
        "solver": trained.head.solver if trained.head else None,
        "preprocessing": trained.preprocessing.to_dict(),
        "decision": trained.decision.to_json(),
        "scores": trained.scores,
        "trained_on": trained.provenance,
    }

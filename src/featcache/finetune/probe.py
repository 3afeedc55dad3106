"""Where a head starts: from a file, or from a linear probe fitted in memory.

A random head sends large, aimless gradients into the backbone during the first steps and spoils
what it knows; a head that already fits the frozen features does not.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.backbone import WeightsFile
from featcache.config import BackboneInfo, Preprocessing, flatten
from featcache.data import iterate_batches
from featcache.data.sampling import held_out_rows, stratified_rows
from featcache.errors import UserError, listed
from featcache.finetune.images import Images
from featcache.finetune.loop import Machine
from featcache.finetune.parts import Parts
from featcache.finetune.plan import EVAL_BATCH_SIZE

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD_FORMAT = ("featcache-head", "1")
MAX_PROBE_ROWS = 20_000
"""More rows hardly move a starting point, and their features would have to fit in memory."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of C to choose from, on features scaled to unit variance overall."""
CHOICE_SHARE = 0.2

Float32 = NDArray[np.float32]


def set_head(head: nn.Module, weight: Float32, bias: Float32) -> None:
    """Copy weight [C, D] and bias [C] into a linear head."""
    import torch

    with torch.no_grad():
        for name, values in (("weight", weight), ("bias", bias)):
            parameter = head.get_parameter(name)
            parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))


def frozen_features(parts: Parts, images: Images, prep: Preprocessing, machine: Machine) -> Float32:
    """What enters the head, for every image, the network in eval mode: float32 [N, D]."""
    import torch

    caught: list[torch.Tensor] = []
    handle = parts.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    features = np.empty((len(images), parts.head_width()), np.float32)
    parts.model.eval()
    batches = iterate_batches(
        images.source, np.arange(len(images)), EVAL_BATCH_SIZE, prep, workers=machine.workers
    )
    try:
        with torch.inference_mode():
            for pixels, _, rows in batches:
                parts.model(machine.inputs(pixels, prep))
                features[rows] = caught.pop().float().cpu().numpy()
    finally:
        handle.remove()
    return features


def fit_probe(
    parts: Parts, images: Images, prep: Preprocessing, machine: Machine, num_classes: int
) -> dict[str, float]:
    """Start the head from logistic regression on the frozen features of the train images.

    The regularisation is chosen on a held-out fifth of these images, then all of them are fitted.

    Returns:
        What was chosen: the strength C and the number of images.
    """
    seed = parts.plan.seed
    if len(images) > MAX_PROBE_ROWS:
        split = images.split
        rows = stratified_rows(split.ids, split.labels, MAX_PROBE_ROWS, seed=seed, purpose="probe")
        images = images.subset(rows, "train")
    features, labels = frozen_features(parts, images, prep, machine), images.split.labels
    # One scale for all: scaling each feature by itself would blow up those that hardly vary here
    # but begin to once the backbone moves.
    mean = features.mean(0)
    scale = max(float((features - mean).std()), 1e-6)
    scaled = (features - mean) / scale
    strength = _choose_strength(scaled, images, seed)
    weight, bias = _fit(scaled, labels, strength, num_classes)
    # Fold the scaling into the head: w · (x - m) / s + b = (w / s) · x + (b - (w / s) · m).
    weight = weight / np.float32(scale)
    set_head(parts.head, weight, bias - weight @ mean)
    return {"C": strength, "num_images": len(images)}


def _choose_strength(scaled: Float32, images: Images, seed: int) -> float:
    split = images.split
    num = round(CHOICE_SHARE * len(images))
    rows = held_out_rows(split, num, seed=seed, purpose="probe-choice")
    rest = np.setdiff1d(np.arange(len(images)), rows)
    num_classes = int(split.labels.max()) + 1
    if len(rows) == 0 or len(np.unique(split.labels[rest])) < 2:
        return STRENGTHS[1]
    scores = []
    for strength in STRENGTHS:
        weight, bias = _fit(scaled[rest], split.labels[rest], strength, num_classes)
        logits = scaled[rows] @ weight.T + bias
        scores.append(float((logits.argmax(1) == split.labels[rows]).mean()))
    return STRENGTHS[int(np.argmax(scores))]  # the strongest regularisation among equals


def _fit(
    scaled: Float32, labels: NDArray[np.int64], strength: float, num_classes: int
) -> tuple[Float32, Float32]:
    """Multinomial logistic regression; classes without a row get no weight and a low bias."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weight = np.zeros((num_classes, scaled.shape[1]), np.float32)
    bias = np.full(num_classes, -10.0, np.float32)
    solver = LogisticRegression(C=strength, max_iter=200)
    with warnings.catch_warnings():
        # A starting point need not be the optimum.
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(scaled, labels)
    if len(solver.classes_) == 2:  # scikit-learn keeps one row of weights for two classes
        rows = np.concatenate([-solver.coef_, solver.coef_]) / 2
        biases = np.concatenate([-solver.intercept_, solver.intercept_]) / 2
    else:
        rows, biases = solver.coef_, solver.intercept_
    weight[solver.classes_], bias[solver.classes_] = rows, biases
    return weight, bias


def init_from_file(
    parts: Parts, file: WeightsFile, info: BackboneInfo, class_names: list[str]
) -> None:
    """Start the head from a file that train-head wrote.

    Raises:
        UserError: Not a linear head, or one for other classes or another network.
    """
    path, metadata = file.path, file.metadata
    is_head = (metadata.get("format"), metadata.get("version")) == HEAD_FORMAT
    if not is_head or not {"weight", "bias"} <= file.state.keys():
        raise UserError(f"--init-head {path} is no linear head: give one that train-head wrote")
    try:
        rest = json.loads(metadata["head"])
        names, theirs = rest["class_names"], flatten(rest["provenance"]["backbone"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--init-head {path} is damaged: run train-head again") from error
    if names != class_names:
        raise UserError(
            f"--init-head {path} is for {_some(names)}, the dataset has "
            f"{_some(class_names)}: train a head on a cache of this dataset"
        )
    ours = flatten(json.loads(json.dumps(dataclasses.asdict(info))))
    for name in sorted(ours.keys() | theirs.keys()):
        if name != "weights" and ours.get(name) != theirs.get(name):
            raise UserError(
                f"--init-head {path} is for features with {name} {theirs.get(name)!r:.80}, this "
                f"run has {ours.get(name)!r:.80}: give the same --weights and preprocessing"
            )
    weight, bias = (file.state[name].float().numpy() for name in ("weight", "bias"))
    if weight.shape != (len(class_names), info.feature_dim) or bias.shape != (len(class_names),):
        raise UserError(f"--init-head {path} is damaged: shapes {weight.shape}, {bias.shape}")
    set_head(parts.head, weight, bias)


def _some(names: list[str]) -> str:
    """How many classes, and the first ones."""
    return f"{len(names)} classes ({listed([str(name) for name in names], 4)[:200]})"

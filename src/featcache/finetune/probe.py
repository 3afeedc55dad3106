"""Where a head starts: from a file, or from a linear probe fitted in memory.

A random head sends large, aimless gradients into the backbone during the first steps and spoils
what it knows; a head that already fits the frozen features does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.config import BackboneInfo, Preprocessing
from featcache.data import iterate_batches
from featcache.data.sampling import held_out_rows, stratified_rows
from featcache.errors import CacheError, UserError, listed
from featcache.finetune.loop import Images, Placement
from featcache.finetune.trainable import EVAL_BATCH_SIZE, TrainableModel
from featcache.heads import LinearHead, check_head_fits
from featcache.heads.files import parse_head
from featcache.heads.linear import Floats
from featcache.tensor_files import TensorFile

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_PROBE_ROWS = 20_000
"""More rows hardly move a starting point, and their features would have to fit in memory."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of C to choose from, on features scaled to unit variance overall."""
CHOICE_SHARE = 0.2

Float32 = NDArray[np.float32]


def set_head(head: nn.Module, weight: Floats, bias: Floats) -> None:
    """Copy weight [C, D] and bias [C] into the network's head."""
    import torch

    with torch.no_grad():
        for name, values in (("weight", weight), ("bias", bias)):
            parameter = head.get_parameter(name)
            parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))


def frozen_features(
    trainable: TrainableModel, images: Images, prep: Preprocessing, placement: Placement
) -> Float32:
    """What enters the head, for every image, the network in eval mode: float32 [N, D]."""
    import torch

    caught: list[torch.Tensor] = []
    handle = trainable.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    features = np.empty((len(images), trainable.head_width()), np.float32)
    trainable.model.eval()
    batches = iterate_batches(
        images.source, np.arange(len(images)), EVAL_BATCH_SIZE, prep, workers=placement.workers
    )
    try:
        with torch.inference_mode():
            for pixels, _, rows in batches:
                trainable.model(placement.inputs(pixels, prep))
                features[rows] = caught.pop().float().cpu().numpy()
    finally:
        handle.remove()
    return features


def fit_probe(
    trainable: TrainableModel,
    images: Images,
    prep: Preprocessing,
    placement: Placement,
    num_classes: int,
) -> dict[str, float]:
    """Start the head from logistic regression on the frozen features of the train images.

    The regularisation is chosen on a held-out fifth of these images, then all of them are fitted.

    Returns:
        What was chosen: the strength C and the number of images.
    """
    seed = trainable.recipe.seed
    if len(images) > MAX_PROBE_ROWS:
        split = images.split
        rows = stratified_rows(split.ids, split.labels, MAX_PROBE_ROWS, seed=seed, purpose="probe")
        images = images.subset(rows, "train")
    features, labels = frozen_features(trainable, images, prep, placement), images.split.labels
    # One scale for all: scaling each feature by itself would blow up those that hardly vary here
    # but begin to once the backbone moves.
    mean = features.mean(0)
    scale = max(float((features - mean).std()), 1e-6)
    scaled = (features - mean) / scale
    strength = _choose_strength(scaled, images, seed)
    weight, bias = _fit(scaled, labels, strength, num_classes)
    # Fold the scaling into the head: w · (x - m) / s + b = (w / s) · x + (b - (w / s) · m).
    weight = weight / np.float32(scale)
    set_head(trainable.head, weight, bias - weight @ mean)
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
    from featcache.heads.estimator import FeatureHeadClassifier

    weight = np.zeros((num_classes, scaled.shape[1]), np.float32)
    bias = np.full(num_classes, -10.0, np.float32)
    fitted = FeatureHeadClassifier(strength=strength).fit(scaled, labels)
    weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return weight, bias


def head_to_start_from(file: TensorFile, info: BackboneInfo, class_names: list[str]) -> LinearHead:
    """The head in a file that train-head wrote, for this network and these classes.

    Raises:
        UserError: Not a linear head, or one for other classes or another network.
    """
    head = parse_head(file)
    if not isinstance(head, LinearHead):
        raise UserError(f"--init-head {file.path} is a knn head: give a linear one")
    if head.class_names != class_names:
        raise UserError(
            f"--init-head {file.path} is for {_some(head.class_names)}, the dataset has "
            f"{_some(class_names)}: train a head on a cache of this dataset"
        )
    try:
        check_head_fits(head, info)
    except CacheError as error:
        raise UserError(f"--init-head {file.path}: {error}") from error
    return head


def _some(names: list[str]) -> str:
    """How many classes, and the first ones."""
    return f"{len(names)} classes ({listed(names, 4)[:200]})"

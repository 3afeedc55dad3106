"""Where a head starts: from a file, or from a linear probe fitted in memory.

A random head sends large, aimless gradients into the backbone during the first steps and destroys
what it has learned; a head that already fits the frozen features does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.config import BackboneInfo
from featcache.data.sampling import held_out_rows, stratified_rows
from featcache.errors import CacheError, UserError, listed
from featcache.finetune.samples import Placement, Samples
from featcache.finetune.trainable import TrainableModel
from featcache.heads import LinearHead, check_head_fits
from featcache.heads.features import Floats
from featcache.heads.files import parse_head
from featcache.heads.solvers.logistic import SELECTION_TOLERANCE, LogisticPath, LogisticProblem
from featcache.heads.training_data import Rows
from featcache.tensor_files import TensorFile

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_PROBE_ROWS = 20_000
"""More rows hardly move a starting point, and their features would have to fit in memory."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of C to choose from, on features scaled to unit variance overall."""
CHOICE_SHARE = 0.2
ABSENT_BIAS = -10.0
LEAST_SCALE = 0.1
"""Of a column's scale, in medians of all: what hardly varies would be blown up."""

Float32 = NDArray[np.float32]


def set_head(head: nn.Module, weight: Floats, bias: Floats, **buffers: Floats) -> None:
    """Copy weight [C, D], bias [C] and buffers by name into the network's head."""
    import torch

    tensors = head.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, values in ({"weight": weight, "bias": bias} | buffers).items():
            tensors[name].copy_(torch.from_numpy(values).reshape(tensors[name].shape))


def frozen_features(trainable: TrainableModel, samples: Samples, placement: Placement) -> Float32:
    """The head's input for every sample, with the network in eval mode: float32 [N, D]."""
    import torch

    caught: list[torch.Tensor] = []
    handle = trainable.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    features = np.zeros((len(samples), trainable.head_width()), np.float32)
    trainable.model.eval()
    try:
        with torch.inference_mode():
            for raw, _, rows in samples.all_batches(placement):
                trainable.network(samples.inputs(raw, placement))
                features[rows] = caught.pop().float().cpu().numpy()
    finally:
        handle.remove()
    return placement.team.gathered(features)


def fit_probe(
    trainable: TrainableModel, samples: Samples, placement: Placement, num_classes: int
) -> dict[str, float]:
    """Start the head from logistic regression on the frozen features of the train images.

    The regularization is chosen on a held-out fifth of these images, then all of them are fitted.
    Classes without an image get no weight and a low bias. Several labels per image are fitted one
    by one, all with the same middling regularization.

    Returns:
        What was chosen: the strength C and the number of images.
    """
    seed = trainable.recipe.seed
    if len(samples) > MAX_PROBE_ROWS:
        split = samples.split
        rows = stratified_rows(split.ids, split.labels, MAX_PROBE_ROWS, seed=seed, purpose="probe")
        samples = samples.subset(rows, "train")
    features = frozen_features(trainable, samples, placement)
    mean = features.mean(0)
    scale = _scale(trainable, features - mean)
    scaled = (features - mean) / scale
    weight = np.zeros((num_classes, len(mean)), np.float32)
    bias = np.full(num_classes, ABSENT_BIAS, np.float32)
    if samples.split.targets is None:
        strength = _choose_strength(scaled, samples, seed, num_classes)
        probe = _path(scaled, samples.split.labels, num_classes).fit(strength).head
        present = np.unique(samples.split.labels)
        weight[present], bias[present] = probe.weight[present], probe.bias[present]
    else:
        strength = STRENGTHS[1]
        for label, column in enumerate(samples.split.targets.T):
            if column.min() < column.max():
                probe = _path(scaled, column.astype(np.int64), 2).fit(strength).head
                weight[label] = probe.weight[1] - probe.weight[0]
                bias[label] = probe.bias[1] - probe.bias[0]
    if trainable.recipe.all_stages:
        set_head(trainable.head, weight, bias, mean=mean, scale=scale)
    else:
        # Fold the scaling into the head: w · (x - m) / s + b = (w / s) · x + (b - (w / s) · m).
        weight /= scale
        set_head(trainable.head, weight, bias - weight @ mean)
    return {"C": strength, "num_images": len(samples)}


def _scale(trainable: TrainableModel, centered: Float32) -> Float32:
    """What to divide centered features [N, D] by, [D].

    One scale for all of a last layer: scaling each feature by itself would blow up those that
    hardly vary here but begin to once the backbone moves. Columns of several stages differ more in
    scale than that.
    """
    each = centered.std(axis=0)
    if trainable.recipe.all_stages:
        return np.asarray(np.maximum(each, LEAST_SCALE * np.median(each) + 1e-6), np.float32)
    return np.full_like(each, max(float(centered.std()), 1e-6))


def _choose_strength(scaled: Float32, samples: Samples, seed: int, num_classes: int) -> float:
    labels = samples.split.labels
    num = round(CHOICE_SHARE * len(samples))
    held = held_out_rows(samples.split, num, seed=seed, purpose="probe-choice")
    rest = np.setdiff1d(np.arange(len(samples)), held)
    if len(held) == 0 or len(np.unique(labels[rest])) < 2:
        return STRENGTHS[1]
    path = _path(scaled[rest], labels[rest], num_classes)
    heads = (path.fit(strength, SELECTION_TOLERANCE).head for strength in STRENGTHS)
    scores = [float(np.mean(head.predict(scaled[held]) == labels[held])) for head in heads]
    return STRENGTHS[int(np.argmax(scores))]  # the strongest regularization among equals


def _path(scaled: Float32, labels: NDArray[np.int64], num_classes: int) -> LogisticPath:
    """Fits of logistic regression to these rows."""
    names = [str(number) for number in range(num_classes)]
    weights = np.ones(len(labels))
    rows = Rows(views=scaled[None], y=labels, weights=weights, class_names=names)
    return LogisticPath(LogisticProblem(rows), standardize=False)


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

"""A whole classifier as one torch module: normalization, backbone, head, probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from featcache.heads import Head, KnnHead
from featcache.heads.solvers.knn import SMALLEST_SHARE, TEMPERATURE
from featcache.predict import LoadedClassifier


class ClassifierGraph(nn.Module):
    """Pictures to logits and probabilities, both float32 [N, C].

    Args:
        trained: The classifier.
        takes_pixels: Whether the input is uint8 [N, H, W, 3]; otherwise it is float32
            [N, 3, H, W], already normalized.
    """

    def __init__(self, trained: LoadedClassifier, takes_pixels: bool) -> None:
        super().__init__()
        self.network = trained.network
        self.head = head_layer(trained.head) if trained.head else nn.Identity()
        self.decision = trained.decision
        self.takes_pixels = takes_pixels
        prep = trained.preprocessing
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(prep.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(prep.std).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Classify; see the class."""
        if self.takes_pixels:
            scaled = pictures.permute(0, 3, 1, 2).to(torch.float32) / 255
            pictures = (scaled - self.mean) / self.std
        logits: Tensor = self.head(self.network(pictures))
        scaled = logits / self.decision.temperature
        if self.decision.task == "regression":
            return logits, logits.clone()  # an output of its own
        return logits, scaled.sigmoid() if self.decision.task == "multilabel" else scaled.softmax(1)


def head_layer(head: Head) -> nn.Module:
    """A head as a module from float32 features [N, D] to logits [N, C]."""
    return KnnLayer(head) if isinstance(head, KnnHead) else head.to_linear().float()


class KnnLayer(nn.Module):
    """The neighbors' votes of a `KnnHead`, as logarithms of their shares."""

    def __init__(self, head: KnnHead) -> None:
        super().__init__()
        rows = np.asarray(head.rows, np.float32)
        self.cosine, self.k = head.metric == "cosine", min(head.k, len(rows))
        center = np.zeros_like(rows[0]) if self.cosine else rows.mean(0, dtype=np.float64)
        weights = np.ones(len(rows)) if head.row_weights is None else head.row_weights
        self.center: Tensor
        self.rows: Tensor
        self.squares: Tensor
        self.labels: Tensor
        self.weights: Tensor
        self.classes: Tensor
        self.register_buffer("center", torch.from_numpy(np.asarray(center, np.float32)))
        self.register_buffer("rows", self._ready(torch.from_numpy(rows)))
        self.register_buffer("squares", self.rows.square().sum(1))
        self.register_buffer("labels", torch.from_numpy(np.array(head.labels)))
        self.register_buffer("weights", torch.from_numpy(np.asarray(weights, np.float32)))
        self.register_buffer("classes", torch.arange(len(head.class_names)))

    def _ready(self, features: Tensor) -> Tensor:
        """Of unit length (zeros stay zeros), or about the rows' mean."""
        if not self.cosine:
            return features - self.center
        length = features.square().sum(1, keepdim=True).sqrt()
        return features / torch.where(length > 0, length, torch.ones_like(length))

    def forward(self, features: Tensor) -> Tensor:
        """Logarithms of the shares of votes [N, C] for features [N, D]."""
        query = self._ready(features)
        closeness = query @ self.rows.T
        if self.cosine:
            top, index = closeness.topk(self.k, dim=1)
            log_votes = top / TEMPERATURE
        else:
            _, index = (2 * closeness - self.squares).topk(self.k, dim=1)
            distance = (query[:, None] - self.rows[index]).square().sum(2).sqrt()
            own = query.square().sum(1, keepdim=True)
            numbers = torch.finfo(torch.float32)
            floor = numbers.eps * (own + self.squares.max()).sqrt() + numbers.tiny
            log_votes = -torch.maximum(distance, floor).log()
        votes = (log_votes - log_votes.amax(1, keepdim=True)).exp() * self.weights[index]
        by_class = (self.labels[index][:, :, None] == self.classes) * votes[:, :, None]
        shares = by_class.sum(1) / votes.sum(1, keepdim=True)
        return shares.clamp(min=SMALLEST_SHARE).log()

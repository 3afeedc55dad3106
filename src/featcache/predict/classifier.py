"""A trained classifier on new images: `Classifier.load(path).predict(pictures)`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from featcache.backbone import OwnNetwork
from featcache.config import PredictConfig, Preprocessing, Views
from featcache.config.settings import python_errors
from featcache.data import BadImage, ImageSplit
from featcache.engine import EngineSettings
from featcache.engine.inference import computed_rows
from featcache.errors import UserError
from featcache.heads import KnnHead, softmax
from featcache.predict.load import LoadedClassifier, load_classifier
from featcache.predict.pictures import Picture, split_of
from featcache.runtime import StageTimer, pick_device, say, torch_threads_kept

if TYPE_CHECKING:
    from torch import nn

    from featcache.engine import Engine

Row = NDArray[np.float32]
# Neighbors of many images are found together: the train rows are read once for all of them.
KNN_ROWS = 512
# For all classifiers, since a lock cannot be pickled; engines are built one at a time anyway.
_CHOOSING = threading.Lock()


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image.

    Attributes:
        label: The likeliest class.
        probability: Of that class.
        topk: The likeliest classes with their probabilities, likeliest first.
    """

    label: str
    probability: float
    topk: tuple[tuple[str, float], ...]


class Classifier:
    """A head with its backbone, or a fine-tuned model, ready for images.

    Several threads may use one; it pickles, and chooses its engine again where it arrives.

    Example:
        classifier = Classifier.load("cache/pets.logistic.safetensors")
        for prediction in classifier.predict(["cat.jpg", Image.open("dog.jpg")]):
            print(prediction.label, prediction.probability)

    Args:
        trained: From `load_classifier`.
        device: auto, cpu, cuda or mps.
        batch_size: Images per forward pass; measured unless given.
        workers: Threads; one per core unless given.
    """

    def __init__(
        self,
        trained: LoadedClassifier,
        *,
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.trained = trained
        with python_errors(PredictConfig):
            asked = EngineSettings(
                backbone=trained.backbone, device=device, batch_size=batch_size, workers=workers
            )
            precision = _precision(trained, pick_device(device))
        self._settings = dataclasses.replace(asked, precision=precision)
        self._engine: Engine | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: str | None = None,
        seed: int = 42,
        backbone: nn.Module | None = None,
        **how: Any,
    ) -> Self:
        """Read a file that train-head or finetune wrote.

        Args:
            path: The file.
            weights: The backbone's weights file, if it lies neither here nor beside the head.
            seed: Draws the backbone's weights, if the head was trained on random ones.
            backbone: The module that made the head's features, if it was given in Python.
            **how: device, batch_size and workers.

        Raises:
            UserError: The file is missing, damaged or of another kind.
            CacheError: The weights are not those that the head was trained on.
        """
        with python_errors(PredictConfig):
            own = None if backbone is None else OwnNetwork.of(backbone)
            trained = load_classifier(Path(path), weights=weights, seed=seed, own=own)
        return cls(trained, **how)

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes, in the order of `predict_proba`'s columns."""
        return list(self.trained.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the network's input."""
        return self.trained.preprocessing

    @property
    def provenance(self) -> dict[str, Any]:
        """What the classifier was made from."""
        return self.trained.provenance

    def predict(self, pictures: Picture | Iterable[Picture], topk: int = 1) -> list[Prediction]:
        """Classify images.

        Args:
            pictures: One or many: paths, PIL images of any mode, files' bytes, files opened in
                binary mode, or arrays uint8 [H, W], [H, W, C] or [N, H, W, C] with C of 1, 3 (RGB)
                or 4 (RGBA).
            topk: Number of likeliest classes to return.

        Returns:
            One prediction per image, in order.

        Raises:
            UserError: An image cannot be read.
        """
        return [self.prediction(row, topk) for row in self.predict_proba(pictures)]

    def predict_proba(self, pictures: Picture | Iterable[Picture]) -> NDArray[np.float32]:
        """Probabilities [N, C] of images; `predict` describes `pictures`.

        Raises:
            UserError: An image cannot be read.
        """
        split = split_of(pictures)
        return _filled(split, self.stream(split), len(self.trained.class_names))

    def features(self, pictures: Picture | Iterable[Picture]) -> NDArray[np.float32]:
        """Features [N, D] of images, as a cache would store them; `predict` describes `pictures`.

        Raises:
            UserError: An image cannot be read, or this is a fine-tuned model.
        """
        head = self.trained.head
        if head is None:
            raise UserError(
                f"{self.trained.path} is a fine-tuned model, which gives classes only: load a "
                "head that train-head wrote for features"
            )
        split = split_of(pictures)
        with torch_threads_kept():
            rows = _filled(split, self._outputs(split, StageTimer()), head.feature_dim)
        return self._as_cached(rows)

    def prediction(self, probabilities: Row, topk: int = 1) -> Prediction:
        """Name the likeliest classes of one row of probabilities [C]."""
        order = np.argsort(-probabilities, kind="stable")[: max(1, topk)]
        names = self.trained.class_names
        best = tuple((names[c], float(probabilities[c])) for c in order)
        return Prediction(best[0][0], best[0][1], best)

    def engine(self, num_images: int) -> Engine:
        """The engine that runs the network; chosen on first use, measured for many images."""
        from featcache.engine import choose_engine

        with _CHOOSING:
            if self._engine is None:
                trained = self.trained
                self._engine = choose_engine(
                    self._settings, trained.network, trained.preprocessing, num_images=num_images
                )
            return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def stream(
        self, split: ImageSplit, timer: StageTimer | None = None
    ) -> Generator[tuple[int, Row | BadImage], None, None]:
        """Classify the images of a split in order, in bounded memory.

        Args:
            split: The images.
            timer: Records seconds by stage.

        Yields:
            The row, and its probabilities [C] or the reason why there are none.
        """
        timer = timer or StageTimer()
        together = KNN_ROWS if isinstance(self.trained.head, KnnHead) else 1
        with torch_threads_kept():
            outputs = self._outputs(split, timer)
            while group := list(islice(outputs, together)):
                good = [row for _, row in group if not isinstance(row, BadImage)]
                probabilities = iter(self._probabilities(np.stack(good)) if good else ())
                for index, row in group:
                    yield index, row if isinstance(row, BadImage) else next(probabilities)

    def _outputs(
        self, split: ImageSplit, timer: StageTimer
    ) -> Generator[tuple[int, Row | BadImage], None, None]:
        """The network's output for every image, computed as extraction computes it."""
        with timer("choose_engine"):
            engine = self.engine(len(split))
        rows, prep = range(len(split)), self.trained.preprocessing
        for index, row in computed_rows(engine, split, rows, prep, Views(), timer):
            yield index, row if isinstance(row, BadImage) else row[0]

    def _probabilities(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities [n, C] of features [n, D], or of logits [n, C]."""
        head = self.trained.head
        if head is None:
            return np.asarray(softmax(outputs), np.float32)
        return np.asarray(head.predict_proba(self._as_cached(outputs)), np.float32)

    def _as_cached(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features rounded as those that the head was trained on."""
        half = self.trained.dtype == "float16"
        return features.astype(np.float16).astype(np.float32) if half else features


def _filled(
    split: ImageSplit, stream: Generator[tuple[int, Row | BadImage], None, None], width: int
) -> NDArray[np.float32]:
    """Every image's row, [N, width].

    Raises:
        UserError: An image cannot be read.
    """
    rows = np.zeros((len(split), width), np.float32)
    with contextlib.closing(stream):
        for index, row in stream:
            if isinstance(row, BadImage):
                raise UserError(f"{split.ids[index]}: {row}; repair it or leave it out")
            rows[index] = row
    return rows


def _precision(trained: LoadedClassifier, device: str) -> Literal["float32", "amp"]:
    """How to compute, so that the features are those that the head was trained on.

    An int8 network cannot be rebuilt: it was calibrated on train images, which are not here.
    """
    if trained.precision == "amp" and device == "cuda":
        return "amp"
    if trained.precision != "float32":
        say(
            f"the head was trained on features in {trained.precision}; they are computed in "
            "float32 here, so probabilities can differ a little"
        )
    return "float32"

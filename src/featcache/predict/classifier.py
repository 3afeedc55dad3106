"""A trained classifier on new images: `Classifier.load(path).predict(pictures)`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.backbone import OwnNetwork
from featcache.config import JsonObject, PredictConfig, Preprocessing, Views
from featcache.config.settings import python_errors
from featcache.data import BadImage, ImageSplit
from featcache.display import Facts, say
from featcache.engine import EngineSettings
from featcache.engine.inference import computed_rows
from featcache.errors import UserError, listed
from featcache.heads import KnnHead
from featcache.heads.linear import KnownRows
from featcache.predict.load import LoadedClassifier, load_classifier
from featcache.predict.pictures import Picture, split_of
from featcache.runtime import StageTimer, pick_device, torch_threads_kept

if TYPE_CHECKING:
    from torch import nn

    from featcache.engine import Engine

T = TypeVar("T")
Row = NDArray[np.float32]
UNKNOWN = "unknown"
"""The label of images that are rejected."""
# Neighbors of many images are found together: the train rows are read once for all of them.
KNN_ROWS = 512
# For all classifiers, since a lock cannot be pickled; engines are built one at a time anyway.
_CHOOSING = threading.Lock()


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image.

    Attributes:
        label: The likeliest class or, of a head with a threshold, the one that the threshold says.
        probability: Of that class.
        topk: That class, then the likeliest others, with their probabilities.
        p_value: How usual the image is among held-out train images, if `reject` was given: of
            images like those, a share of p has a value of at most p.
        unknown: Whether the p-value is at most `reject`: the image may belong to none of the
            classes. Then `label` is "unknown", and the rest is as without `reject`.
        labels: Of a classifier with several labels per image, those that the image has; `label`
            joins them, and `topk` has the probability of each label by itself.
        value: Of a classifier that predicts a number; `label` is the number as text, `probability`
            is not a number, and `topk` is empty.
    """

    label: str
    probability: float
    topk: tuple[tuple[str, float], ...]
    p_value: float | None = None
    unknown: bool = False
    labels: tuple[str, ...] | None = None
    value: float | None = None


class Classifier(Facts):
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

    def _facts(self) -> dict[str, object]:
        return {
            "file": self.trained.path,
            "what": self.trained.describe(),
            "classes": f"{len(self.class_names)} ({listed(self.class_names, 5)})",
        }

    @property
    def class_names(self) -> list[str]:
        """Names of the C classes, in the order of `predict_proba`'s columns."""
        return list(self.trained.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the network's input."""
        return self.trained.preprocessing

    @property
    def provenance(self) -> JsonObject:
        """What the classifier was made from."""
        return self.trained.provenance

    def predict(
        self,
        pictures: Picture | Iterable[Picture],
        topk: int = 1,
        reject: float | None = None,
    ) -> list[Prediction]:
        """Classify images.

        Args:
            pictures: One or many: paths, PIL images of any mode, files' bytes, files opened in
                binary mode, or arrays uint8 [H, W], [H, W, C] or [N, H, W, C] with C of 1, 3 (RGB)
                or 4 (RGBA).
            topk: Number of likeliest classes to return.
            reject: Share of held-out train images that may be called unknown. An image is unknown
                if it is stranger than all but this share of them.

        Returns:
            One prediction per image, in order.

        Raises:
            UserError: An image cannot be read, or the classifier cannot tell unknown images.
        """
        split = split_of(pictures)
        with contextlib.closing(self.predictions(split, topk=topk, reject=reject)) as stream:
            return [readable(split, index, found) for index, found in stream]

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
        """Name the class of one row of probabilities [C], and the likeliest others.

        Of several labels, name those that the image has; of a number, the row is that number.
        """
        decision, names = self.trained.decision, self.trained.class_names
        if decision.task == "regression":
            value = float(probabilities[0])
            return Prediction(f"{value:g}", math.nan, (), value=value)
        order = np.argsort(-probabilities, kind="stable")
        if decision.threshold is not None:  # of two classes, maybe the less likely
            first = decision.classes(probabilities[None])[0]
            order = np.array([first, 1 - first])
        ranked = tuple((names[c], float(probabilities[c])) for c in order)
        best = ranked[: max(1, topk)]
        if decision.label_thresholds is not None:
            given = decision.has_labels(probabilities)
            labels = tuple(names[c] for c in order if given[c])
            return Prediction("|".join(labels), ranked[0][1], ranked, labels=labels)
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
        """Probabilities of the images of a split in order, in bounded memory.

        Args:
            split: The images.
            timer: Records seconds by stage.

        Yields:
            The row, and its probabilities [C] or the reason why there are none.
        """
        for index, row in self._classified(split, timer or StageTimer()):
            yield index, row if isinstance(row, BadImage) else row[1]

    def predictions(
        self,
        split: ImageSplit,
        timer: StageTimer | None = None,
        *,
        topk: int = 1,
        reject: float | None = None,
    ) -> Generator[tuple[int, Prediction | BadImage], None, None]:
        """Classify the images of a split in order, in bounded memory; arguments as for `predict`.

        Yields:
            The row, and its prediction or the reason why there is none.

        Raises:
            UserError: The classifier cannot tell unknown images.
        """
        with python_errors(PredictConfig):
            known = None if reject is None else self.known_rows(reject)
        for index, row in self._classified(split, timer or StageTimer()):
            if isinstance(row, BadImage):
                yield index, row
                continue
            features, probabilities = row
            found = self.prediction(probabilities, topk)
            if known is not None:
                given = probabilities.max(keepdims=True)
                p_value = float(known.p_values(self._as_cached(features[None]), given)[0])
                found = dataclasses.replace(found, p_value=p_value)
                if p_value <= (reject or 0):
                    found = dataclasses.replace(found, label=UNKNOWN, unknown=True)
            yield index, found

    def known_rows(self, reject: float) -> KnownRows:
        """What tells unknown images at this level.

        Raises:
            UserError: Nothing does, or too few rows were held out for it.
        """
        path, head = self.trained.path, self.trained.head
        if self.trained.decision.task != "multiclass":
            raise UserError(f"--reject is for one class per image: leave it out for {path}")
        known = None if head is None else head.known
        if known is None:
            what = "is a fine-tuned model" if head is None else "kept no held-out rows"
            raise UserError(
                f"--reject: {path} {what} and cannot tell unknown images: give a head that this "
                "version of train-head fitted to enough images"
            )
        if UNKNOWN in self.trained.class_names:
            raise UserError(f"--reject: {path} has a class {UNKNOWN!r}: leave --reject out")
        least = 1 / (len(known.strangeness) + 1)
        if not least <= reject < 1:
            raise UserError(
                f"--reject {reject:g}: {path} has {len(known.strangeness)} held-out rows to "
                f"compare with: give a share from {math.ceil(1000 * least) / 1000:g} to below 1"
            )
        return known

    def _classified(
        self, split: ImageSplit, timer: StageTimer
    ) -> Generator[tuple[int, tuple[Row, Row] | BadImage], None, None]:
        """Every image's output of the network, and its probabilities [C]."""
        together = KNN_ROWS if isinstance(self.trained.head, KnnHead) else 1
        with torch_threads_kept():
            outputs = self._outputs(split, timer)
            while group := list(islice(outputs, together)):
                good = [row for _, row in group if not isinstance(row, BadImage)]
                probabilities = iter(self._probabilities(np.stack(good)) if good else ())
                for index, row in group:
                    yield index, row if isinstance(row, BadImage) else (row, next(probabilities))

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
            return np.asarray(self.trained.decision.probabilities(outputs), np.float32)
        return np.asarray(head.predict_proba(self._as_cached(outputs)), np.float32)

    def _as_cached(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features rounded as those that the head was trained on."""
        half = self.trained.dtype == "float16"
        return features.astype(np.float16).astype(np.float32) if half else features


def readable(split: ImageSplit, index: int, found: T | BadImage) -> T:
    """What was found of an image.

    Raises:
        UserError: It cannot be read.
    """
    if isinstance(found, BadImage):
        raise UserError(f"{split.ids[index]}: {found}; repair it or leave it out")
    return found


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
            rows[index] = readable(split, index, row)
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

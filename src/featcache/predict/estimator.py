"""The frozen backbone as a scikit-learn transformer: pictures in, features out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.base import ClassNamePrefixFeaturesOutMixin as FeaturesOut
from sklearn.utils.validation import check_is_fitted

from featcache.backbone import OwnNetwork
from featcache.config import BackboneInfo, ExtractConfig, Preprocessing
from featcache.config.records import Pool, Resize
from featcache.config.settings import python_errors
from featcache.data import ImageDataset, ImageSplit
from featcache.errors import CacheError, UserError
from featcache.extract.request import Request
from featcache.predict.feature_store import CLASS, FeatureStore
from featcache.predict.pictures import Picture, split_of
from featcache.runtime import torch_threads_kept

if TYPE_CHECKING:
    from torch import nn

    from featcache.engine import Engine


class FeatureExtractor(FeaturesOut, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Features of pictures, for scikit-learn's pipelines.

    Features are kept in `cache_dir` by the sha256 of each picture's content, so no picture passes
    the network twice: not in cross-validation, not in a grid search, not in tomorrow's notebook.
    A row is used again only with the same weights (by their sha256), preprocessing and versions.

    Example:
        model = make_pipeline(FeatureExtractor(weights="bundled"), LogisticRegression())
        cross_val_score(model, paths, labels)

    Args:
        backbone: A network by name, as in `ExtractConfig`, or a torch module of your own.
        weights: As in `ExtractConfig`, like the settings that follow.
        image_px: Side of the network's input; by default what the weights were made for.
        resize: squash or crop; by default likewise.
        layers: Which outputs are the features.
        pool: How outputs of layers become columns.
        preprocessing: Of a module of your own; by default as for ImageNet at 224 px.
        device: auto, cpu, cuda or mps.
        batch_size: Images per forward pass; measured unless given.
        workers: Threads; one per core unless given.
        seed: Draws `random` weights.
        cache_dir: The folder for features; None keeps nothing, and every call computes.

    Attributes:
        backbone_: The network, its weights and preprocessing. After `fit`, others are refused.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        weights: str = "imagenet",
        *,
        image_px: int | None = None,
        resize: Resize | None = None,
        layers: str = "last",
        pool: Pool = "avg+std",
        preprocessing: Preprocessing | None = None,
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        seed: int = 42,
        cache_dir: str | os.PathLike[str] | None = "cache",
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.image_px = image_px
        self.resize = resize
        self.layers = layers
        self.pool = pool
        self.preprocessing = preprocessing
        self.device = device
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.cache_dir = cache_dir

    def fit(self, X: Iterable[Picture], y: object = None) -> Self:
        """Find the network and its weights; pictures are not looked at and nothing is learned.

        Args:
            X: N pictures, as `transform` takes them.
            y: Not used.

        Raises:
            UserError: A setting is wrong, or X are not pictures.
        """
        _pictures(X)
        self.backbone_: BackboneInfo = self._request().meta.backbone
        self._n_features_out = self.backbone_.feature_dim
        self._engines: list[Engine] = []  # the one that transform chooses
        return self

    def transform(self, X: Iterable[Picture]) -> NDArray[np.float32]:
        """Features [N, D] of pictures, float32.

        Args:
            X: N pictures in a list, an array or a pandas column: paths, PIL images, files' bytes,
                or arrays uint8 [H, W] or [H, W, C]; the first axis of an array counts pictures.

        Raises:
            UserError: A picture cannot be read.
            CacheError: The weights are not those that `fit` found.
        """
        check_is_fitted(self)
        split, request = _pictures(X), self._request()
        if request.meta.backbone != self.backbone_:
            raise CacheError(
                f"weights {request.meta.backbone.weights} are not those that fit() found: they "
                "have changed since, or a setting has; call fit() again"
            )
        with python_errors(ExtractConfig), torch_threads_kept(), self._folder(request) as folder:
            store = FeatureStore(folder, request.meta)
            return store.features(split, lambda num: self._engine_for(request, num))

    def _request(self) -> Request:
        """The settings as those of an extraction."""
        own = None
        settings = self.get_params(deep=False)
        backbone, preprocessing = settings.pop("backbone"), settings.pop("preprocessing")
        settings["cache_dir"] = Path(settings["cache_dir"] or "cache")
        if isinstance(backbone, str):
            settings["backbone"] = backbone
            if preprocessing is not None:
                raise UserError("preprocessing is for a module of your own: leave it out")
        else:
            own = OwnNetwork.of(backbone, preprocessing)
        none = ImageDataset("pictures", "pictures", {"pictures": split_of([])}, [CLASS])
        with python_errors(ExtractConfig):
            return Request.of(ExtractConfig(dataset="pictures", **settings), none, own)

    @contextlib.contextmanager
    def _folder(self, request: Request) -> Iterator[Path]:
        """Where features are kept; without `cache_dir`, until the end of the block."""
        if self.cache_dir is not None:
            yield request.path.with_suffix("")
        else:
            with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
                yield Path(folder)

    def _engine_for(self, request: Request, num_images: int) -> Engine:
        """The engine, chosen on first use."""
        from featcache.engine import EngineSettings, choose_engine

        if not self._engines:
            chosen = choose_engine(
                EngineSettings.of(request.config),
                request.load_network(),
                request.meta.backbone.preprocessing,
                num_images=num_images,
            )
            self._engines.append(chosen)
        return self._engines[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engines": []}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.no_validation = True
        tags.transformer_tags.preserves_dtype = []  # features are float32
        return tags


def _pictures(X: Iterable[Picture]) -> ImageSplit:
    """The pictures along the first axis of a list, an array or a pandas column.

    Raises:
        UserError: There is none, or X is one picture or something else.
    """
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT" and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]  # a data frame with one column
    if isinstance(X, str | bytes) or not isinstance(X, Iterable):
        raise UserError(f"X is a {type(X).__name__}: give pictures or paths in a list or an array")
    split = split_of(list(X))
    if not len(split):
        raise UserError("X has no pictures: give at least one")
    return split

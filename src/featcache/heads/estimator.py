"""The heads as scikit-learn estimators, for pipelines, grid searches and cross-validation."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from featcache.config import TrainHeadConfig
from featcache.heads.features import Floats
from featcache.heads.linear import PLAIN, LinearHead
from featcache.heads.selection import InMemoryData, choose
from featcache.heads.solvers.base import FittedHead, threads_for
from featcache.heads.solvers.logistic import LogisticPath, LogisticProblem, LogisticSolver
from featcache.heads.solvers.ridge import RidgeSolver, ridge_of
from featcache.heads.training_data import Rows, balanced_weights

# Tight, so that the same problem stated in different ways gets the same solution.
TOLERANCE = 1e-20


class FeatureHeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A linear head with scikit-learn's interface: `fit`, `predict`, `predict_proba`, `score`.

    Args:
        solver: logistic (multinomial, L2, to convergence) or ridge (closed form).
        strength: scikit-learn's C for logistic, its alpha for ridge; auto chooses it as
            train-head does, on a held-out 20% of the rows, stratified, seed 42.
        standardize: Whether to scale features to unit deviation first.
        class_weight: A factor per class; balanced weighs by the inverse of their frequency.

    Attributes:
        classes_: Labels [C], sorted; outputs are in this order.
        coef_: Weights of raw features, [C, D].
        intercept_: [C].
        n_features_in_: Width D.
        n_iter_: Passes over the rows.
        strength_: What was used or chosen.
        decision_: How logits become probabilities and a class: temperature and threshold of the
            head given to `from_head`. `fit` holds out no rows and calibrates nothing:
            scikit-learn's `CalibratedClassifierCV` and `TunedThresholdClassifierCV` do.
    """

    def __init__(
        self,
        solver: Literal["logistic", "ridge"] = "logistic",
        strength: float | Literal["auto"] = 1.0,
        standardize: bool = False,
        class_weight: Literal["balanced"] | dict[Any, float] | None = None,
    ) -> None:
        self.solver = solver
        self.strength = strength
        self.standardize = standardize
        self.class_weight = class_weight

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Learn from features.

        Args:
            X: Features [N, D].
            y: Labels [N].
            sample_weight: What each row counts for [N].
            groups: What each row belongs to [N] (patient, camera): kept together where rows are
                held out, so without effect unless `strength` is auto.
        """
        self._check_params()
        features, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        weights = _check_sample_weight(
            sample_weight, features, dtype=np.float64, ensure_non_negative=True
        )
        kept: NDArray[Any] | None = None if groups is None else column_or_1d(groups)
        check_consistent_length(features, kept)
        counted = weights > 0
        features, labels, weights = features[counted], labels[counted], weights[counted]
        self.classes_, encoded = np.unique(labels, return_inverse=True)
        num_classes = len(self.classes_)
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {num_classes} class")
        encoded = encoded.astype(np.int64)
        if self.class_weight == "balanced":
            weights = balanced_weights(encoded, weights, num_classes)
        elif self.class_weight is not None:
            weights = weights * compute_sample_weight(self.class_weight, labels)
        names = [str(label) for label in self.classes_]
        rows = Rows(views=features[None], y=encoded, weights=weights, class_names=names)
        with threads_for(rows.num_values * num_classes):
            self.strength_ = self._strength(rows, None if kept is None else kept[counted])
            fitted = self._fit(rows)
        self.coef_: Floats = fitted.head.weight
        self.intercept_: Floats = fitted.head.bias
        self.n_iter_ = fitted.num_passes
        self.decision_ = PLAIN
        return self

    def _check_params(self) -> None:
        if self.solver not in ("logistic", "ridge"):
            raise ValueError(f"solver {self.solver!r}: logistic or ridge")
        weight = self.class_weight
        if weight is not None and weight != "balanced" and not isinstance(weight, dict):
            raise ValueError(f"class_weight {weight!r}: None, balanced, or a weight per class")
        if self.strength != "auto" and not self.strength > 0:
            raise ValueError(f"strength {self.strength!r} must be above 0, or auto")

    def _strength(self, rows: Rows, groups: NDArray[Any] | None) -> float:
        """The strength given, or the one that held-out rows choose."""
        if self.strength != "auto":
            return self.strength
        digests = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows.plain)
        content = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        data = InMemoryData(train=rows, content=content, groups=groups)
        scaled: Literal["on", "off"] = "on" if self.standardize else "off"
        solver = (RidgeSolver if self.solver == "ridge" else LogisticSolver)(standardize=scaled)
        chosen = choose(solver, data.selection(TrainHeadConfig(cache=Path()))).settings
        return chosen["alpha"] if self.solver == "ridge" else chosen["C"]

    def _fit(self, rows: Rows) -> FittedHead[LinearHead]:
        if self.solver == "ridge":
            return ridge_of(rows, standardize=self.standardize).fit(self.strength_)
        path = LogisticPath(LogisticProblem(rows), standardize=self.standardize)
        fitted = path.fit(self.strength_, TOLERANCE)
        if not fitted.converged:
            warnings.warn("logistic did not converge", ConvergenceWarning, stacklevel=3)
        return fitted

    def decision_function(self, X: ArrayLike) -> Floats:
        """Logits of features [N, D]: [N, C], or [N] (for the second class) when C is 2."""
        scores = self._scores(X)
        return np.asarray(scores[:, 1] - scores[:, 0]) if len(self.classes_) == 2 else scores

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Probabilities [N, C] of features [N, D]."""
        scores = self._scores(X)
        return self.decision_.probabilities(scores)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels [N] of features [N, D]."""
        scores = self._scores(X)
        return np.asarray(self.classes_[self.decision_.predict(scores)])

    def _scores(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        features = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return np.asarray(features @ self.coef_.T + self.intercept_)

    def to_head(self, **fields: Any) -> LinearHead:
        """The fitted classifier as a head that can be saved; float64, nothing is rounded.

        Args:
            **fields: Other attributes of the head, such as `provenance`.
        """
        check_is_fitted(self)
        names = [str(label) for label in self.classes_]
        return LinearHead(
            **{
                "class_names": names,
                "solver": self.solver,
                "decision": self.decision_,
                **fields,
            },
            weight=self.coef_.copy(),
            bias=self.intercept_.copy(),
        )

    @classmethod
    def from_head(cls, head: LinearHead) -> Self:
        """A fitted classifier that predicts as `head` does; labels are class numbers."""
        model = cls(solver="ridge" if head.solver == "ridge" else "logistic")
        model.classes_ = np.arange(len(head.class_names))
        model.coef_, model.intercept_ = head.weight.copy(), head.bias.copy()
        model.n_features_in_, model.n_iter_ = head.feature_dim, 0
        model.decision_ = head.decision
        return model

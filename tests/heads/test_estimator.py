"""The head as a scikit-learn estimator."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from cache_helpers import blobs, toy_cache
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.heads import train_head
from featcache.heads.estimator import FeatureHeadClassifier


@parametrize_with_checks(
    [
        FeatureHeadClassifier(),
        FeatureHeadClassifier(solver="ridge"),
        FeatureHeadClassifier(standardize=True, class_weight="balanced"),
        FeatureHeadClassifier(strength="auto"),
    ]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_passes_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_logistic_is_scikit_learns_solution():
    for num_classes in (2, 3):
        X, y = blobs(150, num_classes=num_classes)
        X = X.astype(np.float64) + 3.0
        ours = FeatureHeadClassifier(strength=0.3).fit(X, y)
        theirs = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(X, y)
        assert ours.predict_proba(X) == pytest.approx(theirs.predict_proba(X), abs=2e-4)


def test_ridge_is_scikit_learns_solution():
    for shape in ((150, 8), (12, 40)):
        X, y = blobs(shape[0], dim=shape[1])
        X = X.astype(np.float64)
        ours = FeatureHeadClassifier(solver="ridge", strength=2.5).fit(X, y)
        theirs = Ridge(alpha=2.5).fit(X, np.eye(3)[y])
        assert ours.coef_ == pytest.approx(theirs.coef_, abs=1e-9)
        assert ours.intercept_ == pytest.approx(theirs.intercept_, abs=1e-9)


def test_string_labels_and_cross_validation():
    X, y = blobs(120)
    names = np.array(["ape", "bee", "cat"])[y]
    model = FeatureHeadClassifier(strength=0.1).fit(X, names)
    assert set(model.predict(X)) == {"ape", "bee", "cat"}
    assert cross_val_score(FeatureHeadClassifier(), X, names, cv=3).mean() > 0.5


def test_sample_weights_are_repeated_rows():
    X, y = blobs(60)
    counts = np.arange(60) % 4  # rows of weight 0 count as absent
    weighted = FeatureHeadClassifier().fit(X, y, sample_weight=counts)
    repeated = FeatureHeadClassifier().fit(np.repeat(X, counts, 0), np.repeat(y, counts))
    assert weighted.coef_ == pytest.approx(repeated.coef_, abs=1e-3)


def test_auto_chooses_the_strength_as_train_head_does(tmp_path):
    cache = toy_cache(tmp_path / "toy.h5")
    X, y = FeatureCache(cache).split("train")
    for solver, name in (("logistic", "C"), ("ridge", "alpha")):
        config = TrainHeadConfig(cache=cache, solver=solver, standardize="on")
        chosen = train_head(config)["chosen"][name]
        model = FeatureHeadClassifier(solver, "auto", standardize=True).fit(X, y)
        assert model.strength_ == chosen != FeatureHeadClassifier(solver).fit(X, y).strength_


def test_groups_stay_together_where_rows_are_held_out():
    rng = np.random.default_rng(0)  # every group has a direction and a label of its own
    groups = np.repeat(np.arange(60), 4)
    y = rng.integers(0, 2, 60)[groups]
    X = rng.normal(size=(60, 100))[groups] + 0.05 * rng.normal(size=(240, 100)) + 0.1 * y[:, None]
    alone = FeatureHeadClassifier(strength="auto").fit(X, y)
    together = FeatureHeadClassifier(strength="auto").fit(X, y, groups=groups)
    assert together.strength_ < alone.strength_  # recognizing groups gains nothing
    assert FeatureHeadClassifier().fit(X, y, groups=groups).strength_ == 1.0
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        together.fit(X, y, groups=groups[:-1])


def test_head_and_estimator_convert_both_ways():
    X, y = blobs(90)
    model = FeatureHeadClassifier().fit(X, y)
    head = model.to_head()
    back = FeatureHeadClassifier.from_head(head)
    assert np.array_equal(head.predict(X), model.predict(X))
    assert np.array_equal(back.predict_proba(X), model.predict_proba(X))
    assert head.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "svm"}, "logistic or ridge"),
        ({"class_weight": "even"}, "balanced, or a weight per class"),
        ({"strength": 0.0}, "above 0"),
    ],
)
def test_wrong_settings_are_refused_in_fit(settings, message):
    X, y = blobs(30)
    with pytest.raises(ValueError, match=message):
        FeatureHeadClassifier(**settings).fit(X, y)

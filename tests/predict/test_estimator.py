"""FeatureExtractor: pictures to features in scikit-learn's pipelines, each computed once."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from data_helpers import encoded, make_pets, picture
from featcache import engine
from featcache.cache import FeatureCache
from featcache.errors import CacheError, UserError
from featcache.predict.estimator import FeatureExtractor
from trained_helpers import extracted_cache

SMALL = {"weights": "random", "image_px": 32, "workers": 1}


@pytest.fixture
def passes(monkeypatch):
    """How many pictures went through the network, one entry for each engine that was chosen."""
    asked, choose = [], engine.choose_engine

    def counting(*args, num_images, **options):
        asked.append(num_images)
        return choose(*args, num_images=num_images, **options)

    monkeypatch.setattr(engine, "choose_engine", counting)
    return asked


@pytest.fixture
def pets(tmp_path):
    """33 paths and labels of three classes."""
    paths = sorted((make_pets(tmp_path / "pets") / "train").rglob("*.png"))
    return [str(path) for path in paths], np.array([path.parent.name for path in paths])


def extractor(tmp_path, **settings):
    return FeatureExtractor(**{**SMALL, "cache_dir": tmp_path / "cache", **settings})


def test_features_are_those_of_extract_features(tmp_path):
    cache = extracted_cache(tmp_path)
    split = cache.split("train")
    paths = [tmp_path / "pets" / name for name in split.ids]
    features = extractor(tmp_path, cache_dir=tmp_path / "other").fit_transform(paths)
    assert features.dtype == np.float32
    assert np.array_equal(features, split.X)


def test_paths_images_bytes_and_arrays_give_the_same_features(tmp_path):
    image = picture(7)
    (tmp_path / "seven.png").write_bytes(encoded(image))
    forms = [tmp_path / "seven.png", image, encoded(image), np.asarray(image)]
    rows = extractor(tmp_path).fit_transform(forms)
    assert rows == pytest.approx(np.tile(rows[:1], (4, 1)), abs=1e-6)
    gray = np.zeros((3, 8, 8), np.uint8)  # the first axis counts, as everywhere in scikit-learn
    assert extractor(tmp_path).fit_transform(gray).shape == (3, 512)


def test_no_picture_passes_the_network_twice(tmp_path, passes, pets):
    paths, names = pets
    model = make_pipeline(extractor(tmp_path), LogisticRegression(max_iter=500))
    scores = cross_val_score(model, paths, names, cv=3)
    assert scores.mean() > 0.5
    assert sum(passes) == 22  # of one fold; the same engine computes the rest of 33
    folder = next((tmp_path / "cache").glob("pictures-resnet18-random-32px-*"))
    files = [FeatureCache(path) for path in folder.glob("*.h5")]
    assert sorted(cache.splits["pictures"] for cache in files) == [11, 22]
    assert np.array_equal(cross_val_score(model, paths, names, cv=3), scores)
    first = extractor(tmp_path).fit_transform(paths[::-1])
    moved = tmp_path / "moved.png"
    moved.write_bytes((tmp_path / paths[0]).read_bytes())  # by content, not by name
    assert np.array_equal(extractor(tmp_path).fit_transform([moved, moved]), first[[-1, -1]])
    assert sum(passes) == 22


def test_changed_pictures_and_settings_are_computed_anew(tmp_path, passes):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(1)))
    one = extractor(tmp_path).fit_transform([path])
    path.write_bytes(encoded(picture(2)))
    assert not np.array_equal(extractor(tmp_path).fit_transform([path]), one)
    for settings in ({"seed": 1}, {"resize": "squash"}, {"layers": "layer4"}):
        extractor(tmp_path, **settings).fit_transform([path])
    assert passes == [1] * 5


def test_other_weights_of_the_same_name_are_not_mixed_up(tmp_path, passes):
    pictures = [picture(1)]
    modules = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)) for _ in range(2)]
    settings = {"weights": "imagenet", "image_px": 8, "cache_dir": tmp_path / "cache"}
    rows = [FeatureExtractor(m, **settings).fit_transform(pictures) for m in modules]
    assert not np.array_equal(*rows)
    assert np.array_equal(FeatureExtractor(modules[0], **settings).fit_transform(pictures), rows[0])
    assert passes == [1, 1]
    fitted = FeatureExtractor(modules[0], **settings).fit(pictures)
    torch.nn.init.ones_(modules[0][1].weight)
    with pytest.raises(CacheError, match=r"^weights own are not those that fit\(\) found: "):
        fitted.transform(pictures)


def test_without_a_folder_nothing_is_kept(tmp_path, passes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = extractor(tmp_path, cache_dir=None).fit([picture(1)])
    assert np.array_equal(model.transform([picture(1)]), model.transform([picture(1)]))
    assert passes == [1]  # one engine, used twice
    assert not list(tmp_path.rglob("*.h5"))


def test_a_damaged_file_is_named_and_its_features_are_computed_again(tmp_path, passes, capsys):
    rows = extractor(tmp_path).fit_transform([picture(1)])
    [file] = (tmp_path / "cache").rglob("*.h5")
    file.write_bytes(file.read_bytes()[:5000])
    assert np.array_equal(extractor(tmp_path).fit_transform([picture(1)]), rows)
    assert f"{file.name}" in capsys.readouterr().err
    assert FeatureCache(file).splits == {"pictures": 1}


def test_pickles_clones_and_names_columns(tmp_path):
    model = extractor(tmp_path, layers="stages").fit([picture(1)])
    rows = model.transform([picture(1)])
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.transform([picture(1)]), rows)
    assert clone(model).get_params() == model.get_params()
    names = model.get_feature_names_out()
    assert (len(names), names[0]) == (rows.shape[1], "featureextractor0")
    pd = pytest.importorskip("pandas", reason='needs pandas: pip install "featcache[pandas]"')
    model.set_output(transform="pandas")
    table = model.transform(pd.Series([picture(1)], index=["x"]))
    assert (table.columns[0], table.index[0]) == (names[0], "x")
    assert np.array_equal(model.transform(pd.DataFrame({"p": [picture(1)]})), table)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("photos", "X is a str: give pictures or paths in a list or an array"),
        (3, "X is a int: give pictures or paths in a list or an array"),
        ([], "X has no pictures: give at least one"),
        (
            [None],
            "picture 0 is a NoneType: give a path, a PIL image, a file's bytes, a file opened",
        ),
    ],
)
def test_what_is_not_pictures_is_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        extractor(tmp_path).fit(given)


def test_settings_and_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png: .*; repair it or leave it out$"):
        extractor(tmp_path).fit_transform([picture(1), tmp_path / "bad.png"])
    with pytest.raises(UserError, match=r"^image_px 4 is out of range"):
        extractor(tmp_path, image_px=4).fit([picture(1)])


@pytest.mark.slow
def test_a_parallel_grid_search_computes_each_picture_once(tmp_path, pets):
    model = make_pipeline(extractor(tmp_path), LogisticRegression(max_iter=500))
    search = GridSearchCV(model, {"logisticregression__C": [0.1, 1.0]}, cv=3, n_jobs=2)
    assert search.fit(*pets).best_score_ > 0.5
    kept = [FeatureCache(path).splits["pictures"] for path in (tmp_path / "cache").rglob("*.h5")]
    assert sum(kept) == 33


class OfRows(FeatureExtractor):
    """Takes scikit-learn's numeric rows for pictures of one line, so that its checks apply."""

    def fit(self, X, y=None):
        return super().fit(as_pictures(validate_data(self, X)), y)

    def transform(self, X):
        check_is_fitted(self)
        return super().transform(as_pictures(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.no_validation = True, False
        return tags


def as_pictures(X):
    return [Image.fromarray((np.abs(row) * 37 % 256).astype(np.uint8)[None]) for row in X]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([OfRows(weights="random", image_px=8, workers=0, cache_dir=None)])
def test_passes_scikit_learns_own_checks(estimator, check):
    check(estimator)

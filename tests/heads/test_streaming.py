"""Training in bounded memory gives what training in memory gives."""

import numpy as np
import pytest

from cache_helpers import blobs, rows_cache, toy_cache
from featcache.cache import FeatureCache
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads import load_head, streaming, summary_lines, train_head
from featcache.heads.features import all_finite, widen
from featcache.heads.linear import softmax
from featcache.heads.streaming import draw_held, open_data, read_ahead

NAMES = ["ape", "bee", "cat"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks and windows in a small cache."""
    monkeypatch.setattr(streaming, "READ_ROWS", 50)
    monkeypatch.setattr(streaming, "SHUFFLE_ROWS", 16)
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 16 * 8 * 4 * 3)


def run(cache, **settings):
    return train_head(TrainHeadConfig(cache=cache, cache_dir=cache.parent, **settings))


def both(cache, **settings):
    heads = []
    for flag in ("on", "off"):
        report = run(cache, stream=flag, **settings)
        assert report["streamed"] is (flag == "on")
        heads.append(load_head(report["head"]))
    return heads


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
@pytest.mark.parametrize("standardize", ["on", "off"])
@pytest.mark.parametrize("class_weight", ["none", "balanced"])
def test_same_head_as_in_memory(tmp_path, solver, standardize, class_weight):
    X, y = blobs(240, seed=1)
    X, y = X[60:] * [1, 10, 0.1, 1, 1, 1, 5, 1] + 7, y[60:] * (np.arange(180) % 4 > 0)
    views = np.stack([X, X + 0.1])
    weights = {
        "train": np.linspace(0.5, 2, 180).astype(np.float32),
        "test": np.ones(30, np.float32),
    }
    tests = (views[:, :30], y[:30])
    cache = rows_cache(
        tmp_path / "t.h5", {"train": (views, y), "test": tests}, NAMES, weights=weights
    )
    strength = {"C": 0.7} if solver == "logistic" else {"alpha": 0.7}
    streamed, loaded = both(
        cache, solver=solver, standardize=standardize, class_weight=class_weight, **strength
    )
    # Other rows are held out, so the temperatures differ.
    probabilities = softmax(loaded.decision_function(X))
    tolerance = 2e-3 if solver == "logistic" else 2e-2  # ridge: calibrated on other rows
    found = softmax(streamed.decision_function(X))
    assert found == pytest.approx(probabilities, abs=tolerance)
    if solver == "ridge":
        ratio = streamed.weight / loaded.weight
        assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0]), rel=1e-3)


def test_chooses_and_scores(tmp_path):
    cache = toy_cache(tmp_path / "toy.h5", dtype="float16")
    for solver in ("logistic", "ridge", "auto", "adam"):
        report = run(cache, solver=solver, stream="on", sweep=solver == "adam")
        assert "held-out random 48 rows of train, seed 42" in report["chosen_on"]
        assert report["test_top1"] > 0.7
        assert report["num_train"] == 240
        lines = summary_lines(report)
        assert any(line.startswith("ridge    alpha") for line in lines) is (solver == "auto")


def test_adam_sees_every_row_once_per_epoch(tmp_path):
    X, y = blobs(100, seed=3)
    X[:, 0] = np.arange(100)
    cache = rows_cache(tmp_path / "t.h5", {"train": (X, y), "test": (X, y)}, NAMES)
    config = TrainHeadConfig(cache=cache, stream="on", solver="adam")
    selection = open_data(config, FeatureCache(cache), None).selection(config)
    [(rest, held)] = selection.pairs
    held_index = held.plain[:, 0].astype(int)
    assert len(held_index) == 20
    for rows, expected in (
        (selection.train, np.arange(100)),
        (rest, np.setdiff1d(range(100), held_index)),
    ):
        batches = rows.batches(8, 42)
        seen = [np.concatenate([b[0][:, 0] for b in batches(epoch)]) for epoch in (0, 1)]
        assert np.array_equal(np.sort(seen[0]), expected)
        assert not np.array_equal(seen[0], seen[1])
        again = np.concatenate([b[0][:, 0] for b in batches(0)])
        assert np.array_equal(seen[0], again)
        labels = np.concatenate([b[1] for b in batches(0)])
        assert np.array_equal(labels, y[seen[0].astype(int)])


def test_held_rows_leave_every_class_something_to_fit(tmp_path):
    X, y = blobs(60, seed=3)
    y = np.where(np.arange(60) == 17, 2, y % 2)  # one row of the third class
    cache = rows_cache(tmp_path / "t.h5", {"train": (X, y), "test": (X, y)}, NAMES)
    split = FeatureCache(cache).split("train")
    for seed in range(30):
        held = draw_held(TrainHeadConfig(cache=cache, holdout=0.5, seed=seed), split, 3)
        assert 17 not in held
        assert np.all(np.diff(held) > 0)


def test_auto_streams_what_is_large_against_free_memory(tmp_path, monkeypatch):
    cache = toy_cache(tmp_path / "toy.h5")
    assert run(cache)["streamed"] is False
    monkeypatch.setattr(streaming, "available_memory", lambda: 240 * 8 * 4)
    assert run(cache)["streamed"] is True
    assert run(cache, stream="off")["streamed"] is False
    assert run(cache, shots=3, num_seeds=2)["streamed"] is False


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"solver": "knn"}, "--solver knn"),
        ({"select": "cv"}, "--select cv"),
        ({"backend": "torch"}, "--backend torch"),
        ({"shots": 2}, "--shots"),
    ],
)
def test_what_needs_memory_is_refused(tmp_path, settings, flag):
    cache = toy_cache(tmp_path / "toy.h5")
    with pytest.raises(UserError, match=f"{flag} needs all rows in memory.*--stream off"):
        run(cache, stream="on", **settings)


def test_read_ahead_hands_on_items_and_errors():
    assert list(read_ahead(lambda: iter(range(10)))) == list(range(10))

    def broken():
        yield 1
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        list(read_ahead(broken))
    some = read_ahead(lambda: iter(range(1000)))
    assert next(some) == 0
    some.close()  # leaving early does not hang


def test_halves_are_widened_exactly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    wanted = every.astype(np.float32)
    assert np.array_equal(widen(every), wanted, equal_nan=True)  # infinities among them
    finite = every[np.isfinite(every).all(axis=1)]
    assert len(finite) == 248
    assert all_finite(finite)
    assert not all_finite(every)
    for some in (finite, finite[:, ::3], finite[::-1]):
        found = widen(some)
        assert np.array_equal(found, some.astype(np.float32))
        assert np.array_equal(np.signbit(found), np.signbit(some))  # of zeros too
    buffer = np.empty((300, 256), np.float32)
    assert widen(finite, buffer[:248]).base is buffer
    assert np.array_equal(buffer[:248], finite)
    single = finite.astype(np.float32)
    assert widen(single) is single

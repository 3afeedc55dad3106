"""The notebook's loop in numpy is torch's."""

import numpy as np
import pytest
import torch

from cache_helpers import blobs
from featcache import random_order
from featcache.errors import UserError
from featcache.heads.solvers.sgd import NumpyLayer, SgdSettings, TorchLayer, train_layer
from featcache.heads.training_data import Rows


def settings_of(optimizer="adam", lr=(1e-2,), decay=(0.0,), **changes):
    values = {"epochs": 3, "seed": 42, **changes}
    return SgdSettings(optimizer=optimizer, lr=lr, weight_decay=decay, **values)


def rows_of(X, y, weights=None):
    views = X if X.ndim == 3 else X[None]
    weights = np.ones(len(y)) if weights is None else weights
    return Rows(views=views, y=np.asarray(y), weights=weights, class_names=["ape", "bee", "cat"])


def epochs_of(batches, dim, settings, kind=NumpyLayer):
    return list(train_layer(kind(dim, 3, settings), batches, settings.epochs))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("weighted", [False, True])
def test_numpy_and_torch_end_with_the_same_weights(optimizer, decay, weighted):
    X, y = blobs(150, dim=20)
    weights = np.linspace(0.5, 2, 150) if weighted else None
    rows = rows_of(np.stack([X, -X]), y, weights)
    settings = settings_of(optimizer, decay=(decay,))
    batches = rows.batches(32, 42)
    ours = epochs_of(batches, 20, settings)
    theirs = epochs_of(batches, 20, settings, TorchLayer)
    assert ours[-1].weights[0] == pytest.approx(theirs[-1].weights[0], abs=1e-5)
    assert ours[-1].biases[0] == pytest.approx(theirs[-1].biases[0], abs=1e-5)
    assert [e.losses[0] for e in ours] == pytest.approx([e.losses[0] for e in theirs], rel=1e-5)


def test_it_is_the_notebooks_loop_written_out():
    """Adam on nn.Linear, shuffled each epoch, batches of 32, the last one shorter."""
    X, y = blobs(70, dim=6)
    weight, bias = random_order.init_linear(6, 3, 42)
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    sizes = []
    for epoch in range(3):
        order = torch.from_numpy(random_order.epoch_order(70, 42, epoch))
        for index in order.split(32):
            sizes.append(len(index))
            logits = layer(torch.from_numpy(X)[index])
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert sizes == [32, 32, 6] * 3
    batches = rows_of(X, y).batches(32, 42)
    ours = epochs_of(batches, 6, settings_of(lr=(1e-3,)))[-1]
    assert ours.weights[0] == pytest.approx(layer.weight.detach().numpy(), abs=1e-6)
    assert ours.biases[0] == pytest.approx(layer.bias.detach().numpy(), abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_heads_trained_together_are_those_trained_alone(optimizer):
    X, y = blobs(100)
    batches = rows_of(X, y).batches(32, 7)
    rates, decays = (1e-3, 1e-2, 0.1), (0.0, 0.1, 0.0)
    together = epochs_of(batches, 8, settings_of(optimizer, rates, decays))[-1]
    for i, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        alone = epochs_of(batches, 8, settings_of(optimizer, (rate,), (decay,)))[-1]
        assert together.weights[i] == pytest.approx(alone.weights[0], abs=1e-5)
        assert together.losses[i] == pytest.approx(alone.losses[0], rel=1e-5)


def test_each_row_comes_once_per_epoch_in_one_of_its_views():
    X = np.arange(50, dtype=np.float32)[:, None].repeat(2, 1)
    rows = rows_of(np.stack([X, X + 1000]), np.arange(50) % 3)
    batches = rows.batches(8, 42)
    seen = np.concatenate([b[0][:, 0] for b in batches(0)])
    assert np.array_equal(np.sort(seen % 1000), np.arange(50))
    mirrored = np.zeros(50, bool)
    mirrored[(seen % 1000).astype(int)] = seen >= 1000
    assert np.array_equal(mirrored, random_order.flip_mask(50, 42, 0))


@pytest.mark.parametrize("kind", [NumpyLayer, TorchLayer])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_loss_ends_in_one_line(kind):
    X, y = blobs(60)
    batches = rows_of(X * 1e30, y).batches(32, 0)
    with pytest.raises(UserError, match="loss is not finite after epoch 1"):
        epochs_of(batches, 8, settings_of("sgd", lr=(1e30,)), kind)


def test_recipe_is_a_function_of_its_arguments():
    assert sorted(random_order.epoch_order(10, 1, 0)) == list(range(10))
    assert not np.array_equal(
        random_order.epoch_order(50, 1, 0), random_order.epoch_order(50, 1, 1)
    )
    assert not np.array_equal(
        random_order.epoch_order(50, 1, 0), random_order.epoch_order(50, 2, 0)
    )
    assert np.array_equal(random_order.epoch_order(50, 1, 3), random_order.epoch_order(50, 1, 3))
    weight, bias = random_order.init_linear(16, 5, 0)
    assert weight.shape == (5, 16)
    assert bias.shape == (5,)
    assert weight.dtype == bias.dtype == np.float32
    assert 0.2 < np.abs(weight).max() <= 0.25
    assert 0.4 < random_order.flip_mask(10_000, 0, 0).mean() < 0.6
    assert np.array_equal(random_order.epoch_views(20, 2, 3, 1), random_order.flip_mask(20, 3, 1))
    assert set(random_order.epoch_views(500, 4, 0, 0)) == {0, 1, 2, 3}
    assert not random_order.epoch_views(5, 1, 0, 0).any()

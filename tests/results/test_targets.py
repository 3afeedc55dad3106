"""Scores of several labels and of numbers: whole groups are drawn for their intervals."""

import numpy as np
import pytest

from featcache.results.targets import multilabel_scores, regression_scores


def test_intervals_draw_groups_where_there_are_any():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 25)
    error = rng.normal(size=12)[groups]  # all rows of a group err alike
    truth = rng.normal(size=300) * 3
    alone, grouped = (
        regression_scores(truth, truth + error, 0.0, groups=g, seed=1) for g in (None, groups)
    )
    assert (alone.mae, alone.r2) == (grouped.mae, grouped.r2)
    assert np.ptp(grouped.mae_interval) > 2 * np.ptp(alone.mae_interval)
    assert grouped.mae_interval[0] < grouped.mae < grouped.mae_interval[1]
    has = np.stack([truth > 0, truth > 2], axis=1)
    noisy = 1 / (1 + np.exp(-(truth + 4 * error)))[:, None].repeat(2, axis=1)
    alone, grouped = (
        multilabel_scores(has, noisy, noisy > 0.5, ["a", "b"], groups=g, seed=1)
        for g in (None, groups)
    )
    assert alone.mean_average_precision == grouped.mean_average_precision
    assert np.ptp(grouped.interval) > 1.3 * np.ptp(alone.interval)


def test_groups_of_one_row_change_nothing():
    truth = np.arange(20.0)
    predicted = truth + np.sin(truth)
    alone = regression_scores(truth, predicted, 3.0, seed=4)
    assert regression_scores(truth, predicted, 3.0, groups=np.arange(20), seed=4) == alone


def test_resamples_without_any_label_are_left_out():
    has = np.array([[1, 0], [0, 0], [0, 0]]) > 0
    probabilities = np.array([[0.9, 0.1], [0.2, 0.1], [0.1, 0.1]])
    scores = multilabel_scores(has, probabilities, has, ["a", "b"], groups=list("xyz"), seed=0)
    assert scores.interval == pytest.approx((1, 1))


def test_a_single_label_is_scored_as_one_of_several():
    has = np.array([[1], [1], [0], [0], [0]]) > 0
    probabilities = np.array([[0.9], [0.3], [0.6], [0.2], [0.1]])
    scores = multilabel_scores(has, probabilities, probabilities > 0.5, ["a"], seed=0)
    assert (scores.macro_f1, scores.micro_f1, scores.exact_match) == (0.5, 0.5, 0.6)
    assert scores.mean_average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert scores.per_label["a"].support == 2

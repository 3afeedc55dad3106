"""Fitting a head's `Decision` on train rows that it did not learn from.

The logits come from the protocol that chooses: a head with the winning settings, fitted to the
other part of train, sees the held-out rows as the final head sees new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.features import Doubles, Floats, Ints, widen
from featcache.heads.files import Head
from featcache.heads.linear import (
    TEMPERATURES,
    Decision,
    KnownRows,
    LinearHead,
    Threshold,
    Wanted,
    nearest_distance,
    softmax,
    unit_rows,
)
from featcache.heads.selection import Choice, Selection, held_out_logits
from featcache.heads.solvers.base import NotConverged, Solver
from featcache.heads.training_data import Rows
from featcache.results.ranking import rank

# How often the range of temperatures is halved.
NUM_STEPS = 30
# Held-out rows that calibrate, and those of them that new images are ranked among.
MAX_HELD, MAX_RANKED = 20_000, 2_000
# Of the train rows that a head keeps to measure distances.
BANK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class OutOfFold:
    """Held-out train rows as a head sees them that did not learn from them.

    Attributes:
        logits: [M, C].
        y: Class indices [M].
        weights: What each row counts for [M].
        distance: To the nearest of the rows that the head learned from, or a part of them [M].
    """

    logits: Floats
    y: Ints
    weights: Doubles
    distance: Floats


def out_of_fold(
    solver: Solver, choice: Choice, selection: Selection, seed: int
) -> OutOfFold | None:
    """Logits and distances of held-out rows; None where no row was held out.

    Args:
        solver: That of the final head.
        choice: Its settings.
        selection: What is held out; of more than 20,000 rows, a sample counts.
        seed: Of the sample, and of the rows that distances are taken to.
    """
    try:
        parts = held_out_logits(solver, choice, selection)
    except NotConverged:
        return None
    found, most = [], MAX_HELD // max(len(selection.pairs), 1)
    for (rows, held), logits in zip(selection.pairs, parts, strict=True):
        # A val split may have classes that train lacks.
        index = some_rows(np.flatnonzero(np.isin(held.y, rows.sample.y)), most, seed)
        distance = nearest_distance(widen(bank_of(rows.sample, seed)), held.plain[index])
        found.append((logits[index], held.y[index], held.weights[index], distance))
    if not any(len(y) for _, y, *_ in found):
        return None
    logits, y, weights, distance = (np.concatenate(p) for p in zip(*found, strict=True))
    return OutOfFold(logits=logits, y=y, weights=weights, distance=distance)


def some_rows(index: Ints, most: int, seed: int) -> Ints:
    """The row numbers `index`, or a random sample of `most` of them, ascending."""
    if len(index) <= most:
        return index
    random = np.random.default_rng([seed, 0xBA4C])
    return np.sort(random.choice(index, most, replace=False))


def bank_of(rows: Rows, seed: int) -> NDArray[np.float16]:
    """Some rows as `KnownRows` stores them: as many as fit a megabyte."""
    most = max(1, BANK_BYTES // (2 * rows.feature_dim))
    return unit_rows(rows.plain[some_rows(np.arange(rows.num_rows), most, seed)])


def fit_known(
    held: OutOfFold | None, decision: Decision, rows: Rows, seed: int
) -> KnownRows | None:
    """What tells images of other classes; None where no row was held out.

    Args:
        held: Held-out rows.
        decision: The head's.
        rows: What it learned from, or a sample of these.
        seed: Of the rows that are stored.
    """
    if held is None:
        return None
    confidence = decision.probabilities(held.logits).max(axis=1)
    index = some_rows(np.arange(len(confidence)), MAX_RANKED, seed)
    return KnownRows.ranking(bank_of(rows, seed), confidence[index], held.distance[index])


def fit_decision(
    held: OutOfFold | None, config: TrainHeadConfig, head: Head, chosen_on: str
) -> Decision:
    """Fit the temperature, and the threshold if one is asked for.

    Shares of votes have no temperature: where no neighbor is of the true class, none would do.

    Args:
        held: Held-out rows, if there are any.
        config: The command's settings.
        head: What is to decide.
        chosen_on: The held-out rows, in words.

    Raises:
        UserError: The threshold cannot be chosen.
    """
    wanted = config.wanted_threshold()
    if held is None:
        if wanted is not None:
            raise UserError(
                "--threshold-for is chosen on held-out train rows, and no row can be held out: "
                "run extract-features with more images, or leave it out"
            )
        return Decision()
    temperature, threshold = 1.0, None
    if isinstance(head, LinearHead):
        temperature = fit_temperature(held.logits, held.y, held.weights)
    if wanted is not None:
        positive = positive_class(config, head.class_names)
        scores = softmax(held.logits / temperature)[:, positive]
        threshold = choose_threshold(held.y == positive, scores, *wanted, positive=positive)
    return Decision(temperature=temperature, threshold=threshold, fitted_on=chosen_on)


def fit_temperature(logits: Floats, y: Ints, weights: Doubles) -> float:
    """The temperature with the least cross-entropy.

    As in Guo et al. 2017, "On Calibration of Modern Neural Networks". The cross-entropy is convex
    in b = 1 / temperature, so its slope, the expected logit less that of the true class, is zero
    only at the minimum. So that a few rows that are all right do not
    promise certainty, one part in M + 2 of each row counts for the likeliest other class, as in
    Platt 1999, "Probabilistic Outputs for Support Vector Machines".

    Args:
        logits: [M, C].
        y: True classes [M].
        weights: What each row counts for [M].
    """
    shifted = np.asarray(logits - logits.max(axis=1, keepdims=True), np.float64)
    true = np.eye(shifted.shape[1], dtype=bool)[y]
    doubt = 1 / (len(y) + 2)
    own = (1 - doubt) * shifted[true] + doubt * np.where(true, -np.inf, shifted).max(axis=1)

    def slope(temperature: float) -> float:
        expected = np.einsum("nc,nc->n", softmax(shifted / temperature), shifted)
        return float(weights @ (expected - own))

    low, high = np.log(TEMPERATURES)
    for _ in range(NUM_STEPS):
        middle = (low + high) / 2
        if slope(float(np.exp(middle))) > 0:  # b is too large
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def positive_class(config: TrainHeadConfig, class_names: list[str]) -> int:
    """Number of the class that --threshold-for is about.

    Raises:
        UserError: There are not two classes, or --positive names neither.
    """
    if len(class_names) != 2:
        raise UserError(
            f"--threshold-for is for two classes, and {config.cache} has {len(class_names)}: leave "
            "it out"
        )
    if config.positive is None:
        return 1
    if config.positive not in class_names:
        raise UserError(
            f"--positive {config.positive!r:.80}: give {class_names[0]!r} or {class_names[1]!r}"
        )
    return class_names.index(config.positive)


def choose_threshold(
    truth: Ints, scores: Floats, wanted: Wanted, level: float, *, positive: int
) -> Threshold:
    """The threshold that reaches a precision with the most recall, or the other way round.

    It lies halfway between two held-out probabilities, so that rounding moves no row across.

    Args:
        truth: Whether a held-out row is positive [M] bool.
        scores: Its probability of being so [M].
        wanted: precision or recall.
        level: How much of it.
        positive: Number of the positive class.

    Raises:
        UserError: No threshold reaches it.
    """
    ranking = rank(truth, scores)
    true, false = ranking.true[:, 0].cumsum(), ranking.false[:, 0].cumsum()
    precision, recall = true / (true + false), true / max(true[-1], 1)
    reached = np.flatnonzero({"precision": precision, "recall": recall}[wanted] >= level)
    if not reached.size or not true[-1]:
        best = f"at most {precision.max():.3f}" if true[-1] else "there is no positive row"
        raise UserError(
            f"--threshold-for {wanted}={level:g}: no threshold reaches it on the held-out rows "
            f"({best}): ask for less"
        )
    place = int(reached[-1] if wanted == "precision" else reached[0])
    below = float(ranking.thresholds[place + 1]) if place + 1 < len(true) else 0.0
    return Threshold(
        positive=positive,
        probability=(float(ranking.thresholds[place]) + below) / 2,
        wanted=wanted,
        level=level,
        precision=float(precision[place]),
        recall=float(recall[place]),
    )

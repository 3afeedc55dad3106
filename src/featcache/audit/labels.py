"""Labels that are probably wrong: out-of-fold probabilities and confident learning.

Every train row gets probabilities from a head that has not seen it, nor any row of its group, and
from the votes of its nearest neighbors outside of its fold. The two err differently, so their
geometric mean tells wrong labels from hard images better than either, provided that the better one
weighs more: the weight is the one that makes the given labels most likely.

The thresholds are those of C. Northcutt, L. Jiang, I. Chuang, Confident Learning, JAIR 2021
(arXiv 1911.00068): the mean probability that rows labeled with a class give to it. A label is
suspect if the row reaches the threshold of another class, the most probable one that it reaches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from featcache.audit.rows import AllRows
from featcache.cache import FeatureCache
from featcache.config import AuditConfig, TrainHeadConfig
from featcache.display import progress
from featcache.groups import assign_parts, kept_together
from featcache.heads.columns import on_columns
from featcache.heads.features import Doubles, Floats, Ints
from featcache.heads.linear import softmax
from featcache.heads.scoring import open_test
from featcache.heads.selection import Choice, choose_solver, load_data
from featcache.heads.solvers.base import Settings, Solver, threads_for
from featcache.heads.solvers.knn import KnnSolver
from featcache.heads.train import make_solvers
from featcache.heads.training_data import Rows

TINY = 1e-12
# Added to every share of votes: none of ten neighbors is no proof.
SMOOTHING = 0.02
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NOT_TRAIN = 1 << 30  # the part of rows of other splits: a head on all of train predicts them


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCheck:
    """What heads that have not seen a row say of its label.

    Attributes:
        solver: The name of the solver that fitted them.
        weight: What its probabilities weigh, beside the neighbors' votes, 0 to 1.
        choice: Their settings, and how they were chosen.
        probabilities: [N, C]; NaN for the only group of a class, which every head has to see.
        unmixed: The same of the chosen head alone.
        suspects: Rows whose label is doubtful, the least probable label first, [S].
        suggested: The class that each of them probably is, [S].
        odds: Relative to the thresholds, how many times as probable the most probable other class
            is, [N]; NaN where the label was not checked.
    """

    solver: str
    weight: float
    choice: Choice
    probabilities: Floats
    unmixed: Floats
    suspects: Ints
    suggested: Ints
    odds: Doubles


def check_labels(config: AuditConfig, cache: FeatureCache, rows: AllRows) -> LabelCheck:
    """Compare every label with what the other rows say.

    The head's settings are chosen as `train-head` chooses them. Train rows are then predicted by
    cross-validation that keeps groups and identical images together, rows of other splits by a head
    on all of train.

    Args:
        config: Has the solver, the number of folds and the seed.
        cache: Has train and test rows.
        rows: Its rows; their labels are the ones that count.

    Raises:
        UserError: The train rows cannot be learned from.
    """
    settings = TrainHeadConfig(cache=config.cache, solver=config.solver, seed=config.seed)
    data, stages = load_data(cache), cache.meta.backbone.stages
    train = dataclasses.replace(data.train, y=rows.y[: rows.num_train])
    data = dataclasses.replace(data, train=train)
    with threads_for(train.num_values * train.num_classes):
        test = open_test(settings, cache, in_memory=True)
        solvers = make_solvers(settings, test, streamed=False)
        if stages is not None:
            solvers = [on_columns(solver, settings, stages) for solver in solvers]
        solver, choice, _ = choose_solver(solvers, data.selection(settings))
        parts = assign_parts(
            train.y,
            kept_together(data.content, data.groups),
            config.seed,
            fraction=None,
            num_parts=config.folds,
            grouped=data.groups is not None,
        )
        unmixed = _unseen(solver, choice.settings, train, rows, parts)
        probabilities, weight = unmixed, 1.0
        if solver.name != "knn":
            votes: Settings = {"k": min(config.neighbors, train.num_rows), "metric": "cosine"}
            neighbors = _unseen(KnnSolver(), votes, train, rows, parts)
            probabilities, weight = blended(unmixed, neighbors, train.y)
    suspects, suggested, odds = confident_learning(probabilities, rows.y, rows.num_train)
    return LabelCheck(
        solver=solver.name,
        weight=weight,
        choice=choice,
        probabilities=probabilities,
        unmixed=unmixed,
        suspects=suspects,
        suggested=suggested,
        odds=odds,
    )


def _unseen(solver: Solver, settings: Settings, train: Rows, rows: AllRows, parts: Ints) -> Floats:
    """Probabilities [N, C] of every row from a head that was not fitted to it.

    Args:
        solver: Fits the heads.
        settings: With these settings.
        train: The train rows.
        rows: All rows, those of train first.
        parts: The part of each train row; -1 for rows that are always fitted.
    """
    found = np.full((len(rows.y), train.num_classes), np.nan, np.float32)
    place = np.concatenate([parts, np.full(len(rows.y) - len(parts), NOT_TRAIN)])
    asked = np.unique(place[place >= 0])
    with progress(len(asked), "cross-validation", unit=" folds", late=True) as bar:
        for part in asked:
            fitted = np.flatnonzero((parts != part) & (train.weights > 0))
            unseen = place == part
            if len(np.unique(train.y[fitted])) > 1:
                prepared = solver.prepare(train.take(fitted), [settings])
                found[unseen] = prepared.fit(settings).head.predict_proba(rows.X[unseen])
            bar.update()
    return found


def blended(head: Floats, votes: Floats, labels: Ints) -> tuple[Floats, float]:
    """The weighted geometric mean of two heads' probabilities.

    Args:
        head: Probabilities of the chosen head, [N, C].
        votes: Shares of the neighbors' votes, [N, C].
        labels: Class indices of the first rows, [M]: the weight makes them most likely.

    Returns:
        Probabilities [N, C], and the weight of `head`.
    """
    logs = np.log(np.maximum(head, TINY)), np.log(votes + SMOOTHING)
    rows = np.arange(len(labels))
    mixed = {weight: softmax(weight * logs[0] + (1 - weight) * logs[1]) for weight in WEIGHTS}
    likely = {
        weight: np.nanmean(np.log(np.maximum(p[rows, labels], TINY)))
        for weight, p in mixed.items()
        if np.isfinite(p[rows, labels]).any()
    }
    best = max(likely, key=lambda weight: (likely[weight], weight), default=1.0)
    return mixed[best], best


def confident_learning(
    probabilities: Floats, labels: Ints, num_train: int
) -> tuple[Ints, Ints, Doubles]:
    """Labels that are probably wrong.

    Args:
        probabilities: From heads that have not seen the rows, [N, C]; NaN where there are none.
        labels: Class indices [N].
        num_train: Rows at the start whose labels set the thresholds.

    Returns:
        Suspects [S], the class that each of them probably is [S], and the odds of every label [N],
        as in `LabelCheck`.
    """
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    checked = np.flatnonzero(np.isfinite(own))
    train = checked[checked < num_train]
    counts = np.bincount(labels[train], minlength=probabilities.shape[1])
    sums = np.bincount(labels[train], own[train], minlength=probabilities.shape[1])
    thresholds = np.where(counts, sums / np.maximum(counts, 1), np.inf)
    relative = np.maximum(probabilities[checked], TINY) / thresholds
    mine = np.arange(len(checked)), labels[checked]
    beside = relative.copy()
    beside[mine] = 0
    odds = np.full(len(labels), np.nan)
    odds[checked] = beside.max(axis=1) / np.maximum(relative[mine], TINY)
    reached = np.where(relative >= 1, probabilities[checked], -1)
    best = reached.argmax(axis=1)
    wrong = np.flatnonzero((reached.max(axis=1) > 0) & (best != labels[checked]))
    order = wrong[np.argsort(own[checked[wrong]], kind="stable")]
    return checked[order], best[order], odds

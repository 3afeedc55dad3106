"""Choosing settings on rows that the candidates were not fitted to; the test split is never used.

Candidates are fitted to one part of train and scored on the other. On n held-out rows an accuracy p
has a standard error of sqrt(p (1 - p) / n), so candidates closer to the best than that cannot be
told apart by accuracy. Among them the least held-out loss wins, of the kind that the solver
minimizes (cross-entropy, squared error): it varies less by chance, and a low loss means reliable
probabilities. Nearest neighbors have no loss: there the best accuracy wins, and among equals the
largest k. The winner is then fitted to all of train.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache
from featcache.config import JsonObject, TrainHeadConfig
from featcache.display import progress
from featcache.groups import assign_parts, kept_together
from featcache.heads.features import Floats, Ints
from featcache.heads.solvers.base import (
    HeldOutPredictions,
    NotConverged,
    Prepared,
    Settings,
    Solver,
)
from featcache.heads.training_data import (
    Rows,
    TrainRows,
    balanced_weights,
    check_classes,
    load_rows,
)

# Logits of a held-out part are kept up to this many values.
MAX_KEPT = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that won.

    Attributes:
        settings: The winner's.
        chosen_on: The rows that chose, in words.
        score: Its held-out accuracy, weighted as the rows are; None when there was nothing to
            choose.
        val_top1: Its plain held-out accuracy, likewise.
        best_score: The highest score of any candidate. Solvers are compared by it, since each of
            them is then equally favored by chance.
        table: Every candidate with its scores, in the order tried.
        logits: The winner's of each held-out part [M, C], where they were kept.
        prepared: The first pair's rows, ready to make them, where they were not.
    """

    settings: Settings
    chosen_on: str
    score: float | None = None
    val_top1: float | None = None
    best_score: float | None = None
    table: list[JsonObject] = field(default_factory=list)
    logits: list[Floats] | None = None
    prepared: Prepared | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Train, and how it is split to choose settings.

    Attributes:
        train: All train rows.
        pairs: Rows to fit and rows to score: one pair for a held-out part, one per fold for
            cross-validation; none when no row can be spared.
        name: What chooses, in words.
    """

    train: TrainRows
    pairs: Sequence[tuple[TrainRows, Rows]]
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemoryData:
    """A train split to learn from, in memory, as it is in the cache.

    Attributes:
        train: The rows.
        content: A digest per train row [N, 32] uint8.
        groups: The name of each train row's group [N], if there are groups.
        val: The dataset's own validation rows, if it has any.
        streamed: Whether rows are read anew at each pass.
    """

    train: Rows
    content: NDArray[np.uint8]
    groups: NDArray[np.str_] | None = None
    val: Rows | None = None
    streamed: bool = False

    def take(self, index: Ints) -> InMemoryData:
        """Some train rows alone, without a val split: choose on a part of them."""
        return InMemoryData(
            train=self.train.take(index),
            content=self.content[index],
            groups=self._groups_at(index),
        )

    def selection(self, config: TrainHeadConfig) -> Selection:
        """Weigh the rows as the command asks for, and set aside what chooses.

        The dataset's own val split is preferred to a held-out part of train. Groups and rows with
        equal digests stay together, so that a copy of a fitted row does not choose.

        Args:
            config: Has `class_weight`, `select`, `holdout`, `folds`, `seed`.

        Raises:
            UserError: Fewer than two classes have rows.
        """
        train = self.train
        counted = np.flatnonzero(train.weights)  # rows of weight 0 do not count
        if len(counted) < train.num_rows:
            train = train.take(counted)
        if train.values is None:
            check_classes(train.y, train.class_names)
        if config.class_weight == "balanced":
            weights = balanced_weights(train.y, train.weights, train.num_classes)
            train = dataclasses.replace(train, weights=weights)
        if self.val is not None and config.select == "holdout":
            name = f"the val split ({self.val.num_rows} rows)"
            return Selection(train=train, pairs=[(train, self.val)], name=name)
        cv = config.select == "cv"
        parts = assign_parts(
            train.y,
            kept_together(self.content[counted], self._groups_at(counted)),
            config.seed,
            fraction=None if cv else config.holdout,
            num_parts=config.folds if cv else 1,
            grouped=self.groups is not None,
        )
        pairs = [
            (train.take(np.flatnonzero(parts != part)), train.take(np.flatnonzero(parts == part)))
            for part in np.unique(parts[parts >= 0])
        ]
        how = "stratified" if self.groups is None else "groups kept together"
        if not pairs:
            what = "rows" if self.groups is None else "groups"
            name = f"nothing: no class has two different {what} to spare"
        elif cv:
            name = f"{config.folds}-fold cross-validation on train, {how}, seed {config.seed}"
        else:
            name = (
                f"a held-out {config.holdout:.0%} of train, {how}, seed {config.seed} "
                f"({pairs[0][1].num_rows} rows)"
            )
        return Selection(train=train, pairs=pairs, name=name)

    def _groups_at(self, index: Ints) -> NDArray[np.str_] | None:
        return None if self.groups is None else self.groups[index]


def load_data(cache: FeatureCache) -> InMemoryData:
    """Read what a head learns from.

    Raises:
        UserError: A row cannot be learned from.
    """
    split = cache.split("train")
    train = load_rows(split, cache.class_names)
    val = load_rows(cache.split("val"), cache.class_names) if cache.splits.get("val") else None
    return InMemoryData(train=train, content=split.content, groups=split.groups, val=val)


def choose_solver(
    solvers: Sequence[Solver], selection: Selection
) -> tuple[Solver, Choice, list[JsonObject]]:
    """Choose each solver's settings, then the solver with the best held-out score.

    Returns:
        Solver, choice, and, of several solvers, what each reached; ties go to the first.
    """
    if not selection.pairs:
        solvers = solvers[:1]  # nothing can tell them apart
    tried, compared = [], []
    for solver in solvers:
        start = time.perf_counter()
        choice = choose(solver, selection)
        seconds = time.perf_counter() - start
        tried.append((solver, choice))
        reached = {"score": choice.best_score, "seconds": seconds}
        compared.append({"solver": solver.name, **choice.settings, **reached})
    best = max(tried, key=lambda pair: pair[1].best_score or 0.0)
    return *best, compared if len(tried) > 1 else []


def choose(solver: Solver, selection: Selection) -> Choice:
    """Choose a solver's settings."""
    series = solver.series(selection.train.sample)
    if sum(map(len, series)) == 1:
        return Choice(settings=series[0][0], chosen_on="nothing: all settings were given")
    if not selection.pairs:
        return Choice(settings=solver.default(), chosen_on=selection.name)
    (fit_rows, held), *others = selection.pairs
    ready = solver.prepare(fit_rows, [settings for candidates in series for settings in candidates])
    grid = evaluate_grid(ready, series, held, solver.patience)
    tried = [settings for settings, _ in grid]
    for rows, scored in others:
        prepared = solver.prepare(rows, tried)
        for settings, scores in grid:
            scores.add(scored, prepared.predict(settings, scored))
    choice = best_candidate(grid, selection.name)
    return choice if choice.logits is not None else dataclasses.replace(choice, prepared=ready)


def held_out_logits(solver: Solver, choice: Choice, selection: Selection) -> list[Floats]:
    """Logits of each held-out part [M, C], of heads with the settings chosen.

    Raises:
        NotConverged: They were not kept, and the solver does not converge.
    """
    if choice.logits is not None:
        return choice.logits
    found, settings, ready = [], choice.settings, choice.prepared
    for rows, held in selection.pairs:
        prepared, ready = ready or solver.prepare(rows.sample, [settings]), None
        logits = prepared.predict(settings, held).logits
        if logits is None:
            logits = prepared.fit(settings).head.decision_function(held.plain)
        found.append(logits)
    return found


@dataclass
class HeldOutScores:
    """One candidate's scores on the held-out rows, over one part or several.

    Attributes:
        right: Weight of the rows classified correctly.
        weight: Weight of all rows.
        squares: Sum of the squared weights.
        hits: Number of rows classified correctly.
        rows: Number of all rows.
        loss: Weighted sum of the losses; None where the solver has none.
        logits: Of each part [M, C]; None where the solver has none, or they are not kept.
    """

    right: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    hits: int = 0
    rows: int = 0
    loss: float | None = 0.0
    logits: list[Floats] | None = field(default_factory=list)

    def add(self, held: Rows, predictions: HeldOutPredictions) -> None:
        """Add a held-out part."""
        correct = predictions.classes == held.y
        self.right += float(held.weights @ correct)
        self.weight += float(held.weights.sum())
        self.squares += float(held.weights @ held.weights)
        self.hits += int(correct.sum())
        self.rows += held.num_rows
        if predictions.losses is None or self.loss is None:
            self.loss = None
        else:
            self.loss += float(held.weights @ predictions.losses)
        if predictions.logits is None or predictions.logits.size > MAX_KEPT:
            self.logits = None
        elif self.logits is not None:
            self.logits.append(predictions.logits)

    @property
    def score(self) -> float:
        """Weighted accuracy; rounded, so that sums taken in another order do not break ties."""
        return round(self.right / self.weight, 12)

    @property
    def mean_loss(self) -> float:
        """Weighted mean loss; 0 where the solver has none."""
        return (self.loss or 0.0) / self.weight

    @property
    def standard_error(self) -> float:
        """Of the weighted accuracy; unequal weights count as fewer rows."""
        p = min(self.right / self.weight, 1.0)
        return math.sqrt(p * (1 - p) * self.squares) / self.weight

    def to_json(self) -> dict[str, float]:
        """Weighted accuracy, plain accuracy, and mean loss where there is one."""
        found = {"score": self.score, "top1": self.hits / self.rows}
        return found if self.loss is None else {**found, "loss": self.mean_loss}


Grid = list[tuple[Settings, HeldOutScores]]


def evaluate_grid(
    prepared: Prepared,
    series: list[list[Settings]],
    held: Rows,
    patience: int | None,
) -> Grid:
    """Score the candidates of each series in turn until it no longer gains.

    A candidate gains if it scores more than all before it, or as much with less loss.

    Args:
        prepared: The rows to be fitted, ready for all candidates.
        series: The candidates.
        held: The rows that score them.
        patience: See `Solver.patience`.

    Returns:
        The candidates tried, with their scores.

    Raises:
        NotConverged: Not even the first candidate converged.
    """
    grid: Grid = []
    bar = progress(sum(map(len, series)), "choosing settings", unit=" tried", late=True)
    for candidates in series:
        best, worse = (-1.0, 0.0), 0
        for settings in candidates:
            scores = HeldOutScores()
            try:
                scores.add(held, prepared.predict(settings, held))
            except NotConverged:
                if not grid:
                    raise
                break  # the rest of the series is regularized even less, which is harder
            grid.append((settings, scores))
            for _, other in grid[:-1]:
                if other.logits and other.score < scores.score - scores.standard_error:
                    other.logits = None  # it will not win
            bar.update()
            reached = (scores.score, -scores.mean_loss)
            worse = 0 if reached > best else worse + 1
            best = max(best, reached)
            if patience is not None and worse >= patience:
                break
    bar.close()
    return grid


def best_candidate(grid: Grid, chosen_on: str) -> Choice:
    """The best of the candidates tried, by the rule in the module's docstring."""
    winner = top = max(grid, key=lambda pair: pair[1].score)
    if top[1].loss is not None:
        least = top[1].score - top[1].standard_error
        near = [pair for pair in grid if pair[1].score >= least]
        winner = min(near, key=lambda pair: pair[1].mean_loss)
    settings, scores = winner
    return Choice(
        settings=settings,
        score=scores.score,
        val_top1=scores.hits / scores.rows,
        best_score=top[1].score,
        chosen_on=chosen_on,
        table=[{**settings, **scores.to_json()} for settings, scores in grid],
        logits=scores.logits,
    )

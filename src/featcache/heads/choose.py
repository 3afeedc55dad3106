"""Choosing settings on rows that the candidates were not fitted to; the test split has no say.

Candidates are fitted to one part of train and scored on the other. A held-out part of n rows knows
an accuracy p to within its standard error sqrt(p (1 - p) / n), so candidates nearer to the best
than that cannot be told apart by it. Among them the least held-out loss wins, of the kind that the
solver minimises (cross-entropy, squared error): it depends less on luck, and a low one means
probabilities that can be believed. Nearest neighbours have no loss: there the best accuracy wins,
and of equal ones the largest k. The winner is then fitted to all of train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import TrainHeadConfig
from featcache.heads.rows import Ints, Rows
from featcache.heads.solver import Answer, NotConverged, Prepared, Settings, Solver
from featcache.runtime import progress


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which settings won.

    Attributes:
        settings: The winner's.
        chosen_on: What chose, in words.
        score: Its held-out accuracy, weighted as the rows are; None when there was nothing to
            choose.
        val_top1: Its plain held-out accuracy, likewise.
        best_score: The highest score of any candidate; solvers are compared by it, as each of them
            then is as lucky as the others.
        table: Every candidate with its scores, in the order tried.
    """

    settings: Settings
    chosen_on: str
    score: float | None = None
    val_top1: float | None = None
    best_score: float | None = None
    table: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The parts that choose: pairs of rows to fit and rows to score.

    Attributes:
        pairs: One pair for a held-out part, one per fold for cross-validation; none when no row
            can be spared.
        name: What this is, in words.
    """

    pairs: list[tuple[Rows, Rows]]
    name: str


def make_selection(
    train: Rows, config: TrainHeadConfig, val: Rows | None = None, content: Any = None
) -> Selection:
    """Set aside what chooses.

    Args:
        train: All train rows.
        config: Says how (`select`, `holdout`, `folds`, `seed`).
        val: The dataset's own validation split, which wins over a held-out part of train.
        content: A digest per train row [N, B] uint8; rows with equal digests stay together, so
            that a copy of a fitted row does not choose. None lets every row stand for itself.
    """
    if val is not None and config.select == "holdout":
        return Selection(pairs=[(train, val)], name=f"the val split ({val.num_rows} rows)")
    groups = same_rows(content) if content is not None else np.arange(train.num_rows)
    num_parts = config.folds if config.select == "cv" else 1
    parts = assign_parts(
        train.y,
        groups,
        config.seed,
        fraction=config.holdout if num_parts == 1 else None,
        num_parts=num_parts,
    )
    pairs = []
    for part in range(num_parts):
        held = np.flatnonzero(parts == part)
        if held.size:
            pairs.append((train.take(np.flatnonzero(parts != part)), train.take(held)))
    if not pairs:
        return Selection(pairs=[], name="nothing: no class has two different rows to spare")
    if config.select == "cv":
        name = f"{num_parts}-fold cross-validation on train, stratified, seed {config.seed}"
    else:
        name = (
            f"a held-out {config.holdout:.0%} of train, stratified, seed {config.seed} "
            f"({pairs[0][1].num_rows} rows)"
        )
    return Selection(pairs=pairs, name=name)


def same_rows(content: NDArray[np.uint8]) -> Ints:
    """Number rows [N] so that rows with equal digests [N, B] have equal numbers."""
    keys = np.ascontiguousarray(content).view(f"V{content.shape[1]}").ravel()
    _, groups = np.unique(keys, return_inverse=True)
    return np.asarray(groups, np.int64)


def assign_parts(
    y: Ints, groups: Ints, seed: int, *, fraction: float | None, num_parts: int
) -> Ints:
    """Deal rows to parts, class by class, groups kept together.

    Args:
        y: Class indices [N].
        groups: Rows with equal numbers [N] go to the same part.
        seed: Of the dealing.
        fraction: Share of each class that part 0 gets; every class with at least two groups gives
            one and keeps one. None deals each class evenly to `num_parts` parts.
        num_parts: Number of parts when `fraction` is None.

    Returns:
        The part of each row, [N]; -1 for rows that are always fitted: a class's only group.
    """
    random = np.random.default_rng([seed, 0x5E1EC7])
    unique, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    part_of = np.full(len(unique), -1, np.int64)
    labels = y[first]
    offset = 0
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            continue
        if fraction is None:
            # Each class goes on where the last one ended, so that no part is always the larger.
            part_of[members] = (np.arange(len(members)) + offset) % num_parts
            offset += len(members)
        else:
            spared = min(max(round(fraction * len(members)), 1), len(members) - 1)
            part_of[members[:spared]] = 0
    return np.asarray(part_of[inverse], np.int64)


def choose(solver: Solver, train: Rows, selection: Selection) -> Choice:
    """Choose a solver's settings.

    Args:
        solver: What is to be fitted.
        train: All train rows.
        selection: What chooses.
    """
    series = solver.series(train)
    if given := only_candidate(series):
        return given
    if not selection.pairs:
        return Choice(settings=solver.fallback(), chosen_on=selection.name)
    (fit_rows, held), *others = selection.pairs
    tally = Tally()
    tried = walk(partial(solver.prepare, fit_rows), series, held, tally, solver.patience)
    for rows, scored in others:
        prepared = solver.prepare(rows, tried)
        for place, settings in enumerate(tried):
            tally.add(place, scored, prepared.answer(settings, scored))
    return tally.choice(tried, selection.name)


def only_candidate(series: list[list[Settings]]) -> Choice | None:
    """The choice when there is none to make."""
    if sum(map(len, series)) > 1:
        return None
    return Choice(settings=series[0][0], chosen_on="nothing: all settings were given")


def walk(
    prepare: Callable[[list[Settings]], Prepared],
    series: list[list[Settings]],
    held: Rows,
    tally: Tally,
    patience: int | None,
) -> list[Settings]:
    """Score the candidates of each series in turn until it no longer gains.

    A candidate gains if it scores more than all before it, or as much with less loss.

    Args:
        prepare: Makes the rows to be fitted ready for some candidates.
        series: The candidates.
        held: The rows that score them.
        tally: Takes the scores, by place among those tried.
        patience: See `Solver.patience`.

    Returns:
        The candidates tried.

    Raises:
        NotConverged: Not even the first candidate did.
    """
    tried: list[Settings] = []
    bar = progress(sum(map(len, series)), "choosing settings", unit=" tried", late=True)
    for candidates in series:
        prepared = prepare(candidates)
        best, worse = (-1.0, 0.0), 0
        for settings in candidates:
            try:
                answer = prepared.answer(settings, held)
            except NotConverged:
                if not tried:
                    raise
                break  # the series goes on to ever weaker regularisation, which is harder
            tally.add(len(tried), held, answer)
            scores = tally.scores(len(tried))
            reached = (scores["score"], -scores.get("loss", 0.0))
            tried.append(settings)
            bar.update()
            worse = 0 if reached > best else worse + 1
            best = max(best, reached)
            if patience is not None and worse >= patience:
                break
    bar.close()
    return tried


@dataclass
class Count:
    """Sums over the held-out rows of one candidate.

    Attributes:
        right: Weight of the rows classified rightly.
        weight: Of all rows.
        squares: Sum of the squared weights.
        hits: Rows classified rightly.
        rows: All rows.
        loss: Weighted; None where the solver has none.
    """

    right: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    hits: int = 0
    rows: int = 0
    loss: float | None = 0.0

    def scores(self) -> dict[str, float]:
        """Weighted accuracy, plain accuracy, and mean loss where there is one."""
        # Rounded, so that sums taken in another order do not break ties.
        scores = {"score": round(self.right / self.weight, 12), "top1": self.hits / self.rows}
        return scores if self.loss is None else {**scores, "loss": self.loss / self.weight}

    def standard_error(self) -> float:
        """Of the weighted accuracy; unequal weights count as fewer rows."""
        p = min(self.right / self.weight, 1.0)
        return math.sqrt(p * (1 - p) * self.squares) / self.weight


class Tally:
    """What each candidate reached, over one held-out part or several."""

    def __init__(self) -> None:
        self._counts: dict[int, Count] = {}

    def add(self, place: int, held: Rows, answer: Answer) -> None:
        """Count a candidate's answer to a held-out part."""
        count = self._counts.setdefault(place, Count())
        correct = answer.classes == held.y
        count.right += float(held.weights @ correct)
        count.weight += float(held.weights.sum())
        count.squares += float(held.weights @ held.weights)
        count.hits += int(correct.sum())
        count.rows += held.num_rows
        if answer.losses is None or count.loss is None:
            count.loss = None
        else:
            count.loss += float(held.weights @ answer.losses)

    def scores(self, place: int) -> dict[str, float]:
        """See `Count.scores`."""
        return self._counts[place].scores()

    def choice(self, tried: list[Settings], chosen_on: str) -> Choice:
        """The best of the candidates tried, as the module's first lines say."""
        table = [{**settings, **self.scores(place)} for place, settings in enumerate(tried)]
        best = max(range(len(table)), key=lambda place: float(table[place]["score"]))
        best_score = float(table[best]["score"])
        if self._counts[best].loss is not None:
            least = best_score - self._counts[best].standard_error()
            near = [place for place, row in enumerate(table) if float(row["score"]) >= least]
            best = min(near, key=lambda place: float(table[place]["loss"]))
        return Choice(
            settings=tried[best],
            score=float(table[best]["score"]),
            val_top1=float(table[best]["top1"]),
            best_score=best_score,
            chosen_on=chosen_on,
            table=table,
        )

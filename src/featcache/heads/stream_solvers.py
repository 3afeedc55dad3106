"""How each solver chooses and fits when train is a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from featcache.cache import FeatureSplit
from featcache.config import TrainHeadConfig
from featcache.errors import UserError
from featcache.heads.choose import Choice, Selection, Tally, choose, only_candidate, walk
from featcache.heads.closed_solvers import PreparedRidge, RidgeSolver
from featcache.heads.halves import widen
from featcache.heads.lbfgs import minimise
from featcache.heads.linear import LinearHead
from featcache.heads.logistic import LogisticProblem, StrengthPath
from featcache.heads.logistic_solver import LogisticSolver, check_converged, head_of_fit
from featcache.heads.moments import Moments, ScaleSums
from featcache.heads.ridge import moments_of
from featcache.heads.row_stream import READ_ROWS, RowStream, draw_sample, read_ahead, within
from featcache.heads.rows import Ints, Rows
from featcache.heads.softmax_loss import Block, SoftmaxLoss
from featcache.heads.solver import Fitted, Prepared, Settings, Solver
from featcache.heads.steps import Epoch
from featcache.heads.steps_solver import PreparedSteps, StepsSolver


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FirstPass:
    """What one pass over train leaves in memory.

    Attributes:
        held: The held-out rows.
        sample: A sample of the others.
        scale: Sums over all the others, for mean and deviation.
        sums: Moments of all the others, if asked for.
    """

    held: Rows
    sample: Rows
    scale: ScaleSums
    sums: Moments | None

    def whole_scale(self) -> ScaleSums:
        """Sums over all rows, the held-out ones among them."""
        whole = dataclasses.replace(
            self.scale, first=self.scale.first.copy(), square=self.scale.square.copy()
        )
        for view in self.held.views:
            whole.add(widen(view), self.held.weights / len(self.held.views))
        return whole

    def whole_sums(self) -> Moments:
        """Moments of all rows, the held-out ones among them."""
        assert self.sums is not None
        return self.sums.plus(moments_of(self.held, self.sums.shift))


def first_pass(config: TrainHeadConfig, stream: RowStream, *, closed_form: bool) -> FirstPass:
    """Read everything once.

    Args:
        config: Has the seed of the sample.
        stream: Train.
        closed_form: Whether moments are wanted.
    """
    sampled = draw_sample(config, stream)
    parts = {"held": _Parts(stream.held), "sample": _Parts(sampled)}
    scale: ScaleSums | None = None
    sums: Moments | None = None
    # Memory asked for anew with every block would cost as much as the arithmetic.
    buffer = np.empty((READ_ROWS, stream.feature_dim), np.float32)
    for view, rows, raw in read_ahead(stream.all_reads):
        for part in parts.values():
            part.add(view, rows, raw)
        X = widen(raw, buffer[: len(raw)])
        weights = stream.weights(rows) / stream.split.num_views
        weights[within(stream.held, rows)] = 0.0  # counts for nothing
        if scale is None:
            shift = X.mean(axis=0, dtype=np.float64)
            scale = ScaleSums.empty(shift)
            sums = Moments.empty(shift, stream.num_classes) if closed_form else None
        if sums is None:
            scale.add(X, weights)
        else:
            sums.add(X, stream.split.y[rows], weights)
    stream.checked = True
    assert scale is not None
    if sums is not None:
        scale = sums.scale()
    held, sample = parts["held"].rows(stream), parts["sample"].rows(stream)
    return FirstPass(held=held, sample=sample, scale=scale, sums=sums)


class _Parts:
    """Collects some rows, all their views, from blocks that pass by."""

    def __init__(self, index: Ints) -> None:
        self._index = index
        self._views: dict[int, list[Any]] = {}

    def add(self, view: int, rows: slice, features: Any) -> None:
        self._views.setdefault(view, []).append(features[within(self._index, rows)])

    def rows(self, stream: RowStream) -> Rows:
        views = [np.concatenate(blocks) for blocks in self._views.values()]
        return Rows(
            views=np.stack(views),
            y=stream.split.y[self._index],
            weights=stream.weights(self._index),
            num_classes=stream.num_classes,
        )


def choose_streamed(solver: Solver, stream: RowStream, first: FirstPass, name: str) -> Choice:
    """Choose a solver's settings on the held-out rows.

    Args:
        solver: logistic, ridge, adam or sgd.
        stream: Train.
        first: What the first pass left.
        name: What the held-out rows are, in words.
    """
    if isinstance(solver, LogisticSolver):
        return choose(
            solver, first.sample, Selection(pairs=[(first.sample, first.held)], name=name)
        )
    series = solver.series(first.sample)
    if given := only_candidate(series):
        return given

    def prepare(some: list[Settings]) -> Prepared:
        if isinstance(solver, StepsSolver):
            train = partial(train_steps_streamed, solver, stream, first, whole=False)
            return PreparedSteps(train, some)
        assert isinstance(solver, RidgeSolver)
        return PreparedRidge(solver.class_names, first.sample, some, first.sums)

    tally = Tally()
    return tally.choice(walk(prepare, series, first.held, tally, None), name)


def fit_ridge_streamed(solver: RidgeSolver, settings: Settings, first: FirstPass) -> Fitted:
    """Fit all rows without reading any again."""
    sums = first.whole_sums()
    return PreparedRidge(solver.class_names, first.sample, [settings], sums).fit(settings)


def fit_logistic_streamed(
    solver: LogisticSolver, settings: Settings, stream: RowStream, first: FirstPass
) -> Fitted:
    """Fit all rows to convergence, a pass over the file per evaluation.

    Raises:
        NotConverged: With what to try.
    """
    strength, scaled = float(settings["strength"]), bool(settings["standardize"])
    whole = first.whole_scale()
    present = np.flatnonzero(stream.class_counts())
    near = LogisticProblem(first.sample, scale=(whole.mean(), whole.deviation()), present=present)
    path = StrengthPath(near, standardize=scaled)
    path.fit(strength)
    start = path.last()
    loss = streamed_loss(stream, near, whole.total, standardize=scaled)
    solution = minimise(
        loss,
        near.penalty(strength, whole.total),
        near.spectrum(standardize=scaled),
        start.point,
        start,
    )
    fit = near.raw(solution, standardize=scaled)
    check_converged(fit, strength)
    return Fitted(
        head=head_of_fit(fit, solver.class_names, "logistic"),
        num_passes=fit.num_passes,
        objective=fit.objective,
    )


def streamed_loss(
    stream: RowStream, near: LogisticProblem, total: float, *, standardize: bool
) -> SoftmaxLoss:
    """The loss over all rows, centred and scaled as in `near`, read anew at each evaluation.

    Args:
        stream: Train.
        near: Has mean, deviation and classes.
        total: Sum of all weights.
        standardize: Whether features are scaled to unit deviation.
    """
    mean = near.mean.astype(np.float32)
    inverse = (1 / near.deviation).astype(np.float32)
    place = np.zeros(stream.num_classes, np.int64)
    place[near.present] = np.arange(len(near.present))

    def ready() -> Iterator[Block]:
        for raw, y, weights in stream.blocks(with_held=True):
            X = widen(raw) - mean
            if standardize:
                X *= inverse
            yield X, place[y], (weights / total).astype(np.float32)

    counts = stream.class_counts() * stream.class_factor
    return SoftmaxLoss(
        blocks=lambda: read_ahead(ready),
        feature_dim=stream.feature_dim,
        num_classes=len(near.present),
        class_share=counts[near.present] / total,
    )


def train_steps_streamed(
    solver: StepsSolver,
    stream: RowStream,
    first: FirstPass,
    candidates: Sequence[Settings],
    *,
    whole: bool,
) -> Iterator[tuple[Epoch, list[LinearHead]]]:
    """Train on shuffled windows; yields the heads after each epoch.

    Args:
        solver: adam or sgd.
        stream: Train.
        first: Has mean and deviation.
        candidates: Trained together; they agree on standardisation.
        whole: Whether the held-out rows are trained on.
    """
    config = solver.config
    scale = None
    if candidates[0]["standardize"]:
        sums = first.whole_scale() if whole else first.scale
        scale = (sums.mean(), sums.deviation())
    batches = stream.batches(config.batch_size, config.seed, scale, with_held=whole)
    return solver.epochs_of(batches, stream.feature_dim, scale, candidates)


def refuse_unstreamable(config: TrainHeadConfig, split: FeatureSplit) -> None:
    """Refuse what needs all rows in memory.

    Raises:
        UserError: Naming the flag.
    """
    logistic_elsewhere = config.solver == "logistic" and config.backend in ("sklearn", "torch")
    for flag, asked in (
        ("--solver knn", config.solver == "knn"),
        ("--select cv", config.select == "cv"),
        (f"--backend {config.backend}", logistic_elsewhere),
        ("--shots", config.shots is not None),
    ):
        if asked:
            size = split.num_views * len(split) * split.dim * 4 / 2**30
            why = "--stream on" if config.stream == "on" else f"{size:.1f} GiB of train features"
            raise UserError(
                f"{flag} needs all rows in memory, which {why} rules out: leave it out, or give "
                "--stream off"
            )

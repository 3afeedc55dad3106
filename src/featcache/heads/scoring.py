"""The test split: what a head predicts of it, and what the predictions are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache
from featcache.config import JsonObject, TrainHeadConfig
from featcache.groups import is_copy
from featcache.heads.features import Doubles, Floats, Ints, Singles
from featcache.heads.files import Head
from featcache.heads.linear import softmax
from featcache.heads.training_data import (
    BLOCK_ROWS,
    check_finite,
    classes_of,
    load_rows,
    surely_finite,
)
from featcache.results.metrics import without_leaks
from featcache.results.runs import Evaluation, evaluate

# Probabilities of all classes are kept for a test split of at most this many.
MAX_KEPT = 1 << 24
# Test rows that are compared with held-out ones, if they are not more, and levels to report.
MAX_JUDGED, LEVELS = 20_000, (0.01, 0.05, 0.1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TestPredictions:
    """What a head says of the test rows.

    Attributes:
        classes: Predicted classes [N].
        confidence: The probability given to each [N].
        uncalibrated: The same with a temperature of one [N].
        probabilities: Of all classes [N, C]; None where they would take too much memory.
        p_values: How usual each row is among held-out ones [N]; None where the head cannot tell,
            or the rows are too many.
    """

    __test__ = False  # pytest: not a test

    classes: Ints
    confidence: Singles
    uncalibrated: Singles
    probabilities: Singles | None
    p_values: Doubles | None

    def rejections(self, correct: NDArray[np.bool_]) -> list[dict[str, float | None]]:
        """What `predict --reject` would do at some levels.

        Args:
            correct: Whether each row was classified correctly [N].

        Returns:
            Per level, the share of rows called unknown and the accuracy on the others.
        """
        if self.p_values is None:
            return []
        found: list[dict[str, float | None]] = []
        for level in LEVELS:
            known = self.p_values > level
            answered = float(correct[known].mean()) if known.any() else None
            found.append(
                {"level": level, "unknown": float((~known).mean()), "answered_top1": answered}
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class TestSplit:
    """The rows that heads are scored on, block by block.

    Attributes:
        y: Class indices [N].
        ids: N sample ids.
        groups: Each row's group [N], if there are groups.
        leaked: Which rows are for images that train or val has too, [N]; None if not known.
        num_views: Views that count: all with --tta, else the plain one.
        blocks: Makes an iterator of consecutive rows: features [n, D] of each view that counts.
    """

    __test__ = False  # pytest: not a test

    y: Ints
    ids: list[str]
    groups: NDArray[np.str_] | None = None
    leaked: NDArray[np.bool_] | None = None
    num_views: int
    blocks: Callable[[], Iterator[list[Floats]]]

    @property
    def num_rows(self) -> int:
        """Number N of rows."""
        return len(self.y)

    @property
    def name(self) -> str:
        """What was scored, in words."""
        views = f"mean over {self.num_views} views" if self.num_views > 1 else "view 0"
        return f"test, {views} ({self.num_rows} rows)"

    def predict(self, head: Head) -> TestPredictions:
        """Predict every row; probabilities are means over the views that count."""
        kept = self.num_rows * len(head.class_names) <= MAX_KEPT
        blocks: list[tuple[Ints, Singles, Singles]] = []
        tables: list[Singles] = []
        p_values: list[Doubles] = []
        judged = head.known is not None and self.num_rows <= MAX_JUDGED
        for views in self.blocks():
            logits = [head.decision_function(view) for view in views]
            table = np.mean([head.decision.probabilities(z) for z in logits], axis=0)
            plain = np.mean([softmax(z) for z in logits], axis=0)
            classes = head.decision.classes(table)
            own = (np.arange(len(classes)), classes)
            blocks.append((classes, table[own].astype(np.float32), plain[own].astype(np.float32)))
            if kept:
                tables.append(table.astype(np.float32))
            if judged and head.known is not None:
                p_values.append(head.known.p_values(views[0], table.max(axis=1)))
        classes, confidence, plain = (np.concatenate(p) for p in zip(*blocks, strict=True))
        return TestPredictions(
            classes=classes,
            confidence=confidence,
            uncalibrated=plain,
            probabilities=np.concatenate(tables) if kept else None,
            p_values=np.concatenate(p_values) if judged else None,
        )

    def without_leaks(self, found: TestPredictions) -> JsonObject | None:
        """The score without leaked rows; None if there are none."""
        return None if self.leaked is None else without_leaks(self.y, found.classes, self.leaked)

    def evaluate(self, found: TestPredictions, head: Head, seed: int) -> Evaluation:
        """What a head's predictions are worth.

        Args:
            found: What `predict` returned.
            head: Made them.
            seed: Of the bootstrap.
        """
        return evaluate(
            self.y,
            found.classes,
            found.probabilities,
            ids=self.ids,
            class_names=head.class_names,
            confidence=found.confidence,
            uncalibrated=found.uncalibrated,
            temperature=head.decision.temperature,
            fitted_on=head.decision.fitted_on,
            groups=self.groups,
            seed=seed,
        )


def open_test(config: TrainHeadConfig, cache: FeatureCache, *, in_memory: bool) -> TestSplit:
    """The test split, mapped, or read anew each time in bounded memory.

    Raises:
        UserError: A row cannot be scored.
    """
    split = cache.split("test")
    num_views = split.num_views if config.tta else 1
    mapped = load_rows(split, cache.class_names).views[:num_views] if in_memory else None

    def blocks() -> Iterator[list[Floats]]:
        if mapped is not None:
            for start in range(0, mapped.shape[1], BLOCK_ROWS):
                yield list(mapped[:, start : start + BLOCK_ROWS])
            return
        for start in range(0, split.num_places, BLOCK_ROWS):
            places = range(start, min(start + BLOCK_ROWS, split.num_places))
            kept, features = split.read(places)
            views = [features, *(split.read(places, v)[1] for v in range(1, num_views))]
            for view in views:
                if not surely_finite(view):
                    check_finite(view, split.ids[kept], "test")
            if len(features):
                yield views

    others = [cache.split(name).content for name in cache.splits if name != "test"]
    return TestSplit(
        y=classes_of(split),
        ids=split.ids,
        groups=split.groups,
        leaked=is_copy(split.content, others),
        num_views=num_views,
        blocks=blocks,
    )

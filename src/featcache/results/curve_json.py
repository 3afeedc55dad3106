"""Points of a learning curve as JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from featcache.errors import UserError
from featcache.results.learning_curve import Point, Side

MAX_COUNT = 10**15
MAX_SECONDS = 1e10


def points_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Plain values, what follows from the points included."""
    return [
        {
            **dataclasses.asdict(point),
            "difference": point.difference,
            "seconds_per_point": point.seconds_per_point,
            "pays_after_trials": point.pays_after_trials,
        }
        for point in points
    ]


def points_from_json(values: Any) -> list[Point]:
    """Rebuild what `points_json` made and JSON carried.

    Raises:
        UserError: It is something else.
    """
    try:
        return [_point(dict(value)) for value in values]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"not the points of a learning curve: {error}") from error


def _point(value: dict[str, Any]) -> Point:
    num_train, num_test = int(value["num_train"]), int(value["num_test"])
    if not (0 < num_train < MAX_COUNT and 0 < num_test < MAX_COUNT):
        raise ValueError(f"{num_train} train and {num_test} test images")
    if value["verdict"] not in ("cached", "finetune", "undecided", "unmeasured"):
        raise ValueError(f"verdict {value['verdict']!r:.40}")
    return Point(
        size=str(value["size"]),
        num_train=num_train,
        num_test=num_test,
        cached=_side(value["cached"]),
        finetune=_side(value["finetune"]),
        p_value=_known(value["p_value"]),
        verdict=value["verdict"],
        baseline_top1=_known(value.get("baseline_top1")),
        imbalanced=value.get("imbalanced") is True,
    )


def _side(value: Any) -> Side | None:
    if value is None:
        return None
    low, high = value["interval"]
    return Side(
        top1=_number(value["top1"], 1.0),
        interval=(_number(low, 1.0), _number(high, 1.0)),
        top1_by_seed={int(k): _number(top1, 1.0) for k, top1 in value["top1_by_seed"].items()},
        cost_seconds=_number(value["cost_seconds"], MAX_SECONDS),
        trial_seconds=_number(value["trial_seconds"], MAX_SECONDS),
        balanced_top1=_known(value.get("balanced_top1")),
    )


def _known(value: Any) -> float | None:
    """A share; what a file of 0.1.0 does not tell stays None."""
    return None if value is None else _number(value, 1.0)


def _number(value: Any, most: float) -> float:
    number = float(value)
    if not 0 <= number <= most:  # also refuses NaN
        raise ValueError(f"{number} is not between 0 and {most:g}")
    return number

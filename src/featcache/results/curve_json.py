"""The points of a learning curve as JSON: what `compare` writes and `report` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from featcache.config import JsonObject
from featcache.errors import UserError
from featcache.results.learning_curve import CurvePoint, ModeScores

MAX_COUNT = 10**15
MAX_SECONDS = 1e10


def curve_to_json(points: Sequence[CurvePoint]) -> list[JsonObject]:
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


def curve_from_json(values: Any) -> list[CurvePoint]:
    """Rebuild what `curve_to_json` made and JSON carried.

    Raises:
        UserError: It is not that.
    """
    try:
        return [_point_from_json(dict(value)) for value in values]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"not the points of a learning curve: {error}") from error


def _point_from_json(value: JsonObject) -> CurvePoint:
    num_train, num_test = int(value["num_train"]), int(value["num_test"])
    if not (0 < num_train < MAX_COUNT and 0 < num_test < MAX_COUNT):
        raise ValueError(f"{num_train} train and {num_test} test images")
    if value["verdict"] not in ("cached", "finetune", "undecided", "unmeasured"):
        raise ValueError(f"verdict {value['verdict']!r:.40}")
    return CurvePoint(
        size=str(value["size"]),
        num_train=num_train,
        num_test=num_test,
        cached=_scores_from_json(value["cached"]),
        finetune=_scores_from_json(value["finetune"]),
        p_value=_optional_share(value["p_value"]),
        verdict=value["verdict"],
        baseline_top1=_optional_share(value.get("baseline_top1")),
        imbalanced=value.get("imbalanced") is True,
        only_cached=_optional_count(value.get("only_cached")),
        only_finetune=_optional_count(value.get("only_finetune")),
        num_shifted=_optional_count(value.get("num_shifted")),
        shifted_p_value=_optional_share(value.get("shifted_p_value")),
        tail=_scores_from_json(value.get("tail")),
    )


def _scores_from_json(value: Any) -> ModeScores | None:
    if value is None:
        return None
    low, high = value["interval"]
    return ModeScores(
        top1=_number(value["top1"], 1.0),
        interval=(_number(low, 1.0), _number(high, 1.0)),
        top1_by_seed={int(k): _number(top1, 1.0) for k, top1 in value["top1_by_seed"].items()},
        cost_seconds=_number(value["cost_seconds"], MAX_SECONDS),
        trial_seconds=_number(value["trial_seconds"], MAX_SECONDS),
        balanced_top1=_optional_share(value.get("balanced_top1")),
        features={str(k)[:80]: int(v) for k, v in value.get("features", {}).items()},
        held_out={str(k)[:80]: _number(v, 1.0) for k, v in value.get("held_out", {}).items()},
        shifted_top1=_optional_share(value.get("shifted_top1")),
    )


def _optional_share(value: Any) -> float | None:
    """A share; None where it is missing, as in files of 0.1.0."""
    return None if value is None else _number(value, 1.0)


def _optional_count(value: Any) -> int | None:
    """A number of images; None where it is missing."""
    return None if value is None else int(_number(value, MAX_COUNT))


def _number(value: Any, most: float) -> float:
    number = float(value)
    if not 0 <= number <= most:  # also refuses NaN
        raise ValueError(f"{number} is not between 0 and {most:g}")
    return number

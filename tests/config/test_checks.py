"""Records from JSON: brought to their fields' types, or refused by the name of the field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest

from featcache.config import Preprocessing
from featcache.config.checks import record_from_json
from featcache.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    side: int
    share: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["flip", "crop"]
    inner: Inner
    many: tuple[Inner, ...] = ()
    interval: tuple[float, float] | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    done: bool = False


GOOD: dict[str, Any] = {
    "name": "é 猫",
    "kind": "flip",
    "inner": {"side": 3},
    "many": [{"side": 1, "share": 1}],
    "interval": [0, 1.5],
    "counts": {"a": 2},
    "lines": ["x"],
    "more": {"open": [None, {}]},
    "done": True,
}


def test_a_record_comes_back_with_its_types() -> None:
    record = record_from_json(Outer, json.loads(json.dumps(GOOD)))
    assert record == Outer(
        name="é 猫",
        kind="flip",
        inner=Inner(side=3),
        many=(Inner(side=1, share=1.0),),
        interval=(0.0, 1.5),
        counts={"a": 2},
        lines=["x"],
        more={"open": [None, {}]},
        done=True,
    )
    assert type(record.many[0].share) is float
    assert record_from_json(Outer, dataclasses.asdict(record)) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name: '3' is not text"),
        ({"name": None}, "name: 'None' is not text"),
        ({"name": "a\x1b[2J"}, "name: 'a\\x1b[2J' is not text"),
        ({"name": "\ud800"}, "name: '\\ud800' is not text"),
        ({"kind": "x"}, "kind: no choice 'x'; known: crop, flip"),
        ({"kind": ["flip"]}, "kind: no choice \"['flip']\"; did you mean flip?; known: crop, flip"),
        ({"inner": 3}, "inner: '3' is not an object with named fields"),
        ({"inner": {}}, "inner: no field 'side'"),
        ({"inner": {"side": 3, "x": 1}}, "inner: unknown field 'x'"),
        ({"inner": {"side": True}}, "inner.side: 'True' is not a whole number"),
        ({"inner": {"side": 3.0}}, "inner.side: '3.0' is not a whole number"),
        ({"inner": {"side": 3, "share": "1"}}, "inner.share: '1' is not a number"),
        ({"inner": {"side": 3, "share": float("nan")}}, "inner.share: 'nan' is not a number"),
        ({"many": [{"side": 1}, {"side": None}]}, "many.side: 'None' is not a whole number"),
        ({"many": {"side": 1}}, "many: \"{'side': 1}\" is not a list"),
        ({"many": "text"}, "many: 'text' is not a list"),
        ({"interval": [1]}, "interval: '[1]' is not a list of 2"),
        ({"counts": {"a": "2"}}, "counts: '2' is not a whole number"),
        ({"counts": []}, "counts: '[]' is not an object with named fields"),
        ({"lines": [3]}, "lines: '3' is not text"),
        ({"done": 1}, "done: '1' is not True or False"),
        ({"other": 1}, "unknown field 'other'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        record_from_json(Outer, GOOD | change)
    assert str(caught.value) == message


def test_numbers_too_large_for_a_float_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^share: '10{79}' is not a number$"):
        record_from_json(Inner, {"side": 1, "share": 10**400})


def test_unknown_fields_can_be_ignored_and_ranges_are_the_records_own() -> None:
    assert record_from_json(Inner, {"side": 1, "new": 2}, ignore_unknown=True) == Inner(side=1)
    with pytest.raises(ValueError, match="image-px 4 is out of range"):
        record_from_json(Preprocessing, {"image_px": 4, "resize": "crop", "resize_px": 9})
    for value in (None, [], "x", 3):
        with pytest.raises(ValueError, match="is not an object with named fields"):
            record_from_json(Inner, value)


def test_values_that_cannot_be_shown_are_named_by_type() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^side: a value of type list is not a whole number$"):
        record_from_json(Inner, {"side": deep})
    with pytest.raises(ValueError, match=r"^share: a value of type int is not a number$"):
        record_from_json(Inner, {"side": 1, "share": 10**5000})

"""Checks of values that others give us: settings from Python, and records from parsed JSON.

Both are dataclasses whose annotations say what each field may be. The command line is parsed by
type already; numbers are also checked against their ranges here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from featcache.errors import UserError, one_of

# Settings of type str that may be paths.
NAMES_OR_PATHS = ("dataset", "inputs", "weights")

# Control characters; Python reads bytes that are not UTF-8 as lone surrogates.
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f\ud800-\udfff]").search

MAX_PATTERN = 500
"""Characters of a regular expression."""

Record = TypeVar("Record")
Converter = Callable[[str, Any], Any]
"""Takes a field's name, for messages, and its value; returns the value as the field's type."""


def check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise UserError unless `value` is None or a number in [low, high]."""
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    raise UserError(f"{_flag(name)} {value} is out of range: give a number {wanted}")


def check_positive(name: str, value: float | None) -> None:
    """Raise UserError unless `value` is None or a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError(f"{_flag(name)} {value} is out of range: give a number above 0")


def check_pattern(name: str, value: str | None) -> None:
    """Raise UserError unless `value` is None or a regular expression with a capture group."""
    if value is None:
        return
    example = r"for example 'patient(\d+)_'"
    try:
        num_groups = re.compile(value).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{_flag(name)} {value!r:.80} is not a regular expression: {error}; give one with a "
            f"capture group, {example}"
        ) from None
    if not num_groups or len(value) > MAX_PATTERN or not value.isprintable():
        raise UserError(
            f"{_flag(name)} {value!r:.80}: give a regular expression of at most {MAX_PATTERN} "
            f"characters with a capture group, {example}"
        )


def check_types(config: Any) -> None:
    """Check the types of settings that were built in Python; convert what is close enough.

    Text may stand for a path and a path for text, a list for a tuple, a whole number for a float,
    and NumPy's numbers for Python's. A leading ~ in a path becomes the home folder.

    Raises:
        UserError: A value has another type, or is not one of the field's choices.
    """
    kind: Any = type(config)
    for name, hint in hints_of(kind).items():
        value = _converter(hint, False)(_flag(name), getattr(config, name))
        if name in NAMES_OR_PATHS:  # of --flag=~/x the shell leaves ~ as it is
            many = isinstance(value, tuple)
            value = tuple(map(_at_home, value)) if many else value and _at_home(value)
        object.__setattr__(config, name, value)


def record_from_json(kind: type[Record], value: object, *, ignore_unknown: bool = False) -> Record:
    """Build a dataclass from parsed JSON that may have been damaged or written by a stranger.

    Every value must have its field's type, nested dataclasses included. Lists become tuples where
    the field is a tuple, whole numbers become floats. Numbers must be finite, and text must be
    printable. Ranges are for the dataclass's own `__post_init__` to check. It is meant
    for every file that featcache reads: cache metadata, heads, reports and remembered facts.

    Args:
        kind: A dataclass. Field types: bool, int, float, str, Any, Literal, other dataclasses, and
            lists, tuples, dicts and optional values of these.
        value: What `json.loads` returned, or `dataclasses.asdict`.
        ignore_unknown: Drop names that are not fields of `kind` instead of refusing them.

    Raises:
        ValueError: The first thing that is wrong, in one line that names the field.
    """
    record: Record = _record(kind, value, "", ignore_unknown)
    return record


def is_printable(text: str) -> bool:
    """Whether text can be stored in a file and printed in a one-line message."""
    return not _UNPRINTABLE(text)


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """A dataclass's fields and their types, annotations evaluated."""
    return get_type_hints(kind)


def _record(kind: Any, value: object, where: str, ignore_unknown: bool = False) -> Any:
    named = f"{where}: " if where else ""
    if not isinstance(value, dict):
        raise UserError(f"{named}{_shown(value)} is not an object with named fields")
    fields = dataclasses.fields(kind)
    unknown = value.keys() - {field.name for field in fields}
    if unknown and not ignore_unknown:
        raise UserError(f"{named}unknown field {min(unknown)!r:.80}")
    found = {}
    for field in fields:
        if field.name in value:
            convert = _converter(hints_of(kind)[field.name], True)
            inside = f"{where}.{field.name}" if where else field.name
            found[field.name] = convert(inside, value[field.name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{named}no field {field.name!r}")
    return kind(**found)


@functools.cache
def _converter(hint: Any, json: bool) -> Converter:
    """What converts a value to a type hint, by the rules for JSON or those for Python."""
    origin, args = get_origin(hint), get_args(hint)
    inner = [_converter(arg, json) for arg in args if origin is not Literal and _is_type(arg)]
    if origin in (Union, UnionType):
        (option,) = inner
        return lambda name, value: None if value is None else option(name, value)
    if origin in (tuple, list):
        fixed = len(args) if origin is tuple and args[-1] is not Ellipsis else None
        return functools.partial(_sequence, origin, inner if fixed else repeat(inner[0]), fixed)
    made: dict[Any, Converter] = {
        Literal: functools.partial(_choice, args),
        dict: functools.partial(_mapping, inner),
        Any: lambda name, value: value,
    }
    if (origin or hint) in made:
        return made[origin or hint]
    if dataclasses.is_dataclass(hint):
        return lambda name, value: _record(hint, value, name)
    return functools.partial(_scalar, hint, *(_FROM_JSON if json else _FROM_PYTHON)[hint])


def _is_type(argument: Any) -> bool:
    return argument not in (NoneType, Ellipsis)


def _choice(choices: tuple[Any, ...], name: str, value: Any) -> Any:
    if value in choices:
        return value
    raise UserError(f"{name}: {one_of(value, choices, 'choice')}")


def _sequence(
    kind: type, each: Iterable[Converter], length: int | None, name: str, value: Any
) -> Any:
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        of_length = "" if length is None else f" of {length}"
        raise UserError(f"{name}: {_shown(value)} is not a list{of_length}")
    return kind(convert(name, item) for convert, item in zip(each, value, strict=False))


def _mapping(inner: Sequence[Converter], name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{name}: {_shown(value)} is not an object with named fields")
    key, item = inner
    return {key(name, k): item(name, v) for k, v in value.items()}


def _scalar(hint: Any, accepted: Any, make: Callable[[Any], Any], name: str, value: Any) -> Any:
    if isinstance(value, accepted) and isinstance(value, bool) == (hint is bool):
        try:
            return make(value)
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{name}: {_shown(value)} is not {_WORDS[hint]}")


def _shown(value: Any) -> str:
    """A value in a message; one that is too deep or too long for text by its type."""
    try:
        return repr(str(value)[:80])
    except (RecursionError, ValueError):
        return f"a value of type {type(value).__name__}"


def _at_home(path: str | os.PathLike[str]) -> str:
    return os.path.expanduser(path)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError
    return float(number)


def _printable(text: str) -> str:
    if not is_printable(text):
        raise ValueError
    return text


# For each type, the types that are accepted for it and what converts them.
_FROM_PYTHON: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    bool: (bool, bool),
    int: (numbers.Integral, operator.index),
    float: (numbers.Real, float),
    str: ((str, os.PathLike), os.fspath),
    Path: ((str, os.PathLike), lambda path: Path(_at_home(path))),
}
_FROM_JSON: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    bool: (bool, bool),
    int: (int, int),
    float: ((int, float), _finite),
    str: (str, _printable),
}
_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

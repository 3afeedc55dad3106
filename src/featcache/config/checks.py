"""Checks of settings, worded for the command line; `settings` rewords them for Python."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from featcache.errors import UserError, one_of

# Settings of type str that may be paths.
NAMES_OR_PATHS = ("dataset", "inputs", "weights")


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


def check_types(config: Any, *, exact: bool = False) -> None:
    """Check that the fields of a frozen dataclass have their types; for callers from Python.

    The command line has done so. Paths may be given as text and text as paths, lists for tuples,
    whole numbers for floats. A leading ~ of a path becomes the home folder.

    Args:
        config: The dataclass.
        exact: For records that are stored or came from a file, nested ones included: nothing is
            converted, and text must be printable.

    Raises:
        UserError: A field has another type, or is none of the words that it may be.
    """
    kind: Any = type(config)
    hints = hints_of(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fitted = _fitted(field.name, value, hints[field.name], exact)
        if fitted is not value:
            object.__setattr__(config, field.name, fitted)


hints_of = functools.cache(get_type_hints)


def _fitted(name: str, value: Any, hint: Any, exact: bool) -> Any:
    """The value as the type hint has it; with `exact` it must be so already."""
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        (hint,) = (option for option in options if option is not NoneType)
        return None if value is None else _fitted(name, value, hint, exact)
    if kind is tuple and isinstance(value, tuple if exact else list | tuple):
        return tuple(_fitted(name, each, options[0], exact) for each in value)
    if kind is dict and isinstance(value, dict):
        key_hint, value_hint = options
        return {
            _fitted(name, key, key_hint, exact): _fitted(name, each, value_hint, exact)
            for key, each in value.items()
        }
    if dataclasses.is_dataclass(hint) and type(value) is hint:
        check_types(value, exact=exact)
        return value
    return _fitted_scalar(name, value, hint, exact)


def _fitted_scalar(name: str, value: Any, hint: Any, exact: bool) -> Any:
    label = name if exact else _flag(name)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise UserError(f"{label}: {one_of(value, get_args(hint), 'choice')}")
    if exact:
        # Surrogates can be written in JSON but not printed.
        if type(value) is hint and (hint is not str or value.isprintable()):
            return value
    elif isinstance(value, _ACCEPTED.get(hint, ())) and isinstance(value, bool) == (hint is bool):
        if hint is Path or name in NAMES_OR_PATHS:  # of --flag=~/x the shell leaves ~ as it is
            value = os.path.expanduser(value)
        return value if isinstance(value, hint) else _MADE_BY[hint](value)
    raise UserError(f"{label}: {str(value)[:80]!r} is no {_WORDS.get(hint, 'list')}")


_ACCEPTED: dict[Any, Any] = {
    bool: bool,
    int: numbers.Integral,
    float: numbers.Real,
    str: (str, os.PathLike),
    Path: (str, os.PathLike),
}
_MADE_BY: dict[Any, Any] = {int: operator.index, float: float, str: os.fspath, Path: Path}
_WORDS = {bool: "True or False", int: "whole number", float: "number", str: "text", Path: "path"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

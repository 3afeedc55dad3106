"""Checks of single settings, worded for the command line."""

from __future__ import annotations

import math

from featcache.errors import UserError


def check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise UserError unless `value` is None or a number in [low, high]."""
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    raise UserError(f"--{name.replace('_', '-')} {value} is out of range: give a number {wanted}")


def check_positive(name: str, value: float | None) -> None:
    """Raise UserError unless `value` is None or a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} {value} is out of range: give a number above 0")

"""Names as people give them: which mean a split, which are never data, which look alike."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
MAX_NAME_BYTES = 4096
"""The longest sample id that a cache holds."""

# Left by systems and tools; thumbnails lie in some of them.
_CLUTTER = {
    *("__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot"),
    *("$recycle.bin", "lost+found", "system volume information"),
}
_MAX_SHOWN = 3


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own, and so never data."""
    return name.startswith(".") or name.lower() in _CLUTTER


def is_printable(name: str) -> bool:
    """Whether a name can stand in a cache and in a one-line message."""
    # Python reads bytes that are not UTF-8 as lone surrogates.
    return not re.search("[\\x00-\\x1f\\x7f\ud800-\udfff]", name)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return " ".join(_composed(name).casefold().split())


def _as_number(name: str) -> float | str:
    try:
        number = float(name)
    except ValueError:
        return name
    return number if math.isfinite(number) else name


_LIKENESSES: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("the same letters in two Unicode forms, NFC and NFD", _composed),
    ("they differ only in case or spaces", _folded),
    ("the same number", _as_number),
)


def look_alikes(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Pairs of names that people may mean as one, and what makes them alike, in words."""
    found: dict[tuple[str, str], str] = {}
    for how, key in _LIKENESSES:
        first: dict[object, str] = {}
        for name in sorted(names):
            other = first.setdefault(key(name), name)
            if other != name:
                found.setdefault((other, name), how)
    return [(one, two, how) for (one, two), how in found.items()]


def alike_text(pairs: Sequence[tuple[str, str, str]]) -> str:
    """The first few such pairs as part of a sentence."""
    told = "; ".join(f"{one!r} and {two!r} ({how})" for one, two, how in pairs[:_MAX_SHOWN])
    return told + (f"; and {len(pairs) - _MAX_SHOWN} more" if len(pairs) > _MAX_SHOWN else "")


def left_out_note(places: Sequence[str]) -> str:
    """Say which files were left out because a cache cannot hold their names."""
    return (
        f"left out for names that are too long, not UTF-8, or have control characters: "
        f"{len(places)} ({', '.join(places[:_MAX_SHOWN])}{', …' * (len(places) > _MAX_SHOWN)})"
    )

"""What can go wrong, and how a command ends when it does.

FeatcacheError            exit code 1: not the user's making (disk, permission, a held lock)
├── StorageError          exit code 1: a file system refused or failed
└── UserError             exit code 2: the input is wrong (also a ValueError)
    └── CacheError        exit code 2: a file is not a cache, is damaged, stale or too new
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

FEW_CHOICES = 20


class FeatcacheError(Exception):
    """Base of every error that a command reports in one line.

    The message says what was given, what is accepted, and what to type next.
    """

    exit_code = 1


class StorageError(FeatcacheError):
    """The file system refused or failed: disk full, read-only, locked by another process."""


class UserError(FeatcacheError, ValueError):
    """The user's input is wrong."""

    exit_code = 2


class CacheError(UserError):
    """A file is not featcache's, is damaged, is of another version, or holds something else."""


def one_of(given: object, choices: Iterable[str], what: str) -> str:
    """Say in one sentence that `given` is none of `choices`, naming near matches.

    Args:
        given: What the user typed.
        choices: What is accepted.
        what: The kind of thing, for example "backbone".

    Returns:
        For example: "no backbone 'resnet81'; did you mean resnet18, resnet101?"; without a near
        match, or when there are few choices, all of them are listed.
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(given).lower(), known, n=3, cutoff=0.6)
    parts = [f"no {what} {str(given)[:200]!r}"]
    if near:
        parts.append(f"did you mean {', '.join(near)}?")
    if not near or len(known) <= FEW_CHOICES:
        parts.append(f"known: {', '.join(known)}")
    return "; ".join(parts)


def visible(text: str) -> str:
    """`text` with every character that would move the cursor or hide others written as an escape.

    For text that others chose (file names, class names, what files say) on its way to a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names with commas, and whether there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def shown(text: str, most: int = 160) -> str:
    """Text that others chose as part of a message: one line, printable, cut between words."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: 2 * most])
    if len(clean) <= most:
        return clean
    return (clean[:most].rpartition(" ")[0] or clean[:most]).rstrip(" ,.;:(") + " …"

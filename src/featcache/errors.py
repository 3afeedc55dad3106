"""The errors that a command reports in one line, and text for their messages.

FeatcacheError            exit code 1: base class
├── StorageError          exit code 1: the file system refused or failed, or a lock is held
└── UserError             exit code 2: the input is wrong (also a ValueError)
    └── CacheError        exit code 2: not a cache, damaged, too new, or of different settings
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
    """A file is not featcache's, is damaged, of another version, or made with other settings."""


def one_of(given: object, choices: Iterable[str], what: str) -> str:
    """A sentence that says that `given` is not among `choices`, with near matches.

    Args:
        given: What the user typed.
        choices: What is accepted.
        what: The kind of thing, for example "backbone".

    Returns:
        For example: "no backbone 'resnet81'; did you mean resnet18, resnet101?". All choices are
        listed if there is no near match or there are few of them.
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
    """`text` with unprintable characters escaped, so that it cannot control a terminal.

    For text from outside: file names, class names, contents of files.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, separated by commas; an ellipsis stands for the rest."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def shown(text: str, most: int = 160) -> str:
    """Text that others chose as part of a message: one line, printable, cut between words."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: 2 * most])
    if len(clean) <= most:
        return clean
    return (clean[:most].rpartition(" ")[0] or clean[:most]).rstrip(" ,.;:(") + " …"

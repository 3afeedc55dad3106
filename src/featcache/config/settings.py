"""The `settings` decorator: dataclasses that serve the command line and Python alike.

In Python, errors name fields instead of flags, and `help` explains every field.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from featcache.config.checks import hints_of
from featcache.config.records import JsonObject
from featcache.errors import FeatcacheError

T = TypeVar("T")

_on_command_line = ContextVar("on_command_line", default=False)
# A command to type keeps its flags; any other flag, and the word after it, may be a field.
_FLAGS = re.compile(
    r"(?P<command>\b(?:featcache [a-z]+|extract-features|train-head|finetune)\b(?:'s)?"
    r"(?: --?[\w-]+| [A-Z]\S*| \S*[/.]\S+| \d+)+)"
    r"|(?<![\w-])--(?P<no>no-)?(?P<flag>[A-Za-z](?:[a-z-]*[a-z])?)(?: (?P<word>\w+))?"
)


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Make errors name flags, for settings from a command line."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


@contextlib.contextmanager
def python_errors(config_class: type) -> Iterator[None]:
    """Make errors name a config's fields instead of flags, except on the command line."""
    try:
        yield
    except FeatcacheError as error:
        if not _on_command_line.get():
            error.args = (in_python(str(error), config_class),)
        raise


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose errors and help suit Python or the command line."""
    check = vars(cls).get("__post_init__")
    if check is not None:

        @functools.wraps(check)
        def checked(self: Any) -> None:
            with python_errors(type(self)):
                check(self)

        cls.__post_init__ = checked  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__doc__ = _Doc(cls.__doc__ or "")  # type: ignore[assignment]
    return made


def config_json(config: Any) -> JsonObject:
    """A command's settings as JSON; paths become strings."""
    fields = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def carried_over(config: Any, kind: type, *, but: Collection[str]) -> dict[str, Any]:
    """The values of one command's settings that another command's class has too.

    Args:
        config: The settings.
        kind: The other command's class.
        but: Names that are left out.
    """
    theirs = {field.name for field in dataclasses.fields(kind)}
    names = [f.name for f in dataclasses.fields(config) if f.name in theirs and f.name not in but]
    return {name: getattr(config, name) for name in names}


def in_python(text: str, config_class: type) -> str:
    """Reword a message so that it names a config's fields instead of flags.

    Args:
        text: For example "--image-px 4 is out of range" or "give --force".
        config_class: A class made by `settings`; flags that are not its fields stay.

    Returns:
        For example "image_px 4 is out of range" or "give force=True".
    """
    hints = hints_of(config_class)

    def reworded(found: re.Match[str]) -> str:
        name, word = (found["flag"] or "").replace("-", "_"), found["word"]
        if name not in hints:
            return found[0]
        rest = f" {word}" if word else ""
        if hints[name] is bool and not text.startswith(":", found.end()):
            return f"{name}={not found['no']}{rest}"
        return f'{name}="{word}"' if word in _choices(hints[name]) else name + rest

    return _FLAGS.sub(reworded, text)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The words that a field accepts, if its type lists them."""
    options = get_args(hint) if get_origin(hint) is Union else (hint,)
    return tuple(w for o in options if get_origin(o) is Literal for w in get_args(o))


class _Doc:
    """A docstring with those of the fields, which `help` ignores; assembled on first use."""

    def __init__(self, text: str) -> None:
        self.text = inspect.cleandoc(text)

    def __get__(self, config: object, kind: type) -> str:
        docs: dict[str, str] = {}
        for base in reversed(kind.__mro__):
            if dataclasses.is_dataclass(base):
                docs |= _field_docs(base)
        own_first = [name for name in kind.__annotations__ | docs if name in docs]
        fields = (f"    {name}: {docs[name]}" for name in own_first)
        return "\n".join([self.text, "", "Attributes:", *fields])


def description_of(config_class: type) -> str:
    """A settings class's docstring without the fields', for which `__doc__` parses the source."""
    own = vars(config_class)["__doc__"]
    return own.text if isinstance(own, _Doc) else inspect.cleandoc(own)


@functools.cache
def _field_docs(kind: type) -> dict[str, str]:
    """The string below each field of a class, on one line."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, SyntaxError):  # no source is installed
        return {}
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs

"""The metadata's JSON, read as if a stranger had written it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from featcache.cache.layout import AGAIN, Extent
from featcache.config import CacheMeta
from featcache.errors import CacheError, UserError


def parse_meta(text: bytes, features: Extent, path: Path) -> CacheMeta:
    """Rebuild the metadata and check it against the features beside it.

    Args:
        text: The dataset meta_json.
        features: Any split's features [V, N, D].
        path: For messages.

    Raises:
        CacheError: It is not a cache's metadata, or contradicts the file.
    """
    try:
        meta = CacheMeta.from_dict(json.loads(text, parse_constant=_refuse))
        check_types(meta)
        if meta.to_json().encode() != text:
            raise ValueError("not in canonical form")
        stored = {"<f4": "float32", "<f2": "float16"}[features.dtype]
        told = (meta.dtype, meta.views.num, meta.backbone.feature_dim)
        if told != (stored, features.shape[0], features.shape[2]):
            raise ValueError(f"says {told}, the features are {stored} {features.shape}")
    except (UserError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CacheError(f"{path}: its metadata is not valid: {error!s:.200}; {AGAIN}") from None
    return meta


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a value")


def check_types(record: Any) -> None:
    """Check every field of a config dataclass against its annotation, nested ones included.

    Raises:
        ValueError: A field of another type, named.
    """
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            raise ValueError(f"{name} is {value!r:.60}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and type(value) is hint:
        check_types(value)
    if origin is typing.Literal:
        return isinstance(value, str) and value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in args)
    if origin in (tuple, dict):
        kinds = (args[0], args[1]) if origin is dict else (args[0],)
        items = list(value.items()) if isinstance(value, dict) else [(v,) for v in value]
        return isinstance(value, origin) and all(
            _fits(v, kind) for item in items for v, kind in zip(item, kinds, strict=True)
        )
    # Surrogates can be written in JSON but not printed.
    return type(value) is hint and (hint is not str or value.isprintable())

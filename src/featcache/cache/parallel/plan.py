"""What all ranks of a job agree on: the small file NAME.h5.plan, which the first of them writes.

Ranks that start at the same moment could each choose another engine; the rows of two engines differ
in their last bits, so the first choice counts for all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from featcache.cache.reuse import describe_differences
from featcache.cache.schema import MAX_ROWS, is_split_name
from featcache.cache.summary import begun_with
from featcache.cache.writer import part_path
from featcache.config import CacheMeta
from featcache.config.checks import record_from_json
from featcache.errors import CacheError
from featcache.files import create_atomically, read_regular

Write = Literal["direct", "shards"]
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Everything that has to be the same for every rank.

    Attributes:
        meta: What the rows are made with, the engine and the hash of an int8 network included.
        num_rows: Rows of each split, in order.
        write: Whether ranks write one file in place or a shard file each.
        by: The rank that wrote the plan, for messages.
    """

    meta: CacheMeta
    num_rows: dict[str, int]
    write: Write
    by: str

    def __post_init__(self) -> None:
        for split, rows in self.num_rows.items():
            if not is_split_name(split) or not 1 <= rows <= MAX_ROWS:
                raise ValueError(f"split {split!r:.50} of {rows} rows")

    @property
    def digest(self) -> str:
        """sha256, as hex, of all that ranks agree on."""
        agreed = [self.meta.to_json(), list(self.num_rows.items()), self.write]
        return hashlib.sha256(json.dumps(agreed).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The file's content."""
        values = {**asdict(self), "meta": self.meta.to_dict(), "digest": self.digest}
        return (json.dumps(values, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The plan of the cache NAME.h5; None if there is none.

        Raises:
            CacheError: The file is damaged.
        """
        place = plan_path(path)
        try:
            values = json.loads(read_regular(place, MAX_BYTES))
            digest, meta = values.pop("digest"), CacheMeta.from_dict(values["meta"])
            plan = record_from_json(cls, {**values, "meta": asdict(meta)})
            if plan.digest != digest:
                raise ValueError("its digest is wrong")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"{place} is not a plan of ranks: {error!s:.200}; end all ranks and remove it"
            ) from None
        return plan

    def agree(self, path: Path) -> Plan:
        """Make this the plan of the cache NAME.h5 unless another rank was first; returns its plan.

        Raises:
            CacheError: The file there is damaged, or NAME.h5.part is of different settings.
            StorageError: The file system refused.
        """
        begun = None if plan_path(path).exists() else begun_with(path)
        if begun is not None and (unfit := begun.differences(self.meta)):
            raise CacheError(
                f"{part_path(path)} was begun with different settings: "
                f"{describe_differences(unfit)}; run the earlier command to finish it, or remove it"
            )
        if create_atomically(plan_path(path), self.to_json()):
            return self
        return Plan.read(path) or self.agree(path)  # a job that ends removes it

    def check_same(self, path: Path, mine: Plan) -> None:
        """Check that this plan, of NAME.h5, is also another rank's.

        Raises:
            CacheError: It differs; the fields are named.
        """
        if self.digest == mine.digest:
            return
        differences = self.meta.differences(mine.meta)
        for name in ("num_rows", "write"):
            if getattr(self, name) != getattr(mine, name):
                differences.append((name, getattr(self, name), getattr(mine, name)))
        raise CacheError(
            f"{path} was begun by {self.by} with different settings: "
            f"{describe_differences(differences)}; give every rank the same command, or, if that "
            f"job is over, finish it first, or remove {plan_path(path)} and its unfinished files"
        )


def plan_path(path: Path) -> Path:
    """Where the plan of the cache NAME.h5 is."""
    return path.with_name(path.name + ".plan")

"""Safetensors files, which hold heads, models and checkpoints; and what a model file says.

A file is read once and nothing in its header is believed unchecked: `safetensors` checks types,
shapes and places of tensors, this module the sizes and the metadata.

A model file carries its own preprocessing under the key that weights files use, so it also serves
as `--weights FILE`: features of a fine-tuned backbone can be cached like any others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from featcache.config import JsonObject, Preprocessing, StageColumns, Task
from featcache.config.checks import record_from_json
from featcache.errors import StorageError, UserError, shown
from featcache.files import open_regular, replacing, storage_errors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

State = dict[str, "torch.Tensor"]
Arrays = dict[str, "NDArray[np.generic]"]

MODEL_FORMAT, VERSION = "featcache-model", 1
MARKS = re.compile(rb'"%s"' % MODEL_FORMAT.encode())
MAX_CLASSES = 1_000_000
LABEL_THRESHOLD = 0.5
"""From which probability on a fine-tuned model gives an image one of several labels."""
MAX_FILE_BYTES = 16 << 30
"""The largest network of torchvision with its optimizer's state takes 10 GB."""
MAX_HEADER_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file that was read once, so that what is hashed is what is loaded.

    Attributes:
        path: Where it was.
        data: Its bytes.
        status: Of the file before it was read.
    """

    path: Path
    data: bytes
    status: os.stat_result

    @cached_property
    def sha256(self) -> str:
        """sha256 of the bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The string metadata.

        Raises:
            UserError: It is not a safetensors file, or its header is too large.
        """
        try:
            return _header_metadata(self.data)
        except (ValueError, RecursionError) as error:
            raise self._refused(error) from error

    def arrays(self) -> Arrays:
        """Tensors by name, for numpy; torch is not imported.

        Raises:
            UserError: The file is damaged, or has a type that numpy lacks.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        assert self.metadata is not None  # the header is checked
        try:
            return load(self.data)
        except KeyError as error:
            raise self._refused(f"tensors of type {error}") from error
        except (SafetensorError, ValueError) as error:
            raise self._refused(error) from error

    def tensors(self) -> State:
        """Tensors by name, on the CPU.

        Raises:
            UserError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        assert self.metadata is not None  # the header is checked
        try:
            state: State = load(self.data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._refused(error) from error
        return state

    def _refused(self, reason: object) -> UserError:
        return UserError(
            f"{self.path} is not a safetensors file ({shown(str(reason))}); give another file"
        )


def not_finite(state: State) -> str | None:
    """The name of a tensor that has a value that is not finite; None if there is none."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            # NaN goes through both; isfinite takes seven times as long.
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                return name
    return None


def _header_metadata(data: bytes) -> dict[str, str]:
    """The metadata in the header: 8 bytes of its length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("it is shorter than its header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
    header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    metadata = header.get("__metadata__") or {} if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its header is not a table with metadata of strings")
    return metadata


def _unique(pairs: Iterable[tuple[str, Any]]) -> JsonObject:
    table: JsonObject = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"duplicate key {key} in its header")
        table[key] = value
    return table


def read_tensor_file(path: Path) -> TensorFile:
    """Read a safetensors file as a whole.

    Raises:
        UserError: There is no such file, it is not an ordinary file, or it is too large.
        StorageError: It cannot be read.
    """
    return TensorFile(path, *read_bounded(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file, of which only the header is read.

    Raises:
        UserError: As for `read_tensor_file`, or it is not a safetensors file.
        StorageError: It cannot be read.
    """
    with _opened(path) as (file, status):
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES + 1))
    return TensorFile(path, length + header, status).metadata


def read_bounded(path: Path) -> tuple[bytes, os.stat_result]:
    """All bytes of a file of tensors, and its status before it was read.

    Raises:
        UserError: There is no such file, it is not an ordinary file, or it is too large.
        StorageError: It cannot be read.
    """
    with _opened(path) as (file, status):
        return file.read(), status


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a file of tensors; errors until it is closed are those of `read_bounded`."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_FILE_BYTES:
                raise UserError(
                    f"{path} has {status.st_size:,} bytes, more than the {MAX_FILE_BYTES:,} that "
                    "are read; give another file"
                )
            yield file, status
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except MemoryError as error:
        raise too_large_for_memory(path) from error
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror or error}"
        if error.errno in (errno.EISDIR, errno.EINVAL):
            raise UserError(f"{reason}; check the path") from error
        raise StorageError(reason) from error


def too_large_for_memory(path: Path) -> UserError:
    """The error for a file of tensors that memory cannot hold."""
    return UserError(f"{path} takes more memory than there is; give another file")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model file says about its tensors.

    `provenance` says which weights it started from and which data it saw; `scores` has the test
    accuracy and the number of test images. Where the `task` is several labels per image, those with
    a probability of LABEL_THRESHOLD or more are predicted. `stages` are the columns that the head
    takes, where that is not the last layer alone.
    """

    backbone: str
    class_names: list[str]
    preprocessing: Preprocessing
    provenance: JsonObject
    scores: JsonObject
    task: Task = "multiclass"
    stages: StageColumns | None = None


def write_safetensors(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    """Write tensors so that `path` holds either its old content or all of the new.

    Raises:
        StorageError: The file system refused.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with storage_errors(path), replacing(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # what the user's umask says; save_file ignores it
        try:
            save_file(dense, draft, metadata)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error
        draft.chmod(mode)


def write_model(path: Path, state: State, card: ModelCard) -> None:
    """Write a whole classifier.

    Args:
        path: The .safetensors file.
        state: Every parameter and buffer by name.
        card: What they are.

    Raises:
        StorageError: The file system refused.
    """
    fields = dataclasses.asdict(card)
    metadata = {
        name: json.dumps(value)
        for name, value in fields.items()
        if name != "backbone" and value is not None
    }
    metadata |= {"format": MODEL_FORMAT, "version": str(VERSION), "backbone": card.backbone}
    write_safetensors(path, state, metadata)


def model_card(file: TensorFile) -> ModelCard:
    """What a model file says.

    Raises:
        UserError: Not a model file, of another version, or its metadata is damaged.
    """
    path, metadata = file.path, file.metadata
    if metadata.get("format") != MODEL_FORMAT:
        raise UserError(f"{path} is not a fine-tuned model; give a file that finetune wrote")
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"{path} is a model of version {metadata.get('version')!r:.20}, this program reads "
            f"version {VERSION}; write it again with finetune"
        )
    try:
        names = json.loads(metadata["class_names"])
        if not _are_names(names):
            raise UserError("class_names is not a list of distinct names")
        return ModelCard(
            backbone=metadata["backbone"],
            class_names=names,
            preprocessing=Preprocessing.from_dict(json.loads(metadata["preprocessing"])),
            provenance=dict(json.loads(metadata["provenance"])),
            scores=dict(json.loads(metadata["scores"])),
            task=_task_of(metadata),
            stages=_stages_of(metadata),
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        reason = f"{error}"[:200]
        raise UserError(f"{path}: its metadata is damaged ({reason}); write it again") from error


def _task_of(metadata: dict[str, str]) -> Task:
    """What the model predicts; models of 0.1.0 do not say."""
    said = json.loads(metadata.get("task", '"multiclass"'))
    tasks: dict[str, Task] = {name: name for name in get_args(Task)}
    if said not in tasks:
        raise UserError(f"task {said!r:.40}")
    return tasks[said]


def _stages_of(metadata: dict[str, str]) -> StageColumns | None:
    said = json.loads(metadata.get("stages", "null"))
    return None if said is None else record_from_json(StageColumns, said)


def _are_names(names: object) -> bool:
    return (
        isinstance(names, list)
        and 0 < len(names) <= MAX_CLASSES
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    )

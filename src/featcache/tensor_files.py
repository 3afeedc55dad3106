"""Fine-tuned models as files: tensors in safetensors, the rest as JSON in its metadata.

A model file carries its own preprocessing under the key that weights files use, so it also serves
as `--weights FILE`: features of a fine-tuned backbone can be cached like any others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.backbone.checkpoint import State, parse_safetensors
from featcache.config import Preprocessing
from featcache.errors import UserError
from featcache.files import open_regular, replacing, storage_errors

FORMAT, VERSION = "featcache-model", 1
MARKS = re.compile(rb'"%s"' % FORMAT.encode())
MAX_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model file says about its tensors.

    `provenance` tells which weights it started from and which data it saw; `scores` holds the test
    accuracy and how many images that stands on.
    """

    backbone: str
    class_names: list[str]
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    scores: dict[str, Any]


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
    metadata = {name: json.dumps(value) for name, value in fields.items() if name != "backbone"}
    metadata |= {"format": FORMAT, "version": str(VERSION), "backbone": card.backbone}
    write_safetensors(path, state, metadata)


def read_card(path: Path) -> ModelCard:
    """Read what a model file says, without its tensors.

    Raises:
        UserError: Not a model file, of another version, or its metadata is damaged.
    """
    return _card(path, read_metadata(path))


def read_model(path: Path) -> tuple[ModelCard, State]:
    """Read a whole classifier: what it says and its tensors, by one read of the file.

    Raises:
        UserError: Not a model file, of another version, or damaged.
    """
    metadata, tensors = read_safetensors(path)
    return _card(path, metadata), tensors


def _card(path: Path, metadata: dict[str, str]) -> ModelCard:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a fine-tuned model; give a file that finetune wrote")
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"{path} is a model of version {metadata.get('version')!r:.20}, this program reads "
            f"version {VERSION}; write it again with finetune"
        )
    try:
        names = json.loads(metadata["class_names"])
        if not _are_names(names):
            raise UserError("class_names is not a list of different names")
        return ModelCard(
            backbone=metadata["backbone"],
            class_names=names,
            preprocessing=Preprocessing.from_dict(json.loads(metadata["preprocessing"])),
            provenance=dict(json.loads(metadata["provenance"])),
            scores=dict(json.loads(metadata["scores"])),
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        reason = f"{error}"[:200]
        raise UserError(f"{path}: its metadata is damaged ({reason}); write it again") from error


def _are_names(names: object) -> bool:
    return (
        isinstance(names, list)
        and 0 < len(names) <= MAX_CLASSES
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file.

    Raises:
        UserError: There is no such file, or it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        os.close(open_regular(path))  # the library would wait for a pipe's writer
        with safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}); give another") from error


def read_safetensors(path: Path) -> tuple[dict[str, str], State]:
    """Metadata and tensors of a safetensors file, by one read: they belong together.

    Raises:
        UserError: There is no such file, or it is no safetensors file.
    """
    try:
        return parse_safetensors(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}); give another") from error


def read_tensors(path: Path) -> State:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        UserError: There is no such file, or it is no safetensors file.
    """
    return read_safetensors(path)[1]

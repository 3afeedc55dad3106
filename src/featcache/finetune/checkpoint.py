"""A run's state after an epoch, from which it resumes as if it had never stopped.

One safetensors file: the tensors that training moves, the optimizer's, and those of the best epoch
so far where early stopping needs them; counters as JSON in its metadata. Nothing else carries state
from one epoch to the next: order, flips and dropout are drawn from the seed and the epoch's number,
learning rates from the step's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.config import JsonObject, flatten
from featcache.errors import FeatcacheError, UserError
from featcache.files import remove_temporaries
from featcache.finetune.trainable import TrainableModel
from featcache.results import EpochRecord, RunReport
from featcache.tensor_files import State, read_metadata, read_tensor_file, write_safetensors

if TYPE_CHECKING:
    import torch

FORMAT = "featcache-checkpoint-2"
MARKS = re.compile(rb"featcache-checkpoint-")


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        epochs: One record per finished epoch, as in the report.
        seconds: Wall seconds spent, earlier sessions included.
        best_score: Held-out top-1 and negative loss of the best epoch, for early stopping.
        best_epoch: Its number from 1, 0 before there is one.
        best: Its moving tensors.
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0
    best_score: tuple[float, float] = (-1.0, 0.0)
    best_epoch: int = 0
    best: State = field(default_factory=dict)

    @property
    def stale_epochs(self) -> int:
        """Epochs since the best one."""
        return len(self.epochs) - self.best_epoch


def run_key(settings: JsonObject) -> str:
    """Names a run by everything that decides its outcome: 64 hex digits."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of a model file goes."""
    return output.with_name(output.stem + ".checkpoint.safetensors")


def save_checkpoint(
    path: Path,
    decisive: JsonObject,
    progress: Progress,
    trainable: TrainableModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a run's state, atomically; `decisive` is all that decides its outcome.

    Raises:
        StorageError: The file system refused.
    """
    tensors = {f"model/{name}": tensor for name, tensor in trainable.moving_state().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{n}": t for n, t in state.items() if t is not None}
    counters = dataclasses.asdict(dataclasses.replace(progress, best={}))
    metadata = {"format": FORMAT, "key": run_key(decisive), "progress": json.dumps(counters)}
    metadata["settings"] = json.dumps(decisive)
    write_safetensors(path, tensors, metadata)


def remove_checkpoint(path: Path) -> None:
    """Remove a finished run's checkpoint, and what a kill in the middle of writing one left."""
    path.unlink(missing_ok=True)
    remove_temporaries(path)


def load_checkpoint(
    path: Path, key: str, trainable: TrainableModel, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Restore a run's state from its checkpoint.

    Returns:
        What the run had done; None when there is no checkpoint, or it is another run's.

    Raises:
        FeatcacheError: The checkpoint is this run's but damaged.
    """
    if not path.is_file():
        return None
    try:
        file = read_tensor_file(path)
        metadata = file.metadata
        if metadata.get("format") != FORMAT or metadata.get("key") != key:
            return None
        counters = json.loads(metadata["progress"])
        counters["best_score"] = tuple(counters["best_score"])
        groups = _grouped(file.tensors())
        load_moving(trainable, groups["model"])
        _load_optimizer(optimizer, groups["optimizer"])
        return Progress(**{**counters, "best": groups["best"]})
    except (UserError, KeyError, ValueError, TypeError) as error:
        raise FeatcacheError(
            f"{path} is damaged ({error}); delete it, then rerun the same command to start over"
        ) from error


def check_same_run(output: Path, decisive: JsonObject) -> None:
    """Refuse to replace the model, or an unfinished run's checkpoint, of other settings.

    Raises:
        UserError: Naming the settings that differ.
    """
    one = {"num_processes": 1}  # said only of several
    ours = flatten(json.loads(json.dumps({**one, **decisive, "key": run_key(decisive)})))
    for path, theirs in (
        (output, _settings_of_report(output) if output.is_file() else {}),
        (checkpoint_path(output), _settings_of_checkpoint(checkpoint_path(output))),
    ):
        there = flatten({**one, **theirs} if theirs else {})
        differ = [name for name in ours if name in there and there[name] != ours[name]]
        if differ:
            said = ", ".join(
                f"{name} was {there[name]!s:.40}, is {ours[name]!s:.40}" for name in differ[:3]
            )
            raise UserError(
                f"{path} was made with different settings ({said}): give another --output, or "
                "--no-resume to replace it"
            )


def _settings_of_report(output: Path) -> JsonObject:
    """What a finished run's report says of its settings; nothing where there is none."""
    try:
        report = RunReport.load(output.with_suffix(".json"))
        return {
            "plan": dict(report.more["recipe"]),
            "backbone": dict(report.provenance["backbone"]),
            "dataset": report.provenance["dataset"]["fingerprint"],
        }
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def _settings_of_checkpoint(path: Path) -> JsonObject:
    """What an unfinished run's checkpoint says of its settings; nothing where it does not."""
    if not path.is_file():
        return {}
    try:
        metadata = read_metadata(path)
        if "settings" not in metadata:  # of version 0.1.0
            return {"key": metadata["key"]}
        return dict(json.loads(metadata["settings"]))
    except (UserError, KeyError, ValueError, TypeError, RecursionError):
        return {}  # it is damaged, which loading it will say


def _grouped(tensors: State) -> dict[str, State]:
    groups: dict[str, State] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, rest = name.split("/", 1)
        groups[group][rest] = tensor
    return groups


def load_moving(trainable: TrainableModel, tensors: State) -> None:
    """Copy tensors into the model in place, so that the memory layout stays.

    Raises:
        ValueError: They are not exactly the model's moving tensors.
    """
    import torch

    own = trainable.moving_state()
    if own.keys() != tensors.keys():
        raise ValueError(f"{sorted(own.keys() ^ tensors.keys())[:3]} do not match")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name} has a different shape")
            tensor.copy_(tensors[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: State) -> None:
    """Restore the optimizer's tensors, each in its parameter's memory layout.

    The layout matters: other layouts take other code paths, which round differently.
    """
    import torch

    params = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(len(params))}
    for name, tensor in tensors.items():
        number, what = name.split("/", 1)
        index = int(number)
        if tensor.shape == params[index].shape:
            tensor = torch.empty_like(params[index]).copy_(tensor)  # noqa: PLW2901
        states[index][what] = tensor
    whole = {i: state for i, state in states.items() if state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": whole})

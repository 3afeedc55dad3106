"""The command line that a run's recorded settings stand for."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from featcache import config as settings

CLASSES: dict[str, tuple[str, type[Any], str]] = {
    "train-head": ("train-head", settings.TrainHeadConfig, "cache"),
    "finetune": ("finetune", settings.FinetuneConfig, "dataset"),
    "compare": ("featcache compare", settings.CompareConfig, "dataset"),
}
HIDDEN = ("json", "verbose")


def command_line(command: str, config: dict[str, Any]) -> str:
    """The command with the settings that differ from their defaults.

    Settings that this version does not know are left out.

    Args:
        command: train-head, finetune or compare.
        config: The recorded settings.
    """
    prog, kind, positional = CLASSES[command]
    words = [*prog.split(), str(config.get(positional, ""))]
    for field in dataclasses.fields(kind):
        if field.name in (positional, *HIDDEN) or field.name not in config:
            continue
        value, default = config[field.name], field.default
        if value is None or str(value) == str(default):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(default, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)

"""Which of several processes of one job this is: from --shard, torchrun or Slurm.

They only set numbers; nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from featcache.errors import UserError

ALONE_HINT = "give --shard 0/1 to work as one process"
MAX_RANKS = 100_000
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # srun gives each task processors of its own, so the last variable does not exist.
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
}
"""Variables of rank, number of ranks, and the same on this machine; the first launcher counts."""


@dataclass(frozen=True)
class Rank:
    """One of the processes of a job.

    Attributes:
        index: Its number, from 0 to `size` - 1.
        size: Number of processes in the whole job.
        local_index: Its number on this machine, which picks its GPU.
        local_size: Processes that share this machine's processors, as far as the launcher says.
        source: What set the numbers: torchrun, srun, a Slurm array, --shard. Empty if nothing did.
    """

    index: int = 0
    size: int = 1
    local_index: int = 0
    local_size: int = 1
    source: str = ""

    @property
    def alone(self) -> bool:
        """Whether this process is the whole job."""
        return self.size == 1

    def __str__(self) -> str:
        return f"rank {self.index} of {self.size}"


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of I/N, where the first of N parts is 0.

    Raises:
        UserError: It is not of this form, or out of range.
    """
    index, slash, size = text.partition("/")
    numbers = [int(t) if t.isascii() and t.isdigit() and len(t) < 7 else -1 for t in (index, size)]
    if not slash or not 0 <= numbers[0] < numbers[1] <= MAX_RANKS:
        raise UserError(
            f"--shard {text!r:.40}: give I/N with I from 0 to N - 1, for example 0/4 for the first "
            "of four parts"
        )
    return numbers[0], numbers[1]


def current_rank(shard: str | None = None, env: Mapping[str, str] = os.environ) -> Rank:
    """This process's place in its job.

    The first of these that applies: `--shard`; then torchrun (RANK and WORLD_SIZE), else srun
    (SLURM_PROCID and SLURM_STEP_NUM_TASKS, which a shell without srun lacks). A Slurm array
    multiplies the last two: task 2 of an array of 3, with torchrun's rank 1 of 4 in each, is rank 9
    of 12. Numbers of an array count from its first task.

    Args:
        shard: The flag `--shard`, I/N.
        env: The environment.

    Raises:
        UserError: A variable is not a number or out of range, or an array has gaps.
    """
    if shard is not None:
        index, size = parse_shard(shard)
        return Rank(index, size, local_index=index, source="--shard")
    found = (_started_by(launcher, env, names) for launcher, names in LAUNCHERS.items())
    inner = next(filter(None, found), Rank())
    array = _array(env)
    if array.alone:
        return inner
    return Rank(
        index=array.index * inner.size + inner.index,
        size=array.size * inner.size,
        local_index=inner.local_index if inner.source else array.index,
        local_size=inner.local_size,
        source=" in a ".join(filter(None, (inner.source, array.source))),
    )


def without_srun(env: Mapping[str, str] = os.environ) -> str | None:
    """A remark for a Slurm job of several tasks whose script runs the command without srun."""
    num = env.get("SLURM_NTASKS", "1")
    if num == "1" or "SLURM_STEP_NUM_TASKS" in env or "RANK" in env:
        return None
    return f"SLURM_NTASKS is {num}, but srun did not start this command: working as one process"


def _started_by(launcher: str, env: Mapping[str, str], names: tuple[str, ...]) -> Rank | None:
    """The rank that four variables give; None if they do not say that there are several."""
    index_name, size_name, local_index, local_size = names
    if index_name not in env or size_name not in env:
        return None
    index, size = _number(env, index_name, 0), _number(env, size_name, 1)
    if not 0 <= index < size:
        raise UserError(
            f"{index_name}={index} and {size_name}={size} in the environment contradict each "
            f"other: unset them, or {ALONE_HINT}"
        )
    place = _number(env, local_index, index), max(1, _number(env, local_size, 1))
    return None if size == 1 else Rank(index, size, *place, launcher)


def _array(env: Mapping[str, str]) -> Rank:
    if "SLURM_ARRAY_TASK_ID" not in env:
        return Rank()
    size = _number(env, "SLURM_ARRAY_TASK_COUNT", 1)
    if size == 1:
        return Rank()
    first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(env, "SLURM_ARRAY_TASK_STEP", 1))
    last = _number(env, "SLURM_ARRAY_TASK_MAX", first + (size - 1) * step)
    index, rest = divmod(_number(env, "SLURM_ARRAY_TASK_ID", 0) - first, step)
    if rest or not 0 <= index < size or last != first + (size - 1) * step:
        raise UserError(
            "the tasks of this Slurm array are not numbered evenly: give --shard I/N to each, or "
            f"{ALONE_HINT}"
        )
    return Rank(index, size, source="Slurm array")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise UserError(
            f"{name}={text!r:.40} in the environment is not a number: unset it, or {ALONE_HINT}"
        )
    return int(text)

"""Several processes that train one model: torchrun's, each with its part of every batch.

Gradients are averaged by torch's DistributedDataParallel, so all hold the same weights after every
step. The first process leads: it alone writes files and shows text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.config import FinetuneConfig
from featcache.display import mute
from featcache.errors import FeatcacheError, UserError
from featcache.ranks import Rank, current_rank
from featcache.runtime import pick_device

if TYPE_CHECKING:
    import torch
    from torch import nn

Number = TypeVar("Number", bound=np.generic)
LOST_PEER = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass(frozen=True)
class Team:
    """The processes that train together; by default this one alone."""

    rank: Rank = field(default_factory=Rank)

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows what the run gives."""
        return self.rank.index == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if not self.rank.alone:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def gathered(self, values: NDArray[Number]) -> NDArray[Number]:
        """An array of which each process filled a part and left zeros elsewhere, whole."""
        if self.rank.alone:
            return values
        import torch
        import torch.distributed as dist

        mine = torch.from_numpy(values)
        if dist.get_backend() == "nccl":
            mine = mine.cuda()
        whole: NDArray[Number] = self.total(mine).cpu().numpy()
        return whole

    def each(self, number: int) -> list[int]:
        """A number of every process."""
        numbers = np.zeros(self.rank.size, np.int64)
        numbers[self.rank.index] = number
        return [int(n) for n in self.gathered(numbers)]

    def agree(self, number: int, what: str) -> int:
        """A number that has to be the same in all processes.

        Raises:
            FeatcacheError: It is not.
        """
        found = self.each(number)
        if len(set(found)) > 1:
            raise self.told(
                FeatcacheError(f"the processes see different {what} ({found}): give all one disk")
            )
        return number

    def told(self, error: FeatcacheError) -> BaseException:
        """An error that all processes know of: the first one says it, the others only end."""
        return error if self.leads else SystemExit(error.exit_code)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails in some processes, end all with the message of the first of these."""
        error: FeatcacheError | None = None
        try:
            yield
        except FeatcacheError as problem:
            error = problem
        failed = self.each(int(error is not None))
        if error is not None and failed.index(1) == self.rank.index:
            raise error
        if any(failed):
            raise SystemExit(FeatcacheError.exit_code)

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """The network as training calls it: its backward pass averages gradients over the team."""
        if self.rank.alone:
            return network
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(network)

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if not self.rank.alone:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)


ALONE = Team()


@contextlib.contextmanager
def joined(config: FinetuneConfig) -> Iterator[Team]:
    """Join the other processes of torchrun, if there are any, until the block ends.

    Raises:
        UserError: The settings are not for several processes.
        FeatcacheError: Another process ended.
    """
    # Of a Slurm array every task trains a model of its own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    team = Team(current_rank(env=env))
    if team.rank.alone:
        yield team
        return
    mute(not team.leads)
    device = _device_of(config, team)
    import torch.distributed as dist

    ended = FeatcacheError(
        f"another of the {team.rank.size} processes ended, and so does this one; finished epochs "
        "are kept: start all of them again to resume"
    )
    with _on_terminate(team.told(ended)):
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            yield team
        except Exception as error:
            text = str(error).lower() if isinstance(error, RuntimeError) else ""
            if any(words in text for words in LOST_PEER):
                raise team.told(ended) from error
            mute(False)  # what all processes know of ends this one by SystemExit
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _device_of(config: FinetuneConfig, team: Team) -> str:
    """Take the GPU of this process, or the CPU.

    Raises:
        UserError: The settings are not for several processes.
    """
    import torch

    problem = ""
    if config.from_stage is not None:
        problem = "--from-stage trains in one process"
    elif "MASTER_ADDR" not in os.environ:
        problem = "RANK and WORLD_SIZE are set in the environment, but not by torchrun"
    elif config.batch_size < 2 * team.rank.size:
        problem = f"--batch-size {config.batch_size} is less than two images for each process"
    device = "cpu" if problem else pick_device(config.device)
    if device == "mps":
        problem = "--device mps trains in one process"
    if problem:
        raise team.told(UserError(f"{problem}: unset RANK and WORLD_SIZE, or leave torchrun out"))
    if device == "cuda":
        torch.cuda.set_device(team.rank.local_index)
    return device


@contextlib.contextmanager
def _on_terminate(error: BaseException) -> Iterator[None]:
    """Raise an error on SIGTERM, which torchrun sends to the rest when one process has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise error

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has yet to say why it ends
        raise
    signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Shares:
    """One process's part of an epoch.

    Attributes:
        places: Places of the epoch's order that it takes, batch after batch.
        batch_size: How many of them make a batch; the last one may have fewer.
        factors: What each batch's mean loss counts; their mean over the team is one.
        num_rows: Rows of each batch in all processes together.
    """

    places: NDArray[np.int64]
    batch_size: int
    factors: list[float]
    num_rows: list[int]


def shares(num: int, batch_size: int, rank: Rank, least: int) -> Shares:
    """Divide every batch of an epoch evenly over the team.

    A process for which a small last batch has no rows left takes the first ones, and they count
    nothing: it has to take part in averaging the gradients.

    Args:
        num: Rows of the epoch.
        batch_size: Rows of a batch in all processes together.
        rank: This process.
        least: The fewest rows that a process can train on: 2 where BatchNorm averages over them.
            A last batch of one row then joins the one before.
    """
    places: list[NDArray[np.int64]] = []
    factors: list[float] = []
    num_rows: list[int] = []
    lone = num % batch_size if least > 1 and num > batch_size else 0
    end = num - 1 if lone == 1 else num
    for start in range(0, end, batch_size):
        count = min(batch_size, end - start)
        parts = np.array_split(
            np.arange(start, start + count), max(1, min(rank.size, count // least))
        )
        counts = rank.index < len(parts)
        places.append(parts[rank.index] if counts else parts[0][:least])
        num_rows.append(count)
        factors.append(rank.size * len(places[-1]) / count if counts else 0.0)
    own = len(places[0])
    if end < num:
        joins = rank.index == 0
        num_rows[-1] += 1
        factors[-1] = rank.size * (len(places[-1]) + joins) / num_rows[-1]
        places += [np.array([end])] if joins else []
    return Shares(np.concatenate(places), own, factors, num_rows)

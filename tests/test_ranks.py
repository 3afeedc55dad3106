"""Which process of a job this is, from every launcher and from all of them at once."""

from __future__ import annotations

import pytest

from featcache.errors import UserError
from featcache.ranks import Rank, current_rank, parse_shard, without_srun

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
}
ARRAY = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}
BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(1, 4, 1, 2, "torchrun")),
        (SRUN, Rank(5, 8, 1, 1, "srun")),
        (ARRAY, Rank(2, 3, 2, 1, "Slurm array")),
        # Tasks 10, 12, 14: the second is rank 1.
        (
            ARRAY
            | {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_MAX": "14",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Rank(1, 3, 1, 1, "Slurm array"),
        ),
        # torchrun inside srun: the inner one counts. An array multiplies.
        (TORCHRUN | SRUN, Rank(1, 4, 1, 2, "torchrun")),
        (TORCHRUN | SRUN | ARRAY, Rank(9, 12, 1, 2, "torchrun in a Slurm array")),
        (SRUN | ARRAY, Rank(21, 24, 1, 1, "srun in a Slurm array")),
        # One process, whatever the shell around it says.
        ({"RANK": "0", "WORLD_SIZE": "1"}, Rank()),
        ({"WORLD_SIZE": "8"}, Rank()),
        (BATCH_SHELL, Rank()),
        (BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, Rank()),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "1"}, Rank()),
    ],
)
def test_the_rank_is_read_from_the_launcher(env, rank):
    assert current_rank(env=env) == rank
    assert current_rank("3/16", env) == Rank(3, 16, 3, 1, "--shard")
    assert current_rank("0/1", env).alone


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4 in the environment contradict"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK='x' in the environment is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' in the environment is not a number"),
        (ARRAY | {"SLURM_ARRAY_TASK_MAX": "9"}, "are not numbered evenly: give --shard I/N"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "3"}, "are not numbered evenly"),
    ],
)
def test_numbers_that_cannot_be_are_refused(env, message):
    with pytest.raises(UserError, match=message):
        current_rank(env=env)


@pytest.mark.parametrize(
    "text", ["", "3", "3/3", "-1/2", "a/b", "0/0", "1/1000000", "½/2", "1/2/3"]
)
def test_a_shard_that_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="give I/N with I from 0 to N - 1, for example 0/4"):
        parse_shard(text)


def test_a_script_without_srun_is_told_that_it_works_as_one_process():
    said = "SLURM_NTASKS is 8, but srun did not start this command: working as one process"
    assert without_srun(BATCH_SHELL) == said
    for env in ({}, SRUN, BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, BATCH_SHELL | TORCHRUN):
        assert without_srun(env) is None

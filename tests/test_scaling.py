"""The page about several machines: its Slurm script parses, and what it says holds."""

from __future__ import annotations

import re
import shlex
import subprocess

from conftest import REPO
from featcache.cache import lock
from featcache.cache.parallel import claims
from featcache.cli import parse
from featcache.config import ExtractConfig
from featcache.ranks import current_rank

PAGE = (REPO / "docs" / "scaling.md").read_text()
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)[1]


def test_the_slurm_script_parses():
    done = subprocess.run(["bash", "-n"], input=SCRIPT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in SCRIPT.splitlines() if line.startswith("#SBATCH")]
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)
    assert SCRIPT.splitlines()[1 : 1 + len(lines)] == lines, "sbatch stops at the first command"
    first, last = map(int, options["array"].split("-"))
    array = {
        "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(last),
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": options["ntasks"],
    }
    found = [current_rank(env={**array, "SLURM_ARRAY_TASK_ID": str(i)}) for i in range(16)]
    assert [(rank.index, rank.size) for rank in found] == [(i, 16) for i in range(16)]


def test_the_command_of_the_slurm_script_is_one_of_ours():
    text = SCRIPT.split("featcache extract-features ")[1].replace("$SLURM_CPUS_PER_TASK", "16")
    config = parse("extract-features", ExtractConfig, shlex.split(text))
    assert (config.workers, str(config.output)) == (16, "/data/cache/photos.h5")


def test_the_times_it_states_are_those_of_the_code():
    flat = " ".join(PAGE.split())
    assert f"no block is written for {claims.LEASE_S:.0f} s" in flat
    assert f"wait up to {lock.JOIN_S / 60:.0f} minutes" in flat

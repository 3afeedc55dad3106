"""torchrun finetune: the same batches, weights and files as one process; one line when one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import SIDE, make_pets
from featcache.config import FinetuneConfig
from featcache.display import mute
from featcache.errors import UserError
from featcache.finetune.parallel import Team, joined, shares
from featcache.ranks import Rank
from featcache.results import RunReport
from featcache.tensor_files import read_tensor_file


class TestShares:
    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    @pytest.mark.parametrize("num", [1, 8, 9, 17, 32, 39, 40])
    @pytest.mark.parametrize("least", [1, 2])
    def test_every_row_counts_once_and_batches_stay_whole(
        self, num: int, size: int, least: int
    ) -> None:
        batch = 10
        parts = [shares(num, batch, Rank(index, size), least) for index in range(size)]
        weights = np.zeros(num)
        for part in parts:
            lists = [
                list(part.places[start : start + part.batch_size])
                for start in range(0, len(part.places), part.batch_size)
            ]
            if len(lists) > len(part.factors):  # a lone last row joins the batch before
                lists[-2:] = [lists[-2] + lists[-1]]
            assert len(lists) == len(part.factors) == len(part.num_rows)
            assert part.num_rows == parts[0].num_rows
            for rows, factor, count in zip(lists, part.factors, part.num_rows, strict=True):
                assert len(rows) >= min(least, num)
                assert {row // batch for row in rows if row < num - 1} <= {rows[0] // batch}
                weights[rows] += factor / size / len(rows) * count
        assert weights == pytest.approx(np.ones(num))
        assert sum(parts[0].num_rows) == num

    def test_one_process_takes_everything_at_full_weight(self) -> None:
        part = shares(21, 10, Rank(), 2)
        assert list(part.places) == list(range(21))
        assert (part.batch_size, part.factors, part.num_rows) == (10, [1.0, 1.0], [10, 11])


class TestRefusals:
    @pytest.fixture(autouse=True)
    def two(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
            monkeypatch.setenv(name, value)
        yield
        mute(False)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"from_stage": "layer4"}, "--from-stage trains in one process: unset RANK"),
            ({"batch_size": 3}, "--batch-size 3 is less than two images for each process: unset"),
        ],
    )
    def test_in_one_line(self, changes: dict, problem: str) -> None:
        with (
            pytest.raises(UserError, match=problem),
            joined(FinetuneConfig(dataset="digits", **changes)),
        ):
            pass

    def test_numbers_that_torchrun_did_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_ADDR")
        with (
            pytest.raises(UserError, match="in the environment, but not by torchrun: unset"),
            joined(FinetuneConfig(dataset="digits")),
        ):
            pass

    def test_only_the_first_process_says_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.delenv("MASTER_ADDR")
        with pytest.raises(SystemExit) as stop, joined(FinetuneConfig(dataset="digits")):
            pass
        assert stop.value.code == 2

    def test_slurm_alone_does_not_make_a_team(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
        with joined(FinetuneConfig(dataset="digits")) as team:
            assert team == Team()


def start(dataset: Path, output: Path, num: int, *flags: str) -> subprocess.Popen:
    """The command, in one process or several of torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    words = f"--weights random --image-px {SIDE} --resize squash --workers 0 --device cpu".split()
    return subprocess.Popen(
        [
            *(sys.executable, *(run if num > 1 else []), "-m", "featcache", "finetune"),
            *(str(dataset), *words, "--backbone", "shufflenet_v2_x0_5", "--optimizer", "sgd"),
            *("--batch-size", "8", "--output", str(output), *flags),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    """33 images in batches of 8: for the last one, the second process has none left."""
    pets = make_pets(tmp_path / "pets")
    flags = ["--epochs", "2", "--bn-eval", "True"]
    outputs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for num, output in enumerate(outputs, 1):
        process = start(pets, output, num, *flags)
        told = process.communicate()[1]
        assert process.returncode == 0, told
        assert told.count("epoch 1/2  loss") == told.count(f"model: {output}") == 1
    one, two = (read_tensor_file(output).tensors() for output in outputs)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    first, second = (RunReport.load(output.with_suffix(".json")) for output in outputs)
    assert second.environment["num_processes"] == 2
    assert second.test.predicted == first.test.predicted
    assert [e["train_loss"] for e in second.epochs] == pytest.approx(
        [e["train_loss"] for e in first.epochs], rel=1e-5
    )


@pytest.mark.slow
def test_a_process_that_ends_ends_all_with_one_line_and_its_epochs_are_kept(
    tmp_path: Path,
) -> None:
    pets, output = make_pets(tmp_path / "pets"), tmp_path / "model.safetensors"
    checkpoint = tmp_path / "model.checkpoint.safetensors"
    process = start(pets, output, 2, "--epochs", "400")
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(_ranks_of(process)[1], signal.SIGKILL)
    told = process.communicate()[1]
    assert process.returncode != 0
    assert told.count("another of the 2 processes ended, and so does this one; finished") == 1
    assert not output.exists()
    other = start(pets, output, 3, "--epochs", "400")
    refusal = other.communicate()[1]
    assert refusal.count("num_processes was 2, is 3") == 1
    alone = start(pets, output, 1, "--epochs", "400")
    assert "num_processes was 2, is 1" in alone.communicate()[1]
    with start(pets, output, 2, "--epochs", "400") as again:
        lines = iter(again.stderr.readline, "")
        assert any("resuming after epoch" in line for line in lines)
        for pid in (again.pid, *_ranks_of(again)):
            os.kill(pid, signal.SIGKILL)


def _ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of torchrun's children, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == process.pid:
                env = folder.joinpath("environ").read_bytes().decode().split("\0")
                rank = next((int(v[5:]) for v in env if v.startswith("RANK=")), None)
                found |= {} if rank is None else {rank: int(folder.name)}
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]

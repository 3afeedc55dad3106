"""The finetune command as a process: its output, its exit codes, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_helpers import SIDE
from featcache.finetune.checkpoint import checkpoint_path, remove_checkpoint
from featcache.tensor_files import model_card, read_tensor_file

QUICK = ("--backbone", "shufflenet_v2_x0_5", "--weights", "random", "--image-px", str(SIDE))


def start(pets: Path, where: Path, *words: str) -> subprocess.Popen[str]:
    """The command in its own process, in the folder `where`."""
    command = [sys.executable, "-m", "featcache", "finetune", str(pets), *QUICK, *words]
    return subprocess.Popen(
        command,
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(pets: Path, where: Path, *words: str) -> tuple[int, str, str]:
    process = start(pets, where, *words)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_json_is_all_of_stdout(pets: Path, tmp_path: Path) -> None:
    code, out, err = run(pets, tmp_path, "--epochs", "1", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert {
        "command", "model", "trainable_params", "test_top1", "seconds_total", "seconds_per_epoch",
        "epochs",
    } <= report.keys()  # fmt: skip
    assert (tmp_path / report["model"]).is_file()
    assert (tmp_path / report["model"]).parent == tmp_path / "cache"
    assert "epoch 1/1  loss" in err
    assert "test accuracy" in err
    assert "macro F1" in err
    assert report["scores"]["classes"].keys() == {"cat", "dog", "eel"}
    right, after = report["test_top1"] * report["num_test"], report["calibration"]["after"]
    counts = zip(after["counts"], after["top1"], strict=True)
    assert sum(n * (share or 0) for n, share in counts) == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--unfreeze", "stage9"), "--unfreeze: no module 'stage9'; did you mean stage"),
        (("--epochs", "0"), "--epochs 0 is out of range"),
        (("--freeze-backbone", "--unfreeze", "stage4"), "contradict each other"),
        (("--backbone-lr", "-1"), "--backbone-lr -1.0 is out of range"),
        (("--patience", "1", "--holdout", "2"), "--holdout 2.0 is out of range"),
        (("--init-head", "none.safetensors"), "none.safetensors: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(
    pets: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = run(pets, tmp_path, *words)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("finetune: " if line.startswith("finetune") else "featcache finetune: ")
    assert message in line


def test_a_checkpoint_goes_with_what_a_kill_left_of_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_path(tmp_path / "my [model].safetensors")
    left = checkpoint.with_name(f".{checkpoint.name}.123.tmp")
    other = tmp_path / ".other.checkpoint.safetensors.123.tmp"
    killed = """
import os, sys, torch, safetensors.torch
from pathlib import Path
from featcache.tensor_files import write_safetensors

def save_file(tensors, filename, metadata):
    Path(filename).with_name(".tmpAbCdEf").write_bytes(b"as the library does")
    os._exit(9)

safetensors.torch.save_file = save_file
write_safetensors(Path(sys.argv[1]), {"x": torch.zeros(1)}, {})
"""
    words = [sys.executable, "-c", killed, str(checkpoint)]
    assert subprocess.run(words, check=False).returncode == 9
    assert list(tmp_path.glob("**/.tmpAbCdEf"))
    for path in (checkpoint, left, other):
        path.touch()
    remove_checkpoint(checkpoint)
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_the_same_command_ends_with_the_same_bits(
    pets: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    words = ("--epochs", "4", "--output", "model.safetensors")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run(pets, whole, *words)[0] == 0
    process = start(pets, killed, *words)
    for line in process.stderr:
        if line.startswith("epoch 2/4"):
            break
    # The line comes before its checkpoint: what is left is epoch 1 or epoch 2.
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert checkpoint_path(killed / "model.safetensors").exists()
    code, out, err = run(pets, killed, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["num_resumed_epochs"] in (1, 2, 3)
    assert sorted(path.name for path in killed.iterdir() if path.is_file()) == [
        "model.json",
        "model.safetensors",
        "model.safetensors.lock",
    ]
    ends = [read_tensor_file(where / "model.safetensors") for where in (killed, whole)]
    assert model_card(ends[0]) == model_card(ends[1])  # scores among it
    one, two = (file.tensors() for file in ends)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []

"""The tutorials' commands: they parse, and (slow) they run in order and succeed."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import REPO
from featcache import cli

TUTORIALS = ("tutorial-photographs", "tutorial-notebook")


def text_of(name: str) -> str:
    return (REPO / "docs" / f"{name}.md").read_text()


def commands(name: str) -> list[str]:
    """What a reader types, as the script that refreshes the outputs finds it."""
    spec = importlib.util.spec_from_file_location("refresh", REPO / "scripts/refresh_tutorials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    typed: list[str] = module.typed_commands(text_of(name))
    return typed


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_command_is_one_that_featcache_takes(name: str) -> None:
    typed = commands(name)
    assert len(typed) >= 5
    for line in typed:
        words = shlex.split(line)
        words = words[1:] if words[0] == "featcache" else words
        command = cli.COMMANDS[words[0]]
        config = getattr(importlib.import_module("featcache.config"), command.config)
        cli.parse(words[0], config, words[1:])


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_command_shows_its_output(name: str) -> None:
    text = text_of(name)
    assert "@@" not in text
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        lines = block.splitlines()
        assert not lines[-1].startswith("$ "), lines[-1]


def test_the_folder_is_made_as_the_tutorial_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cifar10:
        """More images of a class than are wanted, in turn."""

        classes = ("cat", "dog")

        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            assert download
            self.value = 200 if train else 50

        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            for number in range(430):
                yield Image.new("RGB", (32, 32), (self.value, number // 2, 0)), number % 2

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar10)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", text_of("tutorial-notebook"), re.DOTALL)
    exec(code, {})
    counts = {
        f"{split}/{name}": len(list((tmp_path / "cifar10-2500" / split / name).iterdir()))
        for split in ("train", "test")
        for name in Cifar10.classes
    }
    assert counts == {"train/cat": 200, "train/dog": 200, "test/cat": 50, "test/dog": 50}
    last = Image.open(tmp_path / "cifar10-2500" / "test" / "dog" / "0049.jpg")
    assert last.getpixel((0, 0)) == pytest.approx((50, 49, 0), abs=3)


def draw_tree(top: Path, num: int, seed: int) -> None:
    """Three classes that differ in colour."""
    rng = np.random.default_rng(seed)
    for place, name in enumerate(("cat", "dog", "ship")):
        (top / name).mkdir(parents=True)
        for i in range(num):
            pixels = rng.integers(0, 120, (32, 32, 3))
            pixels[..., place] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(top / name / f"{i:04d}.jpg")


def make_data(folder: Path) -> None:
    """What the tutorials start from, in small."""
    draw_tree(folder / "photos", 14, seed=1)
    draw_tree(folder / "cifar10-2500" / "train", 8, seed=2)
    draw_tree(folder / "cifar10-2500" / "test", 4, seed=3)
    draw_tree(folder / "new", 1, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TUTORIALS)
def test_the_commands_run_in_order(name: str, tmp_path: Path) -> None:
    make_data(tmp_path)
    python = shlex.quote(sys.executable)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in commands(name):
        if line.startswith("featcache compare"):
            line += " --min-steps 4 --epochs 1"
        # As typed, but also where the console scripts are not installed.
        typed = re.sub(r"^(featcache )?", f"{python} -m featcache ", line)
        done = subprocess.run(
            ["/bin/sh", "-c", typed],
            cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for output in re.findall(r"--output (\S+)", " ".join(commands(name))):
        assert (tmp_path / output).stat().st_size > 1000

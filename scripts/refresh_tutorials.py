"""Run the tutorials' commands and write what they print below them.

    python scripts/refresh_tutorials.py path/to/cifar10-2500

The folder has train/<class>/ and test/<class>/. Everything happens in a scratch folder; only the
documents under docs/ are written. Takes minutes to half an hour, according to the machine, which
should have nothing else to do: the seconds are part of the output.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIALS = ("tutorial-photographs.md", "tutorial-notebook.md")
CLASSES, PER_CLASS = ("cat", "dog", "ship"), 100
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def typed_commands(text: str) -> list[str]:
    """The lines after "$ " in a document's console blocks."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith("$ ")]


def prepare(folder: Path, data: Path) -> None:
    """What the tutorials start from: photos in one tree, three new ones, the whole subset."""
    for name in CLASSES:
        (folder / "photos" / name).mkdir(parents=True)
        for file in sorted((data / "train" / name).iterdir())[:PER_CLASS]:
            shutil.copy(file, folder / "photos" / name)
        (folder / "new").mkdir(exist_ok=True)
        file = min((data / "test" / name).iterdir())
        shutil.copy(file, folder / "new" / f"{name}-{file.name}")
    (folder / "cifar10-2500").symlink_to(data.resolve(), target_is_directory=True)


def run(line: str, folder: Path) -> str:
    """What a command prints, to either stream; progress on the way to the end left out."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(f"$ {line}", flush=True)
    done = subprocess.run(  # noqa: S603 - our own documents
        ["/bin/sh", "-c", line], cwd=folder, env={**os.environ, "PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"refresh_tutorials: exit code {done.returncode} of: {line}")
    lines = done.stdout.rstrip().splitlines()
    if line.startswith("featcache compare"):
        # The table and what follows; before it come two or three lines for each run.
        start = next(i for i, text in enumerate(lines) if text.startswith("train images"))
        lines = ["…", *lines[start:]]
    return "\n".join(lines)


def refresh(document: Path, folder: Path) -> None:
    """Run a document's commands in order and write it with their output."""

    def filled(block: re.Match[str]) -> str:
        commands = [line[2:] for line in block[1].splitlines() if line.startswith("$ ")]
        shown = [f"$ {command}\n{run(command, folder)}" for command in commands]
        return "```console\n" + "\n".join(shown) + "\n```"

    document.write_text(BLOCK.sub(filled, document.read_text()))


def main() -> None:
    """Refresh the tutorials."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="the CIFAR-10 subset in class folders")
    parser.add_argument("--only", choices=TUTORIALS, help="refresh one document")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and keep it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, given.data)
        for name in TUTORIALS:
            if given.only in (None, name):
                refresh(DOCS / name, folder)


if __name__ == "__main__":
    main()

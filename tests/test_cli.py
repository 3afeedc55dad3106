"""The commands as a user types them: exit codes, one-line errors, JSON, light start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from data_helpers import make_folder
from featcache import cli
from featcache.errors import StorageError, UserError

SCRIPTS = ("extract-features", "train-head", "finetune")


def shell(*words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `featcache WORDS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_of_every_command_names_its_flags_without_torch(name: str) -> None:
    heavy = {"torch", "torchvision", "sklearn", "h5py", "matplotlib", "numpy"}
    if name not in {"predict", "report"}:  # a list of words sends tyro to its type checker
        heavy.add("typeguard")
    probe = (
        "import sys\nfrom featcache.cli import main\n"
        "try:\n    main([sys.argv[1], '--help'])\nexcept SystemExit as stop:\n"
        "    assert not stop.code\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", probe, name], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "--json" in out.stdout
    assert "usage:" in out.stdout


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["extract-feature"]) == 2
    assert "did you mean extract-features" in capsys.readouterr().err


BAD_LINES = [
    (["extract-features"], "Missing"),
    (["extract-features", "digits", "--wieghts", "bundled"], "--weights"),
    (["extract-features", "digits", "--num-train", "many"], "--num-train"),
    (["extract-features", "digits", "--num-train", "0"], "at least 1"),
    (["extract-features", "digits", "--num-train", "-5"], "at least 1"),
    (["extract-features", "digits", "--resize", "stretch"], "squash"),
    (["extract-features", "digits", "--image-px", "3"], "between 8 and 4096"),
    (["extract-features", "digits", "--views", "0"], "--views"),
    (["extract-features", "digits", "--force", "--update"], "--force"),
    (["extract-features", "digits", "--test-fraction", "1.5"], "between 0 and 1"),
    (["extract-features", "digits", "--weights", "bundled", "--backbone", "vgg11"], "resnet18"),
    (["extract-features", "digits", "--weights", "bundeld"], "did you mean bundled"),
    (["extract-features", "digits", "--weights", "gone.pth"], "no such file"),
    (["extract-features", "cifar11", "--weights", "bundled"], "cifar10"),
    (["extract-features", "no/such/folder", "--weights", "bundled"], "no/such/folder"),
    (["extract-features", "digits", "--weights", "bundled", "--device", "cuda"], "--device"),
    (["extract-features", "digits", "--weights", "bundled", "--num-train", "9999"], "9999"),
    (["train-head", "gone.h5"], "gone.h5"),
    (["train-head", "gone.h5", "--lr", "0"], "above 0"),
    (["train-head", "gone.h5", "--lr", "nan"], "above 0"),
    (["train-head", "gone.h5", "--epochs", "0"], "between 1 and 1000000"),
    (["finetune", "digits", "--batch-size", "0"], "at least 1"),
    (["finetune", "digits", "--freeze-backbone", "--unfreeze", "layer4"], "--unfreeze"),
    (["info", "gone.h5"], "gone.h5"),
    (["verify", "."], "."),
]


@pytest.mark.parametrize(("line", "hint"), BAD_LINES, ids=lambda v: " ".join(v)[:60])
def test_bad_input_is_one_line_and_exit_code_2(
    line: list[str],
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert hint in err
    assert "Traceback" not in err


def test_foreseen_failures_have_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from featcache.config import InfoConfig

    def run(error: BaseException, *, goes_on: bool = False) -> int:
        def worker(config: InfoConfig) -> dict:
            raise error

        return cli.run("prog", InfoConfig, worker, ["x"], goes_on=goes_on)

    assert run(UserError("two\nlines")) == 2
    assert capsys.readouterr().err == "prog: two lines\n"
    assert run(StorageError("disk")) == 1
    assert run(OSError(28, "No space left on device")) == 1
    assert run(MemoryError()) == 1
    capsys.readouterr()
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "prog: interrupted; no file was left half-written\n"
    assert run(KeyboardInterrupt(), goes_on=True) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        run(ZeroDivisionError())


def test_extraction_end_to_end(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my pets & co", train=3, test=2)
    words = ("extract-features", folder, "--weights", "random", "--image-px", 32, "--json")
    first = shell(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert len(first.stdout.splitlines()) == 1
    assert (tmp_path / report["cache"]).is_file()
    assert "next: train-head" in first.stderr
    second = json.loads(shell(*words, cwd=tmp_path).stdout)
    assert second["hit"]


@pytest.mark.parametrize("dataset", ["folder", "digits"])
def test_a_hit_imports_neither_torch_nor_h5py(tmp_path: Path, dataset: str) -> None:
    if dataset == "folder":
        dataset = str(make_folder(tmp_path / "pets", train=3, test=2))
    words = ["extract-features", dataset, "--weights", "bundled", "--num-train", "4"]
    words += ["--num-test", "2", "--cache-dir", str(tmp_path / "cache")]
    assert shell(*words).returncode == 0
    probe = (
        "import sys\nfrom featcache.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'torchvision', 'h5py', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", probe, *words], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "already cached" in out.stderr


def test_console_scripts_are_declared() -> None:
    text = (REPO / "pyproject.toml").read_text()
    for name in (*SCRIPTS, "featcache"):
        assert f'{name} = "featcache.cli:' in text

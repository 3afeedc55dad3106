"""The commands as a user types them: exit codes, one-line errors, JSON, light start-up."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_helpers import copy_cache
from conftest import REPO
from data_helpers import make_folder
from featcache import __main__, cli
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
    usage = out.stdout.split("\n\n")[0]
    assert "usage:" in usage
    assert not {"STR", "PATH"} & set(usage.split()), usage  # positionals have names


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["extract-feature"]) == 2
    assert "did you mean extract-features" in capsys.readouterr().err


BAD_LINES = [
    (["extract-features"], "extract-features: no DATASET is given; type"),
    (
        ["extract-features", "digits", "--wieghts", "bundled"],
        "no flag '--wieghts'; did you mean --weights, ",
    ),
    (["extract-features", "digits", "extra"], "Unrecognized options: extra; type"),
    (["extract-features", "digits", "--num-train", "many"], "--num-train: 'many' is not a whole"),
    (["train-head", "gone.h5", "--epochs", "1.5"], "--epochs: '1.5' is not a whole number; type"),
    (["train-head", "gone.h5", "--holdout", "x"], "--holdout: 'x' is not a number; type"),
    (
        ["train-head", "gone.h5", "--solver", "knnn"],
        "--solver: no choice 'knnn'; did you mean knn?",
    ),
    (["train-head", "gone.h5", "--k", "1.5"], "--k: '1.5' is not a whole number; type"),
    (["finetune", "digits", "--resume"], "did you mean --no-resume, "),
    (["train-head", "gone.h5", "--solver"], "--solver needs a value; type"),
    (["compare", "digits", "--sizes", "5;all"], "for example 5,20,50,all"),
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

    def run(error: BaseException, *, resumes: bool = False) -> int:
        def worker(config: InfoConfig) -> dict:
            raise error

        return cli.run("prog", InfoConfig, worker, ["x"], resumes=resumes)

    assert run(UserError("two\nlines")) == 2
    assert capsys.readouterr().err == "prog: two lines\n"
    assert run(StorageError("disk")) == 1
    assert run(OSError(28, "No space left on device")) == 1
    assert run(MemoryError()) == 1
    capsys.readouterr()
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "prog: interrupted; no file was left half-written\n"
    assert run(KeyboardInterrupt(), resumes=True) == 130
    assert capsys.readouterr().err == (
        "prog: interrupted; finished work is kept; rerun the same command to resume\n"
    )
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
        function = "main" if name == "featcache" else name.replace("-", "_")
        assert f'{name} = "featcache.__main__:{function}"' in text
        assert callable(getattr(__main__, function))


def in_bash(line: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $F is `python -m featcache`."""
    env = {**os.environ, "F": f"{sys.executable} -m featcache"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, cwd=cwd, env=env, timeout=240, check=False
    )


CLOSED = "cannot write to standard output: Bad file descriptor"
FULL = "cannot write to standard output: No space left on device"


@pytest.mark.parametrize(
    ("line", "code", "out_lines", "last"),
    [
        ("$F info x.h5 2>&-", 0, 0, ""),
        ("$F info x.h5 --json 2>&-", 0, 1, ""),
        ("$F info x.h5 --json 2>/dev/full", 0, 1, ""),
        ("$F info x.h5 >&- <&-", 0, 0, "test       70 images, 0 skipped"),
        ("$F info x.h5 --json >&-", 1, 0, f"featcache info: {CLOSED}"),
        ("$F info x.h5 --json >/dev/full", 1, 0, f"featcache info: {FULL}"),
        ("$F info --help >/dev/full", 1, 0, f"featcache info: {FULL}"),
        ("$F --help >&-", 1, 0, f"featcache: {CLOSED}"),
        ("$F --version >/dev/full", 1, 0, f"featcache: {FULL}"),
        ("$F info x.h5 --json >&- 2>&- <&-", 1, 0, ""),
    ],
)
def test_streams_that_take_nothing_cost_only_what_they_lose(
    line: str, code: int, out_lines: int, last: str, tmp_path: Path
) -> None:
    copy_cache(tmp_path / "x.h5")
    done = in_bash(line, tmp_path)
    err = done.stderr.decode()
    assert done.returncode == code, err
    assert len(done.stdout.splitlines()) == out_lines
    if out_lines:
        assert json.loads(done.stdout)["command"] == "info"
    assert err.splitlines()[-1:] == ([last] if last else [])
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    probe = (
        "import os, sys\nfrom featcache import cli\ncli.main(['--version'])\n"
        "number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\nassert number > 2, number\n"
        "os.write(2, b'a library complains')\n"
    )
    line = f'"{sys.executable}" -c "{probe}" file >&- 2>&- <&-'
    assert in_bash(line, tmp_path).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_cpu_quota_limits_the_threads_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.config import InfoConfig

    for granted, threads in ((math.inf, None), (0.5, "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("featcache.cli.cpu_quota", lambda granted=granted: granted)
        monkeypatch.setattr("featcache.runtime.cpu_quota", lambda granted=granted: granted)
        assert cli.run("prog", InfoConfig, lambda _: {}, ["x"]) == 0
        assert os.environ.get("OMP_NUM_THREADS") == threads


def test_what_strangers_wrote_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    from featcache.config import InfoConfig

    hostile = "\x1b[2J\x9b1A\u202egnp.exe\x07\udc9b"
    shown = r"\x1b[2J\x9b1A\u202egnp.exe\x07\udc9b"

    def refuse(config: InfoConfig) -> dict:
        raise UserError(f"no file {hostile}")

    assert cli.run("prog", InfoConfig, refuse, ["x"]) == 2
    assert capsys.readouterr().err == f"prog: no file {shown}\n"
    assert cli.run("prog", InfoConfig, lambda _: {}, ["x"], lambda _: [hostile]) == 0
    assert capsys.readouterr().err == f"{shown}\n"
    assert cli.main([hostile]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_mistyped_line_is_plain_text_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["info", "x.h5", "--jsn"]) == 2
    assert capsys.readouterr().err == (
        "featcache info: no flag '--jsn'; did you mean --json?; known: --json, --verbose; "
        "type featcache info --help for every flag\n"
    )


STOPPED_IMPORT = """
import sys
from featcache import __main__

class Stop:
    def find_spec(self, name, *_):
        if name == stopped:
            raise KeyboardInterrupt

stopped = sys.argv[1]
if stopped == "fcntl":
    sys.modules["fcntl"] = None
sys.meta_path.insert(0, Stop())
sys.argv[1:] = ["info", "x.h5"]
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("featcache.cli", 130, "featcache: interrupted"),
        ("featcache.config", 130, "featcache: interrupted"),
        ("tyro", 130, "featcache info: interrupted; no file was left half-written"),
        ("featcache.extract", 130, "featcache info: interrupted; no file was left half-written"),
        ("fcntl", 1, "featcache: no file locks (fcntl) on this platform; use Linux, macOS, or WSL"),
    ],
)
def test_a_start_that_fails_is_one_line(module: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_IMPORT, module], capture_output=True, text=True, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert done.stderr.startswith(said)


def test_a_limit_on_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    from featcache.config import InfoConfig

    def run(error: Exception) -> str:
        def worker(config: InfoConfig) -> dict:
            raise error

        assert cli.run("prog", InfoConfig, worker, ["x"]) == 1
        return capsys.readouterr().err

    short = "prog: out of memory; free some, raise the limit of ulimit -v where one is set, or try "
    for said in (
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ):
        assert run(said).startswith(short)
    unclear = RuntimeError("could not create a primitive")
    with pytest.raises(RuntimeError, match="primitive"):
        run(unclear)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 31, resource.RLIM_INFINITY))
    assert run(unclear).startswith("prog: could not create a primitive; memory is limited: raise")
    done = in_bash("ulimit -v 2500000; $F extract-features digits --weights bundled", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr

"""The command line: parse, run the worker, print. Workers are imported only when they run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from featcache.display import muted, say
from featcache.errors import FeatcacheError, UserError, one_of
from featcache.runtime import cpu_quota, interrupts_first, num_cores
from featcache.streams import drop_unwritten, open_closed_streams, write_stdout

EXIT_INTERRUPTED = 130
EXIT_FAILED = 1
EXIT_USAGE = 2

Report = Mapping[str, Any]
Config = TypeVar("Config")


class Command(NamedTuple):
    """One command: its settings class, and where to import its worker and summary from.

    `resumes`: whether the same command, typed again, resumes an interrupted run.
    """

    config: str
    worker: str
    summary: str
    help: str
    resumes: bool = False


COMMANDS = {
    "extract-features": Command(
        config="ExtractConfig",
        worker="extract:extract_part",
        summary="extract:part_lines",
        help="run the frozen backbone once and cache its features",
        resumes=True,
    ),
    "train-head": Command(
        config="TrainHeadConfig",
        worker="heads:train_head",
        summary="heads:summary_lines",
        help="fit a head on cached features",
    ),
    "finetune": Command(
        config="FinetuneConfig",
        worker="finetune:finetune",
        summary="finetune:summary_lines",
        help="train the whole network on the images, for comparison",
        resumes=True,
    ),
    "info": Command(
        config="InfoConfig",
        worker="extract:inspect",
        summary="extract:inspect_lines",
        help="show what a cache contains and how it was made",
    ),
    "verify": Command(
        config="VerifyConfig",
        worker="extract:check",
        summary="extract:check_lines",
        help="check a cache for damage, and repair it",
    ),
    "merge": Command(
        config="MergeConfig",
        worker="extract:merge",
        summary="extract:merge_lines",
        help="merge the shards that several machines wrote into one cache",
        resumes=True,
    ),
    "audit": Command(
        config="AuditConfig",
        worker="audit:audit",
        summary="audit:summary_lines",
        help="find wrong labels, leaks, near-duplicates and odd images in a cache",
    ),
    "predict": Command(
        config="PredictConfig",
        worker="predict:predict",
        summary="predict:summary_lines",
        help="classify images with a trained head or model",
    ),
    "export": Command(
        config="ExportConfig",
        worker="export:export",
        summary="export:summary_lines",
        help="write backbone and head as one ONNX or torch.export file",
    ),
    "compare": Command(
        config="CompareConfig",
        worker="compare:compare",
        summary="compare:summary_lines",
        help="learning curve: cached head against fine-tuning, and which to pick",
        resumes=True,
    ),
    "report": Command(
        config="ReportConfig",
        worker="html_report:write_report",
        summary="html_report:summary_lines",
        help="one HTML page, and Markdown, from the reports of runs",
    ),
}


def parse(prog: str, config_class: type[Config], argv: Sequence[str] | None) -> Config:
    """Parse the command line into a config; `--help` prints the help and exits.

    Raises:
        UserError: The line does not parse, or a value is out of range.
        StorageError: The help cannot be written to standard output.
    """
    import tyro

    from featcache.config.settings import description_of

    words = list(sys.argv[1:] if argv is None else argv)
    words = ["--verbose" if word == "-v" else word for word in words]
    markers = (
        tyro.conf.PositionalRequiredArgs,
        tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.FlagCreatePairsOff,
    )
    # Caught, because tyro colors its messages on stderr too when stdout is a terminal.
    text, message = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(message):
            return tyro.cli(
                config_class,
                prog=prog,
                description=description_of(config_class),
                args=words,
                config=markers,
            )
    except SystemExit as stop:
        if not stop.code:
            write_stdout(text.getvalue())
            raise
        if isinstance(stop.__context__, UserError):  # from one of our own checks: complete
            raise stop.__context__ from None
        raise UserError(_one_line(message.getvalue(), prog, config_class)) from None


def _one_line(boxed: str, prog: str, config_class: type) -> str:
    """Shorten tyro's message to what was wrong, and the flag or value that may have been meant."""
    rows = [row.strip() for row in boxed.splitlines()]
    text: list[str] = []
    for row in rows[1:]:  # the first row is a title
        if row.startswith(("For full helptext", "Argument helptext", "Perhaps you meant")):
            break
        if row.strip("-"):  # not a horizontal line
            text.append(row)
    # For a value of the wrong type, tyro lists every type that it tried.
    sentence = " ".join(text).split(" Got errors:")[0]
    if found := re.match(r"Unrecognized options: (-[^,]*)", sentence):
        options = (
            f for f in dataclasses.fields(config_class) if f.default is not f.default_factory
        )
        names = ((f"no-{f.name}" if f.default is True else f.name) for f in options)
        flags = (f"--{name.replace('_', '-')}" for name in names)
        sentence = one_of(found[1], flags, "flag")
    elif found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. .* \((.*)\)", sentence):
        choices = [word for word in re.findall("'(.*?)'", found[3]) if word != "None"]
        sentence = f"{found[2]}: {one_of(found[1], choices, 'choice')}"
    elif found := re.match(r"(?i)Error parsing (--\S+): .*?\b(int|float)\b.*?'(.*)'", sentence):
        wanted = "a whole number" if found[2].lower() == "int" else "a number"
        sentence = f"{found[1]}: {found[3]!r} is not {wanted}"
    elif found := re.match(r"Missing from .*?: ([A-Z]+)", sentence):
        sentence = f"no {found[1]} is given"
    elif found := re.match(r"Missing value for argument '(.*?)'", sentence):
        sentence = f"{found[1]} needs a value"
    return f"{sentence.rstrip('.')}; type {prog} --help for every flag"


def run(
    prog: str,
    config_class: type[Config],
    worker: Callable[[Config], Report],
    argv: Sequence[str] | None = None,
    summary: Callable[[Report], list[str]] | None = None,
    *,
    resumes: bool = False,
) -> int:
    """Parse the command line, do the work, print the report; errors become one line on stderr.

    Args:
        prog: The command's name in messages.
        config_class: The dataclass whose fields are the flags.
        worker: Does the work and returns the JSON report.
        argv: The command line; None means `sys.argv`.
        summary: Turns the report into lines for people.
        resumes: Whether the same command, typed again, resumes an interrupted run.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.
    """
    work = functools.partial(_work, prog, config_class, worker, argv, summary)
    return _exit_code(prog, work, resumes=resumes)


def _work(
    prog: str,
    config_class: type[Config],
    worker: Callable[[Config], Report],
    argv: Sequence[str] | None,
    summary: Callable[[Report], list[str]] | None,
) -> int:
    from featcache.config.settings import command_line  # late: featcache --help needs no settings

    # Both only take effect before torch is imported. Threads that spin at barriers slow a busy
    # machine down four times; threads beyond the CPU quota only wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if cpu_quota() < math.inf:
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))
    with command_line():
        config = parse(prog, config_class, argv)
        report = worker(config)
    for line in summary(report) if summary and not muted() else []:
        say(line)
    if getattr(config, "json", False) and not muted():
        write_stdout(json.dumps(report) + "\n")
    return int(report.get("exit_code", 0))


def _exit_code(prog: str, work: Callable[[], int], *, resumes: bool = False) -> int:
    """The exit code of `work`; expected failures are reported in one line."""
    open_closed_streams()
    try:
        with interrupts_first():
            return work()
    except KeyboardInterrupt:
        kept = "finished work is kept; rerun the same command to resume"
        say(f"{prog}: interrupted; {kept if resumes else 'no file was left half-written'}")
        return EXIT_INTERRUPTED
    except FeatcacheError as error:
        say(f"{prog}: {_single(error)}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output is gone: no error of the command
        return EXIT_FAILED
    except Exception as error:
        if short := _out_of_memory(error):
            say(f"{prog}: {short}, or try fewer images or a smaller --batch-size")
        elif isinstance(error, OSError):
            say(f"{prog}: {_single(error)}")
        else:
            raise
        return EXIT_FAILED
    finally:
        drop_unwritten()


# Messages of libraries that run out of memory without raising MemoryError.
NO_MEMORY = (
    "failed to map segment",
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
)


def _out_of_memory(error: Exception) -> str:
    """A message if the error means a lack of memory, else an empty string."""
    import resource

    disguised = isinstance(error, OSError | ImportError | RuntimeError)
    text = str(error).lower()
    if isinstance(error, MemoryError) or (disguised and any(words in text for words in NO_MEMORY)):
        return "out of memory; free some, raise the limit of ulimit -v where one is set"
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited and isinstance(error, ImportError | RuntimeError):  # in disguise
        return f"{_single(error)[:200]}; memory is limited: raise the limit of ulimit -v"
    return ""


def _single(error: Exception) -> str:
    return " ".join(str(error).split())


def from_home(home: str) -> Callable[..., Any]:
    """The function that `home` names as module:function, imported when it is called."""
    module, name = home.split(":")

    def call(argument: Any, **more: Any) -> Any:
        return getattr(importlib.import_module(f"featcache.{module}"), name)(argument, **more)

    return call


def run_command(name: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one of `COMMANDS` as a console script."""
    command = COMMANDS[name]
    return run(
        prog or name,
        getattr(importlib.import_module("featcache.config"), command.config),
        from_home(command.worker),
        argv,
        from_home(command.summary),
        resumes=command.resumes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Console script `featcache`: the first word picks the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:], prog=f"featcache {words[0]}")
    return _exit_code("featcache", lambda: _without_command(words))


def _without_command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        write_stdout(_usage())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        from featcache import __version__

        write_stdout(f"featcache {__version__}\n")
        return 0
    raise UserError(f"{one_of(words[0], COMMANDS, 'command')}; type featcache --help")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: featcache COMMAND [OPTIONS]",
            "",
            "Cache a frozen backbone's features, fit heads on them, compare with fine-tuning.",
            "",
            *rows,
            "",
            "featcache COMMAND --help lists a command's flags.",
            "",
        ]
    )

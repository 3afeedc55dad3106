"""Entry points of the console scripts; `python -m featcache` is the `featcache` command.

Imports happen inside `_start`, so that Ctrl-C during imports, and a platform without file locks,
end in one line.
"""

from __future__ import annotations

import sys

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def _start(command: str = "") -> int:
    """Run a command, or the one that the first word of the command line names."""
    try:
        import fcntl  # noqa: F401

        from featcache import cli

        return cli.run_command(command) if command else cli.main()
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name != "fcntl":
            raise
        _say("no file locks (fcntl) on this platform; use Linux, macOS, or WSL on Windows")
        return EXIT_FAILED


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"featcache: {text}\n")


def main() -> int:
    """Console script `featcache`."""
    return _start()


def extract_features() -> int:
    """Console script `extract-features`."""
    return _start("extract-features")


def train_head() -> int:
    """Console script `train-head`."""
    return _start("train-head")


def finetune() -> int:
    """Console script `finetune`."""
    return _start("finetune")


if __name__ == "__main__":
    sys.exit(main())

"""Where the console scripts start; `python -m featcache` is the `featcache` command.

Little is imported before `_start`, so that an early Ctrl-C and a platform without file locks end in
one line too.
"""

from __future__ import annotations

import sys

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def _start(name: str) -> int:
    """Import and run one of the functions of `featcache.cli`."""
    try:
        import fcntl  # noqa: F401

        from featcache import cli

        return int(getattr(cli, name)())
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
    return _start("main")


def extract_features() -> int:
    """Console script `extract-features`."""
    return _start("extract_features")


def train_head() -> int:
    """Console script `train-head`."""
    return _start("train_head")


def finetune() -> int:
    """Console script `finetune`."""
    return _start("finetune")


if __name__ == "__main__":
    sys.exit(main())

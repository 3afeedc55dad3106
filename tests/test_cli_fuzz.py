"""Command lines put together at random: an exit code as promised, one line, no traceback."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from featcache import cli, config

JUNK = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "1e9", "nan", "inf", "-inf", "None", "True", "ä"),
    *(
        "a b",
        "x" * 5000,
        "\n",
        "\udc80",
        "{}",
        "[1]",
        "../..",
        "/",
        ".",
        "~",
        "%s",
        "$(ls)",
    ),
    *(
        "none",
        "flip",
        "99999999999999999999999",
        "0.5",
        "torch",
        "cpu",
        "crop",
        "bundled",
        "random",
    ),
)
# Without an input that exists no command gets far enough to work.
MISSING = ("gone.h5", "no/such/folder", "gone.csv", "gone.safetensors", "cifar1O", *JUNK)


def flags_of(command: cli.Command) -> list[str]:
    fields = dataclasses.fields(getattr(config, command.config))
    return ["--" + field.name.replace("_", "-") for field in fields] + ["--nonsense", "-v", "-q"]


def random_line(rng: random.Random) -> list[str]:
    name = rng.choice([*cli.COMMANDS, "extract", ""])
    flags = flags_of(cli.COMMANDS[name]) if name in cli.COMMANDS else ["--json"]
    line = [name] + [rng.choice(MISSING) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    for _ in range(rng.randrange(4)):
        line += [rng.choice(flags)] + [rng.choice(JUNK)] * rng.choice([0, 1, 1, 2])
    return line


@pytest.mark.parametrize("num_cases", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_command_line_ends_as_promised(
    num_cases: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "a" / "b" / "c"  # so that ../.. stays inside
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    rng = random.Random(num_cases)
    for _ in range(num_cases):
        line = random_line(rng)
        try:
            code = cli.main(line)
        except SystemExit as stop:  # --help
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert code in (0, 1, 2), line
        assert "Traceback" not in err, line
        if code == 2 and line[0]:
            assert out == "", line
            assert len(err.splitlines()) == 1, (line, err)

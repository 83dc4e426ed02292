"""What the soak tests share: how many cases run, a command with its limits, a folder under watch.

`make test-slow` runs a tenth of the cases; `make test-soak` runs them all (MAECT_SOAK=full).
MAECT_SOAK_SEED chooses other cases than the committed ones.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.cli import main
from maect.files import sha256

#: seconds that one command may take
LIMIT_S = 30


@dataclass(frozen=True)
class Told:
    """What a command left behind."""

    code: int
    out: str
    err: str


def cases(full: int, few: int | None = None) -> pytest.MarkDecorator:
    """Return the mark that runs a test once for each case: `case` is its number.

    `few` is how many run outside the soak; by default a tenth.
    """
    count = full if os.environ.get("MAECT_SOAK") == "full" else few or full // 10
    return pytest.mark.parametrize("case", range(count))


def draw(what: str, case: int) -> random.Random:
    """Return the generator of a case: equal for equal names, numbers and seeds."""
    return random.Random(f"{os.environ.get('MAECT_SOAK_SEED', '0')}/{what}/{case}")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Told:
    """Run a command in this process, which may end in words and a documented code only.

    Fails the test for a traceback, an undocumented exit code, control characters on the terminal,
    or a command that takes longer than `LIMIT_S`.
    """
    line = [str(argument) for argument in arguments]
    with limited(line):
        try:
            code = main(line)
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
    out, err = capsys.readouterr()
    assert code in (0, 1, 2, 3), f"{line}: exit code {code}"
    assert "Traceback" not in out + err, f"{line}: {err}"
    assert (out + err).replace("\n", "").replace("\t", "").isprintable(), f"{line}: {out}{err}"
    assert code == 0 or (out + err).strip(), f"{line}: exit code {code} without a word"
    return Told(code, out, err)


@contextmanager
def limited(what: object) -> Iterator[None]:
    """Fail the test where the block takes longer than `LIMIT_S`."""

    def late(*_: object) -> None:
        pytest.fail(f"{what} took longer than {LIMIT_S} s")  # no `except Exception` stops it

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Fail the test where the block changes, adds or removes a file below `folder`."""
    before = _content(folder)
    yield
    assert _content(folder) == before


def _content(folder: Path) -> dict[str, str]:
    """Return path -> what lies there, for everything below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        else:
            found[str(path)] = sha256(path) if path.is_file() else "folder"
    return found

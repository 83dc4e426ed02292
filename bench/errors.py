"""Errors a user can cause, told in a sentence or two."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

#: exit codes of every command
OK, STAGE_FAILED, USAGE, MISMATCH = 0, 1, 2, 3
#: of one ended by SIGHUP, Ctrl-C (or a budget), SIGTERM: 128 and the signal's number, as shells say
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143

#: characters of a word from a file that a message shows
SHOWN = 60


class UserError(Exception):
    """A mistake in a suite, data, a store or an argument: no traceback, exit code 2."""

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None
    ) -> None:
        where = "" if file is None else f"{file}:{line}: " if line else f"{file}: "
        super().__init__(printable(where + message))


class MachineError(Exception):
    """Ray or the machine gave way, told in a sentence: no traceback, exit code 1."""


def printable(text: str) -> str:
    """Return `text` with what a terminal would act on (escape codes, line ends) written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str) -> str:
    """Return `text`, cut where it is too long for a message."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return what to append to an error about an unknown `word`: the nearest name, or all."""
    names = sorted(known)
    near = difflib.get_close_matches(short(word), names, n=1, cutoff=0.65)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""

"""Errors a user can cause, told in a sentence or two."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

#: exit codes of every command
OK, STAGE_FAILED, USAGE, MISMATCH = 0, 1, 2, 3
#: of one ended by SIGHUP, Ctrl-C (or a budget), SIGTERM: 128 and the signal's number, as shells say
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143

#: characters of a word from a file that a message shows
SHOWN = 60
#: and of all the words that are known
KNOWN = 240


class UserError(Exception):
    """A mistake in a suite, data, a store or an argument: no traceback, exit code 2.

    `faults` are all mistakes that were found, the error itself the first of them.
    """

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None
    ) -> None:
        where = "" if file is None else f"{file}:{line}: " if line else f"{file}: "
        super().__init__(printable(where + message))
        self.line, self.faults = line or 0, [self]


@contextmanager
def several() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Give what to try each of several things with. At the end, raise the `UserError` that came
    first, if one came, with all of them as its faults."""
    faults = list[UserError]()

    @contextmanager
    def each() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            faults.extend(error.faults)

    yield each
    if faults:
        faults[0].faults = [*{str(fault): fault for fault in faults}.values()]
        raise faults[0]


class MachineError(Exception):
    """Ray or the machine gave way, told in a sentence: no traceback, exit code 1."""


def printable(text: str) -> str:
    """Return `text` with what a terminal would act on (escape codes, line ends) written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def written(text: str) -> str:
    """Return what `printable` does, a line a line, and with the spaces and joiners of languages."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c in "\n\t\u00a0\u3000\u200c\u200d" else printable(c) for c in text)


def short(text: str, most: int = SHOWN) -> str:
    """Return `text`, cut where it is too long for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason(error: Exception) -> str:
    """Return why something went wrong, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return next(iter(str(error).splitlines()), type(error).__name__)


def require_writable(path: Path) -> None:
    """Raise OSError unless a file can be written at `path`."""
    if path.is_dir():
        raise OSError(errno.EISDIR, "it is a folder")
    TemporaryFile(dir=path.parent).close()


@contextmanager
def writing(path: Path, option: str = "--to") -> Iterator[None]:
    """Raise `UserError` where a file or folder that an option names cannot be written."""
    try:
        yield
    except OSError as error:
        told = f"{path} cannot be written ({reason(error)}); name another place: {option} PATH"
        raise UserError(told) from None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return which of the known words was meant, if any; capitals count for nothing."""
    lower = {name.lower(): name for name in sorted(known, reverse=True)}
    near = difflib.get_close_matches(short(word).lower(), lower, n=1, cutoff=0.65)
    return lower[near[0]] if near else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return what to append to an error about an unknown `word`: the nearest name, or all."""
    names = sorted(known)
    if near := nearest(word, names):
        return f"; did you mean '{near}'?"
    return f"; known: {short(', '.join(names), KNOWN)}" if names else ""


def nearest_file(path: Path, *folders: Path, pattern: str = "*") -> str:
    """Return what to append to an error about a file that is not there: the nearest, or nothing.

    It is looked for in its own folder and then in further ones, whatever its name's suffix.
    """
    files: dict[str, Path] = {}
    for folder in (*reversed(folders), path.parent):
        with suppress(OSError, ValueError):
            files |= {file.stem: file for file in sorted(folder.glob(pattern))}
    near = nearest(path.stem, files)
    return f"; did you mean '{files[near]}'?" if near else ""

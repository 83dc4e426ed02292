"""Standard output and error, whatever they lead to: a terminal, a pipe, a full disk, nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from bench.errors import reason, written


class Stream:
    """A standard stream that text from strangers cannot harm, and whose end harms no run.

    What a terminal would act on is written out. A character that the encoding lacks becomes `?`.
    Once nothing can be written any more, nothing is.
    """

    def __init__(self, stream: TextIO, change: Callable[[str], str] = written) -> None:
        self._stream, self._change = stream, change
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    @property
    def terminal(self) -> Stream:
        """Return the same stream for who draws on it with escape codes, and escapes names."""
        return Stream(self._stream, str)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or nothing where nothing can be written."""
        try:
            self._stream.write(self._change(text))
        except (OSError, ValueError) as error:
            self._end(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, if it can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """Let all else that is written go nowhere; tell of it unless the reader just left."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            print(f"the output could not be written: {reason(error)}", file=sys.stderr)


def guard() -> None:
    """Put a `Stream` in place of standard output and error, which need not be there."""
    with suppress(OSError):  # a file must not take the number of a stream that was closed
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        if not isinstance(stream, Stream):
            stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, Stream(stream))

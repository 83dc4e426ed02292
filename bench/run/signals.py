"""SIGHUP, Ctrl-C and SIGTERM: each ends a command in the same way, with an exit code of its own.

They are blocked in all threads but for the one here that waits for them. So no handler is ever run
that Ray sets in their place: its own abort the process. What a signal does is to raise
KeyboardInterrupt in the main thread, but never amid an import: an exception amid torch's C++ code
takes the process down. Amid Ray's code, which swallows some and crashes of others, a signal is only
noted, and `check` raises.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from bench.errors import HUNG_UP, INTERRUPTED, TERMINATED

_CODES = {signal.SIGHUP: HUNG_UP, signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
#: those that were not ignored when this process began, as `nohup` ignores SIGHUP
_ENDING = {number for number in _CODES if signal.getsignal(number) is not signal.SIG_IGN}
#: wakes the main thread; whoever does not handle it ignores it
_WAKE = signal.SIGURG

#: the first that came
received: int | None = None
_only_noted = _raised = False


def catch() -> None:
    """Take the signals over; to be called before there are other threads."""
    signal.signal(_WAKE, _woken)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    os.register_at_fork(after_in_child=_begin_apart)
    threading.Thread(target=_watch, daemon=True, name="signals").start()


def _begin_apart() -> None:
    """In a process started from here: be ended as ever, but not by what a terminal tells us all.

    A Ray that is told to end takes the run down with it, before it can say a word.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    with suppress(OSError):
        os.setpgid(0, 0)


def _watch() -> None:
    global received, _raised
    while _ENDING:
        number = signal.sigwait(_ENDING)
        received, _raised = received or number, False
        while not (_raised or _only_noted):
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
            time.sleep(0.05)


def _woken(number: int, frame: FrameType | None) -> None:
    global _raised
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame is None and not _only_noted:
        _raised = True
        check()


def check() -> None:
    """Raise KeyboardInterrupt where a signal has come."""
    if received:
        raise KeyboardInterrupt


@contextmanager
def noted() -> Iterator[None]:
    """Only note signals while the block runs; it calls `check` now and then."""
    global _only_noted
    _only_noted = True
    try:
        yield
    finally:
        _only_noted = False


def code() -> int:
    """Return the exit code of a command that KeyboardInterrupt ends."""
    return _CODES[signal.Signals(received or signal.SIGINT)]


def adopt_orphans() -> None:
    """Become the parent of what is started below a process of ours that dies, where Linux helps."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_children() -> None:
    """Kill all processes below this one; those of Ray would live on for a minute and more."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def leave(exit_code: int) -> NoReturn:
    """End this process at once, and those below it.

    Python's own ending waits for threads and takes down what they use: amid a start of Ray or an
    import of torch it crashes.
    """
    end_children()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or full
            stream.flush()
    os._exit(exit_code)

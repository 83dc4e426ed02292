"""What a run that was stopped or killed left behind: open attempts and damaged artifacts."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from bench.plan.stage import Plan
from bench.store.record import Record, Status
from bench.store.store import Store


def take_over(plan: Plan, store: Store) -> None:
    """Close what a killed run left open; the caller holds the store.

    Ray's workers outlive their driver by seconds, so those that are still at it are ended first.
    """
    for key in plan.stages:
        close_running(store, key, "lost", "its run ended without a word (killed?)", kill_if=_lives)


def end_running(plan: Plan, store: Store) -> None:
    """End this machine's workers of a run and write the records that they no longer can write."""
    for key in plan.stages:
        close_running(
            store, key, "interrupted", "the run was stopped", time.time(), kill_if=_is_here
        )


def _kill(pid: int) -> None:
    """End a worker of ours that is in the middle of a stage."""
    if pid != os.getpid():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _is_here(attempt: Record) -> bool:
    """Return whether the worker that began an attempt was one of this machine."""
    return bool(attempt.env["host"] == platform.node())


def _lives(attempt: Record) -> bool:
    """Return whether the worker that began an attempt still runs here.

    Its process id may be another process's by now.
    """
    if not _is_here(attempt):
        return False
    with suppress(psutil.Error):
        process = psutil.Process(attempt.pid)
        old = process.create_time() <= attempt.started_s
        return old and " ".join(process.cmdline()).startswith("ray::")
    return False


def close_running(
    store: Store,
    key: str,
    status: Status,
    why: str,
    ended_s: float | None = None,
    *,
    kill_if: Callable[[Record], bool] = lambda attempt: False,
) -> None:
    """Write the records of attempts at which nobody works any more.

    `ended_s` is when that began, in seconds since the epoch. A worker for whose attempt
    `kill_if` holds is killed first.
    """
    for attempt in store.state(key).attempts:
        if attempt.status == "running":
            if kill_if(attempt):
                _kill(attempt.pid)
            store.close_abandoned(attempt, status, why, ended_s)


def clear_damage(plan: Plan, store: Store) -> list[str]:
    """Set aside what does not fit its checksum, so that it is made again. Return what, in words."""
    lines = []
    for stage in plan.stages.values():
        store.check_usable(stage.key)
        lines += [f"{problem}; it is left out" for problem in stage.state.problems]
        reason = store.damage(stage.state) if stage.record is not None else None
        if reason is not None:
            store.set_aside(stage.state, reason)
            lines.append(f"{stage.title}: {reason}; set aside, it is made again")
    return lines

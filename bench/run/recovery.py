"""What a run that was stopped or killed left behind: open attempts and damaged artifacts."""

from __future__ import annotations

import os
import platform
import signal
from contextlib import suppress
from typing import Any

import psutil

from bench.plan.stage import Plan
from bench.store.store import Store


def kill(pid: int) -> None:
    """End a worker of ours that is in the middle of a stage."""
    if pid != os.getpid():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def take_over(plan: Plan, store: Store) -> None:
    """Close what a killed run left open; the caller holds the store.

    Ray's workers outlive their driver by seconds, so those that are still at it are ended first.
    """
    for key in plan.stages:
        for attempt in store.state(key).attempts:
            if attempt["status"] == "running" and _lives(attempt):
                kill(attempt["pid"])
        close_running(store, key, "lost", "its run ended without a word (killed?)")


def _lives(attempt: dict[str, Any]) -> bool:
    """Whether the worker that began an attempt still runs, here; its pid may be another's now."""
    if attempt["env"]["host"] != platform.node():
        return False
    with suppress(psutil.Error):
        process = psutil.Process(attempt["pid"])
        old = process.create_time() <= attempt["started_s"]
        return old and " ".join(process.cmdline()).startswith("ray::")
    return False


def close_running(
    store: Store, key: str, status: str, why: str, ended: float | None = None
) -> None:
    """Write the records of attempts that nobody works on any more; `ended` is since when."""
    for attempt in store.state(key).attempts:
        if attempt["status"] == "running":
            store.close_abandoned(key, attempt, status, why, ended)


def clear_damage(plan: Plan, store: Store) -> list[str]:
    """Set aside what does not fit its checksum, so that it is made again; says what."""
    lines = []
    for stage in plan.stages.values():
        lines += [f"{problem}; it is left out" for problem in stage.state.problems]
        reason = store.damage(stage.state) if stage.record is not None else None
        if reason is not None:
            store.set_aside(stage.state, reason)
            lines.append(f"{stage.title}: {reason}; set aside, it is made again")
    return lines

"""What a run that was stopped or killed left behind: open attempts and damaged artifacts."""

from __future__ import annotations

import platform
from contextlib import suppress

import psutil

from bench import environment
from bench.plan.stage import Plan
from bench.plan.status import assess, mark_left_out
from bench.store.record import Record, Status
from bench.store.store import Store

#: why an attempt that a killed run left open did not complete
KILLED = "its run ended without a word (killed?)"


def take_over(plan: Plan, store: Store) -> list[str]:
    """Set every stage's status; close what a killed run left open and set aside what is damaged.

    The caller drives a run. What another run works on stays as it is. Return what was damaged, in
    words; it is made again. Raises `UserError` where a stage's folder is of no use.
    """
    store.refresh()
    lines = []
    for stage in plan.stages.values():
        store.check_usable(stage.key)
        assess(stage, store, keep_stale=plan.keep_stale)
        lines += [f"{problem}; it is left out" for problem in stage.state.problems]
        damage = next(store.plain_damages(stage.record), None) if stage.record else None
        left_open = any(attempt.status == "running" for attempt in stage.state.attempts)
        if (damage or left_open) and store.leases.claim(stage.key) is None:
            close_running(store, stage.key, "lost", KILLED)
            if damage:
                store.set_aside(stage.state, damage)
                lines.append(f"{stage.title}: {damage}; set aside, it is made again")
            store.leases.release(stage.key)
            assess(stage, store, keep_stale=plan.keep_stale)
    mark_left_out(plan, store)
    return lines


def _orphan(attempt: Record) -> psutil.Process | None:
    """Return the process that works on an attempt of a killed run, if it still lives here.

    A record may be forged or copied: it has to be a worker of Ray's that began exactly when the
    record says, and whose driver and node process are gone.
    """
    if attempt.env.get("host") != platform.node():
        return None
    with suppress(psutil.Error):
        process = psutil.Process(attempt.pid)
        lines = [" ".join(other.cmdline()) for other in (process, *process.parents())]
        alone = lines[0].startswith("ray::") and not any("raylet" in line for line in lines[1:])
        if alone and environment.begun_s(attempt.pid) == attempt.process_s:
            return process
    return None


def close_running(
    store: Store,
    key: str,
    status: Status,
    why: str,
    wall_s: float | None = None,
    run: str | None = None,
) -> None:
    """Write the records of attempts whose run or worker is no more, after `wall_s` of work.

    With `run` those of that run alone. Ray's workers outlive their driver by seconds: one that is
    still at it is ended first.
    """
    for attempt in store.state(key).attempts:
        if attempt.status == "running" and run in (None, attempt.run):
            if (orphan := _orphan(attempt)) is not None:
                with suppress(psutil.Error):
                    orphan.kill()
            ended_s = None if wall_s is None else attempt.started_s + wall_s
            store.close_abandoned(attempt, status, why, ended_s)

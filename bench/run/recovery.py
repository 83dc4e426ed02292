"""What a run that was stopped or killed left behind: open attempts and damaged artifacts."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import psutil

from bench import environment
from bench.plan.stage import Plan, Stage
from bench.plan.status import assess, mark_left_out
from bench.store.record import Record, Status
from bench.store.store import Store


def take_over(plan: Plan, store: Store, *, keep_stale: bool = False) -> list[str]:
    """Set every stage's status; close what a killed run left open and set aside what is damaged.

    The caller drives a run. What another run works on stays as it is. Return what was damaged, in
    words; it is made again. Raises `UserError` where a stage's folder is of no use.
    """
    close_left(plan.stages.values(), store, keep_stale=keep_stale)
    lines = []
    for stage in plan.stages.values():
        store.check_usable(stage.key)
        lines += [f"{problem}; it is left out" for problem in stage.state.problems]
        for problem in store.plain_damages(stage.record) if stage.record else ():
            with _claimed(store, stage.key) as ours:
                if ours:
                    store.set_aside(stage.state, problem)
                    lines.append(f"{stage.title}: {problem}; set aside, it is made again")
            break
    for stage in plan.stages.values() if lines else ():
        assess(stage, store, keep_stale=keep_stale)
    mark_left_out(plan, store)
    return lines


def close_left(stages: Collection[Stage], store: Store, *, keep_stale: bool = False) -> None:
    """Set the status of stages, inputs first; close attempts that a killed run left open at them.

    Ray's workers outlive their driver by seconds, so those that are still at it are ended first.
    """
    store.refresh()
    for stage in stages:
        assess(stage, store, keep_stale=keep_stale)
    left = [s for s in stages if any(a.status == "running" for a in s.state.attempts)]
    for stage in left:
        with _claimed(store, stage.key) as ours:
            if ours:
                close_orphans(stage.key, store)
    for stage in stages if left else ():
        assess(stage, store, keep_stale=keep_stale)


@contextmanager
def _claimed(store: Store, key: str) -> Iterator[bool]:
    """Have a stage's lease for a moment. Yield whether it is ours."""
    ours = store.leases.claim(key) is None
    try:
        yield ours
    finally:
        if ours:
            store.leases.release(key)


def close_orphans(key: str, store: Store) -> None:
    """Close the attempts that are open at a stage whose lease we have; end who is still at them."""
    for attempt in store.state(key).attempts:
        if attempt.status == "running":
            if (orphan := _orphan(attempt)) is not None:
                with suppress(psutil.Error):
                    orphan.kill()
            store.close_abandoned(attempt, "lost", "its run ended without a word (killed?)")


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
    """Write the records of attempts at which nobody works any more, after `wall_s` of work.

    With `run` those of that run alone.
    """
    for attempt in store.state(key).attempts:
        if attempt.status == "running" and run in (None, attempt.run):
            ended_s = None if wall_s is None else attempt.started_s + wall_s
            store.close_abandoned(attempt, status, why, ended_s)

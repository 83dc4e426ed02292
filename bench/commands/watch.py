"""`watch`: what runs on a store, from another terminal; read from the store alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import datetime
from math import fsum
from pathlib import Path
from typing import Any

from bench.commands import common
from bench.errors import OK
from bench.store.files import tail
from bench.store.record import Record
from bench.store.store import StageState, Store
from reports.display import amount, device_word, duration, held, plural, time_unit

#: a line of an attempt's log on how far a training stage is
_STEP = re.compile(r"(\S+) step ((\d+)/(\d+) .*)")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    text = "folder or URL of the store (default: store)"
    parser.add_argument("store", type=common.place, nargs="?", default=Path("store"), help=text)
    every = "look again each S seconds until the run ends (default 2 on a terminal, else look once)"
    parser.add_argument("--every", type=common.amount_of("seconds"), metavar="S", help=every)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print what runs, once or until the run ends. Return the exit code."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    store, known = common.existing(options.store), dict[str, StageState]()
    every = options.every or (2.0 if sys.stdout.isatty() else None)
    seen = look(store, known)
    if options.json or every is None or seen is None or not seen["runs"]:
        print(json.dumps(seen, indent=1) if options.json else _text(seen))
        return OK
    console = Console(file=getattr(sys.stdout, "terminal", sys.stdout), highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(Text(_text(seen)), refresh=True)
            if seen is None or not seen["runs"]:
                return OK
            time.sleep(every)
            store.refresh()
            seen = look(store, known)


def look(store: Store, known: dict[str, StageState]) -> dict[str, Any] | None:
    """Return the newest run at work on a store, or the newest, as plain data; None for no run.

    `known` keeps what was read before, for the next time.
    """
    runs = store.runs()
    if not runs:
        return None
    at_work = store.leases.drivers()
    newest = next((run for run in reversed(runs) if run.id in at_work), runs[-1])
    alive = newest.id in at_work
    for key in store.stage_keys():
        before = known.get(key, StageState(key))
        again = not before.attempts or before.problems or "running" in before.statuses.values()
        if again or [*before.statuses] != store.attempts(key):
            known[key] = store.state(key)
    mine = [one for state in known.values() for one in state.attempts if one.run == newest.id]
    now = time.time()
    running = [one for one in mine if one.status == "running"] if alive else []
    complete = {one.key for one in mine if one.status == "complete"}
    failed = {one.key for one in mine if one.status == "failed"} - complete
    began, ends, took = _stamp(newest.started), _stamp(newest.expected), newest.wall_s
    if took is None and began is not None:
        took = max(0.0, now - began)
    spent = dict[str, float]()
    for one in mine:
        hours = one.cost.device_hours
        if one in running:
            hours = one.cost.devices * max(0.0, now - one.started_s) / 3600
        kind = one.cost.device_kind
        spent[kind] = fsum([spent.get(kind, 0.0), hours or 0.0])
    return {
        "run": newest.id,
        "suite": newest.suite,
        "profile": newest.profile,
        "command": newest.command,
        "runs": alive,
        "status": newest.status if alive or newest.status != "running" else "lost",
        "seconds": took,
        "left_s": None if ends is None or not alive else max(0.0, ends - now),
        "stages": newest.stages,
        "cached": newest.cached,
        "complete": len(complete),
        "failed": len(failed),
        "device_hours": spent,
        "running": [_running(store, one, now) for one in running],
    }


def _stamp(date: str | None) -> float | None:
    """Return an ISO date in seconds since the epoch; None for none, or what is no date."""
    try:
        return datetime.fromisoformat(date or "").timestamp()
    except ValueError:
        return None


def _running(store: Store, attempt: Record, now: float) -> dict[str, Any]:
    """Return how far an attempt is, as its log tells."""
    lines = tail(store.attempt_folder(attempt.key, attempt.attempt) / "log.txt").splitlines()
    told = next((found for line in reversed(lines) if (found := _STEP.fullmatch(line))), None)
    seen: dict[str, Any] = {"step": None, "steps": None, "said": None, "left_s": None}
    if told is not None:
        step, steps = int(told[3]), int(told[4])
        rate = re.search(r"([\d.]+) images/s", told[2])
        batch = attempt.settings.get("train", {}).get("batch_size")
        left = None
        if rate and isinstance(batch, int) and float(rate[1]) > 0:
            ago = max(0.0, now - datetime.fromisoformat(told[1]).timestamp())
            left = max(0.0, (steps - step) * batch / float(rate[1]) - ago)
        seen = {"step": step, "steps": steps, "said": told[2], "left_s": left}
    cost = attempt.cost
    return {
        "key": attempt.key,
        "name": attempt.name,
        "attempt": attempt.attempt,
        "seconds": max(0.0, now - attempt.started_s),
        "devices": held(cost.devices, cost.device_kind, cost.device_model),
        "host": attempt.env["host"],
        **seen,
    }


def _text(seen: dict[str, Any] | None) -> str:
    """Return what was seen in a few lines."""
    if seen is None:
        return "nothing ran on this store yet"
    how = "runs" if seen["runs"] else f"ended: {seen['status']}"
    done = f"{seen['cached'] + seen['complete']} of {plural(seen['stages'], 'stage')} complete"
    done += f" ({seen['cached']} of them were there)" if seen["cached"] else ""
    done += f", {seen['failed']} failed" if seen["failed"] else ""
    took = duration(seen["seconds"])
    took += "" if seen["left_s"] is None else f", about {duration(seen['left_s'])} left"
    lines = [f"{seen['suite']}, profile {seen['profile']}: {how}, {took}; {done}"]
    for kind, hours in seen["device_hours"].items():
        unit, factor = time_unit(hours)
        lines.append(f"so far {amount(hours * factor)} {device_word(kind)}-{unit}")
    for one in seen["running"]:
        told = one["said"] or f"for {duration(one['seconds'])}"
        left = "" if one["left_s"] is None else f", {duration(one['left_s'])} left"
        lines.append(f"  {one['name']}: {told}{left}  [{one['devices']}, {one['host']}]")
    return common.lines_of(lines)

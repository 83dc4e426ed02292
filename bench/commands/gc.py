"""`gc`: what no suite refers to, and how large it is; with `--yes` it is removed.

A suite refers to the stages of its plan, cells of its search and all inputs among them. Attempts
of these stay, failed ones too: the ledger counts them, and `verify` misses none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from bench.commands import common
from bench.environment import processors
from bench.errors import OK, UserError
from bench.plan.planner import make_plan
from bench.store.store import StageState, Store
from bench.suite.load import load_suite
from reports.display import plural

#: folders of a store that no suite refers to, and what lies in them
_NOBODYS = {"damaged": "set aside", "ray": "Ray's", "removed": "half removed"}
#: runs whose commands are named, those that left most of what is listed
_COMMANDS = 5


@dataclass(frozen=True)
class Item:
    """Something in a store that no suite refers to."""

    #: of a stage; None for what is of no stage
    key: str | None
    name: str
    #: below the store's root
    path: str
    bytes: int
    #: when its last attempt began, in UTC, ISO 8601; empty where that is not known
    since: str
    #: id of the run that left it, where that is known
    run: str | None = None


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    suites = "suite whose results stay, FILE:PROFILE for one of its profiles alone"
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=suites)
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--dry-run", action="store_true", help="list only, which is the default")
    sides.add_argument("--yes", action="store_true", help="remove what is listed")
    seeds = "keep the first N seeds of each suite, as after runs with --seeds N"
    parser.add_argument("--seeds", type=common.count_from(1), metavar="N", help=seeds)
    common.store_argument(parser)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """List what no suite refers to, or remove it. Return the exit code."""
    store = common.existing(options.store)
    kept = referred(options.suites, options.seeds)
    with store.leases.driving(alone=True) if options.yes else nullcontext():
        items, unknown = unreferred(store, kept)
        if options.yes:
            _forget(store, {item.key for item in items} - kept)
            for item in items:
                store.remove(store.root / item.path)
    if options.json:
        told: dict[str, Any] = {"removed": options.yes, "items": list(map(asdict, items))}
        print(json.dumps(told | {"other_processors": unknown}, indent=1))
        return OK
    lines = [
        f"{(item.key or '')[: common.SHOWN_KEY]:{common.SHOWN_KEY}}  {item.since[:10]:10}  "
        f"{item.bytes / 2**20:9.1f} MiB  {item.name}"
        for item in items
    ]
    many = sum(item.bytes for item in items) / 2**20
    done = "removed" if options.yes else "referred to by none of these suites"
    lines.append(f"{len(items)} {done}, {many:.1f} MiB in all")
    commands = {run.id: run.command for run in store.runs()}
    made = Counter(commands.get(item.run, "a run without a record") for item in items if item.run)
    lines += [f"  {count} of: {command}" for command, count in made.most_common(_COMMANDS)]
    if unknown:
        lines.append(
            f"kept: {plural(len(unknown), 'stage')} of other processors than this machine's, whose "
            "keys it cannot tell; run gc on a machine like theirs"
        )
    if items and not options.yes:
        lines.append(f"to remove them: {options.command_line.replace(' --dry-run', '')} --yes")
    print(common.lines_of(lines))
    return OK


def referred(suites: list[str], seeds: int | None = None) -> set[str]:
    """Return the keys of all stages of suites, each a file or FILE:PROFILE.

    `seeds`: how many of each suite, if not those that its file names.
    Raises `UserError`, also where data are not here: then nothing tells what a suite refers to.
    """
    keys: set[str] = set()
    for text in suites:
        file, profile = common.file_and_profile(text)
        for name in [profile] if profile else load_suite(file).profiles:
            plan = make_plan(load_suite(file, profile=name, seeds=seeds), None)
            if plan.unresolved:
                others = "" if profile else f". To keep a single profile write {file}:PROFILE"
                raise UserError(
                    f"profile '{name}': its data are not here, so nothing tells which stages it "
                    f"refers to: {plan.unresolved}{others}",
                    file=file,
                )
            keys |= plan.stages.keys()
    return keys


def unreferred(store: Store, kept: set[str]) -> tuple[list[Item], list[str]]:
    """Return what can go, and the keys of stages that only another machine can judge."""
    sizes = Counter[str]()
    for path, size in store.sizes().items():
        parts = path.split("/")
        for depth in (2, 3):
            if len(parts) >= depth:
                sizes["/".join(parts[:depth])] += size
    items, unknown = [], []
    for key in store.stage_keys():
        state, path = store.state(key), f"stages/{key}"
        last = state.attempts[-1] if state.attempts else None
        name = "no readable record" if last is None else last.name
        since = "" if last is None else last.started
        left = f"{path}/checkpoints"
        if key in kept:
            if last is not None and last.status == "complete" and left in sizes:
                items.append(Item(key, f"checkpoints of {name}", left, sizes[left], since))
        elif not re.fullmatch("[0-9a-f]{20}", key):  # no stage: somebody's own
            continue
        elif _judged(state):
            items.append(Item(key, name, path, sizes[path], since, last.run if last else None))
        else:
            unknown.append(key)
    for path, size in sorted(sizes.items()):
        folder, _, name = path.partition("/")
        if folder in _NOBODYS and "/" not in name:
            items.append(Item(None, f"{_NOBODYS[folder]}: {name}", path, size, ""))
    return items, unknown


def _judged(state: StageState) -> bool:
    """Return whether this machine's plans would have the stage's key, if a suite had the stage.

    The class of processors is in the key.
    """
    classes = {a.settings.get("numerics", {}).get("processors") for a in state.attempts}
    return classes <= {None, processors("avx2")}


def _forget(store: Store, keys: set[str | None]) -> None:
    """Take stages out of the runs' records, in which `verify` would miss them for ever."""
    for run in store.runs():
        left = {key: attempts for key, attempts in run.attempts.items() if key not in keys}
        if len(left) < len(run.attempts):
            store.write_run(run.model_copy(update={"attempts": left}))

"""`show`: all attempts at one stage: what it is, from what, what it cost, what it gave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from bench.commands import common
from bench.errors import OK, UserError, short
from bench.store.store import StageState, Store
from reports.display import held


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("key", help="a stage's key, or the beginning of one")
    common.store_argument(parser)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Show one stage. Return the exit code."""
    store = common.existing(options.store)
    state = find(store, options.key)
    if options.json:
        print(json.dumps([record.plain() for record in state.attempts], indent=1))
    else:
        print(common.lines_of(_lines(state, store)))
    return OK


def find(store: Store, beginning: str) -> StageState:
    """Return the stage whose key begins so. Raises `UserError` if there is none, or several."""
    found = [key for key in store.stage_keys() if key.startswith(beginning)]
    if len(found) > 1:
        named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{len(found)} stages have a key that begins with '{beginning}': {named}")
    if not found:
        raise UserError(
            f"no stage in {store.name} has a key that begins with '{short(beginning)}'; "
            f"see: python -m bench ls --store {store.name}"
        )
    return store.state(found[0])


def _lines(state: StageState, store: Store) -> Iterator[str]:
    yield f"key {state.key}"
    yield f"folder {store.name}/stages/{state.key}"
    for record in state.attempts:
        cost = record.cost
        yield from ("", f"attempt {record.attempt}: {record.name}, {record.status}")
        yield f"  started  {record.started} on {record.env['host']}"
        if cost.wall_s is not None:
            on = held(cost.devices, cost.device_kind, cost.device_model)
            cpu = "" if cost.cpu_s is None else f", {cost.cpu_s:.1f} s of CPU time"
            yield f"  cost     {cost.wall_s:.1f} s × {on}{cpu}"
        if record.error is not None:
            yield f"  error    {record.error.kind}: {record.error.message}"
        for metric in record.metrics:
            yield f"  metric   {metric.label}: {metric.value:.2f} {metric.unit}"
        for name, source in record.inputs.items():
            yield f"  input    {name} {source.key[: common.SHOWN_KEY]}"
        yield f"  code     {record.code.hash}"
        for name, file in record.files.items():
            yield f"  file     {name} {file.bytes} bytes, sha256 {file.sha256[:16]}"
        yield f"  settings {json.dumps(record.settings)}"
        yield "  log"
        yield from (f"    {line}" for line in record.log_tail.rstrip().splitlines()[-12:])
    yield from (f"damaged: {problem}" for problem in state.problems)

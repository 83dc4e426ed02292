"""`ls`: the records of a store, an attempt a line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.commands import common
from bench.errors import OK
from bench.store.store import Store
from reports.display import duration


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.store_argument(parser)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """List every attempt, oldest first. Return the exit code."""
    rows = attempts(common.existing(options.store))
    print(json.dumps(rows, indent=1) if options.json else _text(rows))
    return OK


def attempts(store: Store) -> list[dict[str, Any]]:
    """Return every attempt of a store as plain data, oldest first; and what is damaged."""
    problems: list[str] = []
    store.runs(problems)
    rows: list[dict[str, Any]] = [{"key": "", "problem": problem} for problem in problems]
    for key in store.stage_keys():
        state = store.state(key)
        for record in state.attempts:
            rows.append(
                {
                    "key": key,
                    "attempt": record.attempt,
                    "kind": record.kind,
                    "name": record.name,
                    "status": record.status,
                    "started": record.started,
                    "wall_s": record.cost.wall_s,
                    "error": record.error and record.error.message,
                    "metrics": {metric.name: metric.value for metric in record.metrics},
                }
            )
        rows.extend({"key": key, "problem": problem} for problem in state.problems)
    return sorted(rows, key=lambda row: str(row.get("started", "")))


def _text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        key = row["key"][: common.SHOWN_KEY]
        if "problem" in row:
            lines.append(f"{key:{common.SHOWN_KEY}}  {row['problem']}")
            continue
        took = "" if row["wall_s"] is None else duration(row["wall_s"])
        metric = next((f"{name} {value:.1f}" for name, value in row["metrics"].items()), "")
        said = f": {row['error']}" if row["error"] else metric and f"  {metric}"
        lines.append(
            f"{key}  {row['started'][:19]}  {row['status']:11}  {took:>7}  {row['name']}{said}"
        )
    return common.lines_of(lines) or "the store has no records"

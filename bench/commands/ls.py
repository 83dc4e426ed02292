"""`ls` and `show`: records as text for a terminal."""

from __future__ import annotations

import json
from typing import Any

from bench.errors import UserError
from bench.store.store import StageState, Store
from reports.display import duration

SHOWN_KEY = 10


def records(store: Store) -> list[dict[str, Any]]:
    """Every attempt of a store, oldest first."""
    rows = []
    for key in store.stage_keys():
        state = store.state(key)
        for attempt in state.attempts:
            rows.append(
                {
                    "key": key,
                    "attempt": attempt.attempt,
                    "kind": attempt.kind,
                    "name": attempt.name,
                    "status": attempt.status,
                    "started": attempt.started,
                    "wall_s": attempt.cost.wall_s,
                    "metrics": {m.name: m.value for m in attempt.metrics},
                }
            )
        rows.extend({"key": key, "problem": problem} for problem in state.problems)
    return sorted(rows, key=lambda row: row.get("started", ""))


def records_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "the store has no records"
    lines = []
    for row in rows:
        if "problem" in row:
            lines.append(f"{row['key'][:SHOWN_KEY]}  {row['problem']}")
            continue
        took = "" if row["wall_s"] is None else duration(row["wall_s"])
        metric = next((f"{n} {v:.1f}" for n, v in row["metrics"].items()), "")
        lines.append(
            f"{row['key'][:SHOWN_KEY]}  {row['started'][:19]}  {row['status']:11}  {took:>7}  "
            f"{row['name']}  {metric}".rstrip()
        )
    return "\n".join(lines)


def find(store: Store, beginning: str) -> StageState:
    """The stage whose key begins so. Raises `UserError` if there is none, or several."""
    found = [key for key in store.stage_keys() if key.startswith(beginning)]
    if len(found) != 1:
        what = "no stage" if not found else f"{len(found)} stages"
        raise UserError(
            f"{what} with a key that begins with '{beginning}'; see: python -m bench ls"
        )
    return store.state(found[0])


def state_text(state: StageState) -> str:
    """All attempts at a stage: what it is, what it cost, what it gave."""
    lines = [f"key {state.key}"]
    for attempt in state.attempts:
        lines += ["", f"attempt {attempt.attempt}: {attempt.name}, {attempt.status}"]
        lines += [f"  started  {attempt.started} on {attempt.env['host']}"]
        cost = attempt.cost
        if cost.wall_s is not None:
            lines.append(
                f"  cost     {cost.wall_s:.1f} s × {cost.devices} {cost.device_kind} "
                f"({cost.device_model})"
            )
        if attempt.error:
            lines.append(f"  error    {attempt.error.kind}: {attempt.error.message}")
        for metric in attempt.metrics:
            lines.append(f"  metric   {metric.label}: {metric.value:.2f} {metric.unit}")
        for name, source in attempt.inputs.items():
            lines.append(f"  input    {name} {source.key[:SHOWN_KEY]}")
        lines.append(f"  code     {attempt.code.hash}")
        for name, entry in attempt.files.items():
            lines.append(f"  file     {name} {entry.bytes} bytes, sha256 {entry.sha256[:16]}")
        lines.append(f"  settings {json.dumps(attempt.settings)}")
        log = attempt.log_tail.rstrip().splitlines()[-12:]
        lines += ["  log", *(f"    {line}" for line in log)]
    lines += [f"damaged: {problem}" for problem in state.problems]
    return "\n".join(lines)

"""Plans and records as text for a terminal."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from bench.environment import processor
from bench.errors import UserError
from bench.plan import estimate
from bench.plan.stage import Plan, Stage
from bench.report.frames import scale
from bench.run.progress import duration
from bench.store.store import StageState, Store
from reports.display import amount, time_unit

SHOWN_KEY = 10
_NOT_RUN = ("cached", "pruned")


def _slots(plan: Plan) -> int:
    threads = max(s.settings["numerics"]["threads"] for s in plan.stages.values())
    return max(1, processor()["cores"] // threads)


def _todo(plan: Plan) -> list[Stage]:
    return [s for s in plan.stages.values() if s.status not in _NOT_RUN]


def plan_summary(plan: Plan) -> str:
    """The plan in a few lines."""
    suite = plan.suite
    kinds = Counter(stage.kind for stage in plan.stages.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    seeds, rows = ", ".join(map(str, suite.seeds)), len(plan.rows) // len(suite.seeds)
    lines = [
        f"{suite.name}, profile {suite.profile}: {scale(plan)}",
        f"{rows} rows × seeds {seeds} = {len(plan.stages)} stages ({counts})",
    ]
    if plan.unresolved:
        lines.append(f"keys are not resolved and nothing is cached: {plan.unresolved}")
        lines += _assumed(plan)
        return "\n".join(lines)
    todo, stale, pruned = _todo(plan), plan.with_status("stale"), plan.with_status("pruned")
    line = f"{len(plan.with_status('cached'))} cached, {len(todo)} to run"
    line += f", {len(pruned)} left out by the search" if pruned else ""
    if stale:
        line += f" ({len(stale)} of them stale: {stale[0].reason})"
    if todo:
        left = estimate.remaining(plan, todo, _slots(plan))
        line += (
            f", expected time {f'about {duration(left)}' if left is not None else 'unknown yet'}"
        )
    return "\n".join([*lines, line, *_predicted(plan, todo), *_assumed(plan)])


def _predicted(plan: Plan, todo: list[Stage]) -> list[str]:
    """Device-hours of the stages to run, by the rates in the store."""
    found = estimate.device_hours(plan, todo) if todo else None
    if found is None or not found[1].hours:
        return []
    device, hours, unknown = found
    unit, factor = time_unit(hours.hours)
    middle, low, high = (amount(value * factor) for value in hours)
    line = f"predicted {middle} {device.upper()}-{unit} ({low} to {high} by the middle 80 % of the "
    line += "rates in the store)"
    return [f"{line}; not counted, as none has run: {', '.join(unknown)}" if unknown else line]


def _assumed(plan: Plan) -> list[str]:
    """What the stages to run would cost, where only an assumed rate can tell."""
    found = estimate.assumed(_todo(plan), estimate.rates(plan.stages.values()))
    if found is None:
        return []
    return [
        (
            f"predicted {found}, each shared stage counted once. This assumes "
            f"{estimate.assumption()}, as the store has no measured rate; evaluations of "
            f"stored features are not counted"
        )
    ]


def left(plan: Plan) -> str:
    """What a stopped run leaves: stages complete, and to do with the time that they should take."""
    todo = _todo(plan)
    kinds = Counter(stage.kind for stage in todo)
    expected = estimate.remaining(plan, todo, _slots(plan))
    text = f"{len(plan.with_status('cached'))} of {len(plan.stages)} stages are complete and kept"
    if todo:
        text += f"; left: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        text += "" if expected is None else f", about {duration(expected)}"
    return text


def plan_text(plan: Plan) -> str:
    """The whole plan, a line a stage."""
    known = estimate.rates(plan.stages.values())
    lines = [plan_summary(plan), ""]
    for stage in plan.stages.values():
        key = "unresolved" if plan.unresolved else stage.key[:SHOWN_KEY]
        parts = [f"{key}  {stage.status:8}  {stage.title}"]
        if stage.steps:
            parts.append(f"{stage.steps} steps")
        if stage.flops:
            parts.append(f"{stage.flops:.2e} FLOPs")
        if stage.record is not None:
            parts.append(f"took {duration(stage.record['cost']['wall_s'])}")
        elif (expected := estimate.seconds(stage, known)) is not None:
            parts.append(f"about {duration(expected)}")
        elif (hours := estimate.assumed([stage], known)) is not None:
            parts.append(f"assumed {hours}")
        if stage.reason:
            parts.append(stage.reason)
        lines.append(", ".join(parts))
    return "\n".join(lines)


def _predicted_data(plan: Plan) -> dict[str, Any] | None:
    found = estimate.device_hours(plan, _todo(plan))
    if found is None:
        return None
    device, hours, unknown = found
    return {"device": device, **hours._asdict(), "not_counted": unknown}


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data."""
    known = estimate.rates(plan.stages.values())

    def assumed(stages: list[Stage]) -> dict[str, Any] | None:
        found = estimate.assumed(stages, known)
        return None if found is None else found._asdict() | {"assumed": estimate.assumption()}

    def one(stage: Stage) -> dict[str, Any]:
        return {
            "key": None if plan.unresolved else stage.key,
            "kind": stage.kind,
            "title": stage.title,
            "status": stage.status,
            "reason": stage.reason,
            "steps": stage.steps,
            "flops": stage.flops,
            "expected_s": estimate.seconds(stage, known),
            "assumed_gpu_hours": None if stage.status in _NOT_RUN else assumed([stage]),
            "inputs": {name: source.title for name, source in stage.inputs.items()},
        }

    return {
        "suite": plan.suite.name,
        "profile": plan.suite.profile,
        "seeds": plan.suite.seeds,
        "unresolved": plan.unresolved,
        "assumed_gpu_hours": assumed(_todo(plan)),
        "predicted_device_hours": _predicted_data(plan),
        "stages": [one(stage) for stage in plan.stages.values()],
    }


def records(store: Store) -> list[dict[str, Any]]:
    """Every attempt of a store, oldest first."""
    rows = []
    for key in store.stage_keys():
        state = store.state(key)
        for attempt in state.attempts:
            rows.append(
                {
                    "key": key,
                    "attempt": attempt["attempt"],
                    "kind": attempt["kind"],
                    "name": attempt["name"],
                    "status": attempt["status"],
                    "started": attempt["started"],
                    "wall_s": attempt["cost"].get("wall_s"),
                    "metrics": {m["name"]: m["value"] for m in attempt.get("metrics", [])},
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
        lines += ["", f"attempt {attempt['attempt']}: {attempt['name']}, {attempt['status']}"]
        lines += [f"  started  {attempt['started']} on {attempt['env']['host']}"]
        cost = attempt["cost"]
        if cost.get("wall_s") is not None:
            lines.append(
                f"  cost     {cost['wall_s']:.1f} s × {cost['devices']} {cost['device_kind']} "
                f"({cost['device_model']})"
            )
        if attempt.get("error"):
            lines.append(f"  error    {attempt['error']['class']}: {attempt['error']['message']}")
        for metric in attempt.get("metrics", []):
            lines.append(f"  metric   {metric['label']}: {metric['value']:.2f} {metric['unit']}")
        for name, source in attempt["inputs"].items():
            lines.append(f"  input    {name} {source['key'][:SHOWN_KEY]}")
        lines.append(f"  code     {attempt['code']['hash']}")
        for name, entry in attempt.get("files", {}).items():
            lines.append(f"  file     {name} {entry['bytes']} bytes, sha256 {entry['sha256'][:16]}")
        lines.append(f"  settings {json.dumps(attempt['settings'])}")
        log = attempt.get("log_tail", "").rstrip().splitlines()[-12:]
        lines += ["  log", *(f"    {line}" for line in log)]
    lines += [f"damaged: {problem}" for problem in state.problems]
    return "\n".join(lines)

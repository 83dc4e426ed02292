"""`plan`: what would run, and why; it starts nothing."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench.commands import common
from bench.environment import processor
from bench.errors import OK
from bench.plan import estimate
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Row, Stage
from bench.report.frames import scale
from bench.store.place import open_store
from reports.display import amount, device_word, duration, middle, plural, ranges, time_unit

#: status of stages that are to run
_TO_RUN = ("pending", "stale")
#: reasons and rows beyond which a text says how many more there are
_REASONS, _ROWS = 5, 24


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    stages = "a line for each stage too, with its key, steps, cost and reason"
    parser.add_argument("--stages", action="store_true", help=stages)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan. Return the exit code."""
    store = open_store(options.store)
    plan = make_plan(common.load(options), store, keep_stale=options.keep_stale, only=options.only)
    print(json.dumps(plan_data(plan), indent=1) if options.json else _text(plan, options.stages))
    return OK


def _counted(stages: Iterable[Stage]) -> str:
    """Return how many stages there are of each kind: "2 mae, 4 features"."""
    kinds = Counter(stage.kind for stage in stages)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _expected(plan: Plan, todo: list[Stage]) -> str | None:
    """Return in words the time that stages should take on this machine; None if unknown."""
    threads = max(stage.settings["numerics"]["threads"] for stage in plan.stages.values())
    seconds = estimate.remaining(plan, todo, max(1, processor()["cores"] // threads))
    return None if seconds is None else f"about {duration(seconds)}"


def plan_summary(plan: Plan) -> str:
    """Return the plan in a few lines."""
    suite, todo = plan.suite, plan.with_status(*_TO_RUN)
    seeds, rows = ranges(suite.seeds), len(plan.rows) // len(suite.seeds)
    stages = f"{plural(len(plan.stages), 'stage')} ({_counted(plan.stages.values())})"
    lines = [
        f"{suite.name}, profile {suite.profile}: {scale(plan)}",
        f"{plural(rows, 'row')} × seeds {seeds} = {stages}",
    ]
    if plan.unresolved:
        lines.append(f"keys are not resolved and nothing is cached: {plan.unresolved}")
        if plan.data.fingerprint is None:
            images = plan.data.counts["train"]
            lines.append(f"assumed: {images:,} training images, as the suite says")
    else:
        stale, pruned = plan.with_status("stale"), plan.with_status("pruned")
        line = f"{len(plan.with_status('cached'))} cached, {len(todo)} to run"
        line += f", {len(pruned)} left out by the search" if pruned else ""
        line += f" ({len(stale)} of them stale: {stale[0].reason})" if stale else ""
        line += f", expected time {_expected(plan, todo) or 'unknown yet'}" if todo else ""
        lines.append(line)
    lines += _predicted(plan, todo)
    assumed = estimate.assumed(todo, estimate.rates(plan))
    if assumed is not None:
        lines.append(
            f"predicted {assumed}, each shared stage counted once. This assumes "
            f"{estimate.assumption()}, as the store has no measured rate; evaluations of stored "
            "features are not counted"
        )
    notes = [f"note: {note}" for note in plan.suite.notes if note.startswith("--set")]
    return common.lines_of([*lines, *notes])


def _predicted(plan: Plan, todo: list[Stage]) -> list[str]:
    """Return a line on the device-hours of the stages to run by rates in the store, or none."""
    found = estimate.device_hours(plan, todo) if todo else None
    if found is None or not found[1].hours:
        return []
    device, hours, unknown = found
    unit, factor = time_unit(hours.hours)
    middle, low, high = (amount(value * factor) for value in hours)
    line = f"predicted {middle} {device_word(device)}-{unit} ({low} to {high} by the middle 80 % "
    recorded = estimate.last_device(plan.stages.values()) is not None
    line += f"of the rates {'in the store' if recorded else 'that `calibrate` measured'})"
    return [f"{line}; not counted, as none has run: {', '.join(unknown)}" if unknown else line]


def left(plan: Plan) -> str:
    """Return in words what a stopped run leaves: stages complete, and to do with their time."""
    todo = plan.with_status(*_TO_RUN)
    text = f"{len(plan.with_status('cached'))} of {len(plan.stages)} stages are complete and kept"
    if todo:
        expected = _expected(plan, todo)
        text += f"; left: {_counted(todo)}" + (f", {expected}" if expected else "")
    return text


def _text(plan: Plan, stages: bool) -> str:
    """Return the plan, a line a row; with `stages` a line a stage."""
    known = estimate.rates(plan)
    # where all is cached there is no more to say
    todo = plan.with_status(*_TO_RUN)
    shown = [stage for stage in plan.stages.values() if todo or stage.reason]
    if stages:
        lines = [_line(stage, plan, known) for stage in shown]
    else:
        lines = _reasons(plan) + (_rows(plan, known) if todo else [])
        lines += ["", "each stage: --stages"] if lines else []
    return "\n\n".join([plan_summary(plan), *([common.lines_of(lines)] if lines else [])])


def _reasons(plan: Plan) -> list[str]:
    """Return why stages are not simply cached or new, a line for each reason."""
    found: dict[tuple[str, str], list[Stage]] = {}
    for stage in plan.stages.values():
        if stage.reason:
            why = re.sub(r", seed \d+$", "", stage.reason)
            found.setdefault((stage.status, why), []).append(stage)
    lines = [f"{status}: {_counted(s)}: {why}" for (status, why), s in found.items()]
    more = [f"and {len(lines) - _REASONS} more reasons"] if len(lines) > _REASONS else []
    return [*lines[:_REASONS], *more, *([""] if lines else [])]


def _rows(plan: Plan, known: dict[str, estimate.Rates]) -> list[str]:
    """Return a line a row: how many stages are to run of those that no row above has, how long
    these take one after the other, and the steps of a seed.
    """
    lines, seen = [("row", "to run", "alone", "steps")], set[str]()
    by_name: dict[str, list[Row]] = {}
    for row in plan.rows:
        by_name.setdefault(row.variant.name, []).append(row)
    for name, rows in by_name.items():
        own = {s.key: s for row in rows for s in row.stages() if s.key not in seen}
        seen |= own.keys()
        todo = [stage for stage in own.values() if stage.status in _TO_RUN]
        times = [t for s in todo if (t := estimate.seconds(s, known)) is not None]
        hours = estimate.assumed(todo, known)
        took = duration(sum(times)) if times else f"{amount(hours.hours)} GPU-h" if hours else ""
        steps = ", ".join(f"{s.kind} {s.steps}" for s in rows[0].chain if s.key in own)
        lines.append((middle(name, 40), f"{len(todo)} of {len(own)}", took, steps))
    more = len(lines) - 1 - _ROWS
    widths = [max(map(len, column)) for column in zip(*lines[: _ROWS + 1], strict=True)]
    texts = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines[: _ROWS + 1]]
    return texts + ([f"and {plural(more, 'row')} more"] if more > 0 else [])


def _line(stage: Stage, plan: Plan, known: dict[str, estimate.Rates]) -> str:
    key = "unresolved" if plan.unresolved else stage.key[: common.SHOWN_KEY]
    parts = [f"{key}  {stage.status:8}  {stage.title}"]
    if stage.steps:
        parts.append(f"{stage.steps} steps")
    if stage.flops:
        parts.append(f"{stage.flops:.2e} FLOPs")
    if stage.record is not None:
        parts.append(f"took {duration(stage.record.cost.wall_s or 0.0)}")
    elif (expected := estimate.seconds(stage, known)) is not None:
        parts.append(f"about {duration(expected)}")
    elif (hours := estimate.assumed([stage], known)) is not None:
        parts.append(f"assumed {hours}")
    return ", ".join([*parts, *([stage.reason] if stage.reason else [])])


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON data."""
    known, todo = estimate.rates(plan), plan.with_status(*_TO_RUN)
    predicted = None
    if (found := estimate.device_hours(plan, todo)) is not None:
        device, hours, unknown = found
        predicted = {"device": device, **hours._asdict(), "not_counted": unknown}

    def assumed(stages: list[Stage]) -> dict[str, Any] | None:
        found = estimate.assumed(stages, known)
        return None if found is None else found._asdict() | {"assumed": estimate.assumption()}

    def one(stage: Stage) -> dict[str, Any]:
        told = ("kind", "title", "status", "reason", "steps", "flops")
        return {
            "key": None if plan.unresolved else stage.key,
            **{name: getattr(stage, name) for name in told},
            "expected_s": estimate.seconds(stage, known),
            "assumed_gpu_hours": assumed([stage]) if stage.status in _TO_RUN else None,
            "inputs": {name: source.title for name, source in stage.inputs.items()},
        }

    return {
        "suite": plan.suite.name,
        "profile": plan.suite.profile,
        "seeds": plan.suite.seeds,
        "unresolved": plan.unresolved,
        "assumed_gpu_hours": assumed(todo),
        "predicted_device_hours": predicted,
        "stages": [one(stage) for stage in plan.stages.values()],
    }

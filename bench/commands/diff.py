"""`diff`: what differs between two runs.

Settings, code, environment and data come first: a difference in one explains those after it. Then
metrics and artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.commands import common
from bench.commands.show import find
from bench.errors import MISMATCH, OK, UserError, printable, short
from bench.plan.planner import make_plan
from bench.store.place import open_store
from bench.store.record import Record
from bench.store.store import Store
from bench.suite.load import load_suite
from reports.display import plural, ranges
from reports.frames import flatten, unequal

#: what of a record is compared, in the order in which a difference explains the next
SECTIONS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "settings": lambda record: flatten(record.settings),
    "code": lambda record: dict(record.code.modules),
    "environment": lambda record: {k: v for k, v in record.env.items() if k != "host"},
    "data": lambda record: flatten(record.data.model_dump()),
}
#: rows beyond which a text says how many more there are
_NAMED = 3
#: the end of a stage's title
_SEED = re.compile(r", seed (\d+)$")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    text = "a store's folder, FILE.yaml or FILE.yaml:PROFILE, a run's id, or the beginning of a key"
    for side in ("a", "b"):
        parser.add_argument(side, metavar=side.upper(), help=text)
    common.store_argument(parser)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the differences. Return the exit code."""
    store = open_store(options.store)
    sides = _side(options.a, store), _side(options.b, store)
    for problem in (problem for side in sides for problem in side.problems):
        print(printable(f"left out: {problem}"), file=sys.stderr)
    found = compare(*sides)
    kinds = {name: one.kind for name, one in sides[0].records.items() if name in sides[1].records}
    print(json.dumps(found, indent=1) if options.json else _text(found, kinds))
    return MISMATCH if found["different"] else OK


@dataclass
class Side:
    """Newest complete record of each stage, by the stage's title; what is damaged."""

    name: str
    records: dict[str, Record]
    problems: list[str]


def _read(store: Store, run: str | None = None) -> tuple[list[Record], list[str]]:
    """Return all records of a store, or those of one run, and what of the store is damaged."""
    states = [store.state(key) for key in store.stage_keys()]
    records = [one for state in states for one in state.attempts if run in (None, one.run)]
    return records, [problem for state in states for problem in state.problems]


def _side(what: str, store: Store) -> Side:
    """Return what an argument names.

    A store's folder; or, looked up in `store`, FILE.yaml[:PROFILE], a run's id, the beginning of a
    key. Raises `UserError` if it is none of these.
    """
    found: Sequence[Record | None]
    name, problems, records = what, list[str](), dict[str, Record]()
    file, profile = common.file_and_profile(what)
    if os.path.isdir(what) or "://" in what:
        found, problems = _read(common.existing(what if "://" in what else Path(what)))
    elif file.suffix in (".yaml", ".yml"):
        plan = make_plan(load_suite(file, profile=profile), store, keep_stale=True)
        found = [stage.record for stage in plan.stages.values()]
    elif any(run.id == what for run in store.runs()):
        found, problems = _read(store, what)
    elif not re.fullmatch("[0-9a-f]+", what) or not store.exists():
        raise UserError(
            f"'{short(what)}' is neither a store's folder nor a suite file, and the store "
            f"{store.name} has no such run or key"
        )
    else:
        state = find(store, what)
        found = [state.record]
        if state.attempts:
            name = f"{what[: common.SHOWN_KEY]} ({state.attempts[-1].name})"
    for record in found:
        if record is not None and record.status == "complete":
            older = records.get(record.name, record)
            records[record.name] = max(record, older, key=lambda one: one.started)
    if not records:
        raise UserError(f"'{what}' has no complete stage to compare")
    return Side(name, records, problems)


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Return every difference as plain data.

    `different` says whether anything but the environment differs.
    """
    single = len(a.records) == len(b.records) == 1
    if single:  # a pair whatever their titles
        (one, ours), (other, theirs) = *a.records.items(), *b.records.items()
        pairs = [(one if one == other else f"{one} / {other}", ours, theirs)]
    else:
        pairs = [(n, ours, b.records[n]) for n, ours in a.records.items() if n in b.records]
    metrics = [
        {"stage": name, "metric": metric, "a": old, "b": new, "difference": _gap(old, new)}
        for name, ours, theirs in pairs
        for metric, old, new in unequal(values(ours), values(theirs))
    ]
    result: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "stages": len(pairs),
        "only_a": [] if single else sorted(a.records.keys() - b.records.keys()),
        "only_b": [] if single else sorted(b.records.keys() - a.records.keys()),
        **{section: _section(pairs, read) for section, read in SECTIONS.items()},
        "metrics": metrics,
        "artifacts": [
            f"{name}/{file}"
            for name, ours, theirs in pairs
            for file, *_ in sorted(unequal(ours.file_hashes, theirs.file_hashes))
        ],
    }
    compared = sum(len(ours.metrics) for _, ours, _ in pairs)
    result["equal_metrics"] = compared - sum(metric["a"] is not None for metric in metrics)
    counted = ("only_a", "only_b", "settings", "code", "data", "metrics", "artifacts")
    result["different"] = any(result[name] for name in counted)
    return result


def _section(
    pairs: list[tuple[str, Record, Record]], read: Callable[[Record], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one entry a difference, with all stages that have it."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, ours, theirs in pairs:
        for what, a, b in unequal(read(ours), read(theirs)):
            entry: dict[str, Any] = {"what": what, "a": a, "b": b, "stages": []}
            found.setdefault((what, repr(a), repr(b)), entry)["stages"].append(name)
    return list(found.values())


def values(record: Record) -> dict[str, float]:
    """Return the values of a record's metrics, by name."""
    return {metric.name: metric.value for metric in record.metrics}


def _gap(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _text(result: dict[str, Any], kinds: dict[str, str]) -> str:
    """Return what differs, by rows; `kinds` has the stages in both, by title."""
    lines = [f"A  {result['a']}", f"B  {result['b']}", f"{result['stages']} stages in both"]
    for which in ("a", "b"):
        if result[f"only_{which}"]:
            lines.append(f"only in {which.upper()}: {_whom(result[f'only_{which}'], {})}")
    for section in SECTIONS:
        found: dict[str, list[str]] = {}
        for entry in result[section]:
            said = f"{entry['what'].removeprefix('train.')} {_shown(entry['a'])} -> "
            found.setdefault(_whom(entry["stages"], kinds), []).append(said + _shown(entry["b"]))
        lines += ["", f"{section}: {len(result[section]) or 'equal'}"]
        for whom, changes in found.items():
            one = len(changes) == 1
            lines.append(f"  {whom}:" + (f" {changes[0]}" if one else ""))
            lines += [] if one else [f"    {change}" for change in changes]
    lines += ["", f"metrics: {result['equal_metrics']} equal, {len(result['metrics'])} differ"]
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in result["metrics"]:
        row = rows.setdefault(_SEED.sub("", entry["stage"]), {})
        row.setdefault(entry["metric"], []).append(entry)
    for _, metrics in sorted(rows.items()):
        lines.append(f"  {_whom(sorted({e['stage'] for m in metrics.values() for e in m}), {})}:")
        lines += [f"    {name} {_moved(metrics[name])}" for name in list(metrics)[:_NAMED]]
        lines += [f"    and {len(metrics) - _NAMED} more"] if len(metrics) > _NAMED else []
    files = Counter(name.rpartition("/")[0] for name in result["artifacts"])
    told = f"{plural(files.total(), 'file')} not equal, of {_whom([*files], kinds)}"
    lines += ["", f"artifacts: {told if files else 'bit for bit equal'}"]
    return common.lines_of(lines)


def _moved(entries: list[dict[str, Any]]) -> str:
    """Return how a metric of a row differs: of one seed, or on average and from least to most."""
    gaps = sorted(e["difference"] for e in entries if e["difference"] is not None)
    if len(gaps) < len(entries):
        return "; ".join(f"{_shown(e['a'])} -> {_shown(e['b'])}" for e in entries[:_NAMED])
    a, b, gap = (fmean(entry[name] for entry in entries) for name in ("a", "b", "difference"))
    told = f"{_shown(a)} -> {_shown(b)} ({gap:+.4g}"
    return told + (f"; {gaps[0]:+.4g} to {gaps[-1]:+.4g})" if len(gaps) > 1 else ")")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _whom(names: list[str], kinds: dict[str, str]) -> str:
    """Return stages by row and seeds: "MAE-CT tuning, seeds 0 to 9"; or that they are all."""
    if len(names) > 1 and kinds and kinds.keys() <= set(names):
        return f"all {len(names)} stages"
    mine = {kinds.get(name) for name in names}
    every = [name for name, kind in kinds.items() if kind in mine]
    if len(names) > _NAMED and len(every) == len(names):
        return f"all {len(names)} stages of {', '.join(sorted(map(str, mine)))}"
    rows: dict[str, list[int]] = {}
    for name in names:
        rows.setdefault(_SEED.sub("", name), []).extend(map(int, _SEED.findall(name)))
    told = []
    for row, seeds in rows.items():
        word = "seed" if len(seeds) == 1 else "seeds"
        told.append(f"{row}, {word} {ranges(seeds)}" if seeds else row)
    more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return "; ".join(told[:_NAMED]) + more

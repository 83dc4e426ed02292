"""What differs between two runs: settings, code, environment, data, then metrics and artifacts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.commands.ls import SHOWN_KEY, find
from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.store.store import Store
from bench.suite.load import load_suite

Record = dict[str, Any]
#: what of a record is compared, in the order in which a difference explains the next
SECTIONS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "settings": lambda record: flat(record["settings"]),
    "code": lambda record: record["code"].get("modules") or {"all": record["code"]["hash"]},
    "environment": lambda record: {k: v for k, v in record["env"].items() if k != "host"},
    "data": lambda record: flat(record.get("data") or {}),
}
#: stages, metrics and files beyond which a text says how many more there are
_NAMED = 3


@dataclass
class Side:
    """Newest complete record of each stage, by the stage's title."""

    name: str
    records: dict[str, Record] = field(default_factory=dict)

    def add(self, record: Record | None) -> None:
        if record is not None and record["status"] == "complete":
            known = self.records.get(record["name"])
            if known is None or known["started"] <= record["started"]:
                self.records[record["name"]] = record


def side(what: str, store: Store) -> Side:
    """What an argument names: a store's folder, FILE.yaml[:PROFILE], a run's id, a key's beginning.

    All but the first are looked up in `store`. Raises `UserError` if it is none of these.
    """
    found = Side(what)
    file, _, profile = what.rpartition(":") if ".yaml:" in what else (what, "", "")
    if Path(what).is_dir():
        other = Store(Path(what))
        if not (other.root / "stages").is_dir():
            raise UserError(f"there is no store at {what}: it has no folder 'stages'")
        _add_all(found, other)
    elif file.endswith((".yaml", ".yml")):
        suite = load_suite(Path(file), profile=profile or None)
        for stage in make_plan(suite, store, keep_stale=True).stages.values():
            found.add(stage.record)
    elif any(run["id"] == what for run in store.runs()):
        _add_all(found, store, run=what)
    else:
        state = find(store, what)
        found.add(state.record)
        found.name = (
            f"{what[:SHOWN_KEY]} ({state.attempts[-1]['name']})" if state.attempts else what
        )
    if not found.records:
        raise UserError(f"'{what}' has no complete stage to compare")
    return found


def _add_all(found: Side, store: Store, run: str | None = None) -> None:
    for key in store.stage_keys():
        for attempt in store.state(key).attempts:
            if run is None or attempt.get("run") == run:
                found.add(attempt)


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    if not isinstance(data, dict):
        return {path: data}
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flat(value, f"{path}.{name}" if path else str(name))
    return found


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Every difference as plain data. `different` is whether there is any but of environment."""
    pairs = list(_pairs(a, b))
    result: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "stages": len(pairs),
        "only_a": [] if _single(a, b) else sorted(a.records.keys() - b.records.keys()),
        "only_b": [] if _single(a, b) else sorted(b.records.keys() - a.records.keys()),
    }
    for section, read in SECTIONS.items():
        result[section] = _section(pairs, read)
    result |= {"metrics": _metrics(pairs), "artifacts": _artifacts(pairs)}
    result["equal_metrics"] = sum(len(x["metrics"]) for _, x, _ in pairs) - len(
        [m for m in result["metrics"] if m["a"] is not None]
    )
    counted = ("only_a", "only_b", "settings", "code", "data", "metrics", "artifacts")
    result["different"] = any(result[name] for name in counted)
    return result


def _single(a: Side, b: Side) -> bool:
    """Two stages given by their keys are compared whatever they are called."""
    return len(a.records) == len(b.records) == 1


def _pairs(a: Side, b: Side) -> Iterator[tuple[str, Record, Record]]:
    if _single(a, b):
        (one, ours), (other, theirs) = *a.records.items(), *b.records.items()
        yield one if one == other else f"{one} / {other}", ours, theirs
        return
    for name, record in a.records.items():
        if name in b.records:
            yield name, record, b.records[name]


def _section(
    pairs: list[tuple[str, Record, Record]], read: Callable[[Record], dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry a difference, with all stages that have it."""
    stages: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    values: dict[tuple[str, str, str], tuple[Any, Any]] = {}
    for name, ours, theirs in pairs:
        before, after = read(ours), read(theirs)
        for what in dict.fromkeys([*before, *after]):
            pair = before.get(what), after.get(what)
            if pair[0] != pair[1]:
                key = (what, repr(pair[0]), repr(pair[1]))
                values[key] = pair
                stages[key].append(name)
    return [
        {"what": key[0], "a": values[key][0], "b": values[key][1], "stages": names}
        for key, names in stages.items()
    ]


def _metrics(pairs: list[tuple[str, Record, Record]]) -> list[dict[str, Any]]:
    found = []
    for name, ours, theirs in pairs:
        before = {m["name"]: m["value"] for m in ours["metrics"]}
        after = {m["name"]: m["value"] for m in theirs["metrics"]}
        for metric in dict.fromkeys([*before, *after]):
            a, b = before.get(metric), after.get(metric)
            if a != b:
                difference = None if a is None or b is None else b - a
                found.append(
                    {"stage": name, "metric": metric, "a": a, "b": b, "difference": difference}
                )
    return found


def _artifacts(pairs: list[tuple[str, Record, Record]]) -> list[str]:
    """Files whose content differs, as stage/file."""
    found = []
    for name, ours, theirs in pairs:
        for file in sorted(ours["files"].keys() | theirs["files"].keys()):
            a, b = (record["files"].get(file, {}).get("sha256") for record in (ours, theirs))
            if a != b:
                found.append(f"{name}/{file}")
    return found


def text(result: dict[str, Any]) -> str:
    """The differences for a terminal."""
    lines = [f"A  {result['a']}", f"B  {result['b']}", f"{result['stages']} stages in both"]
    for which in ("a", "b"):
        if result[f"only_{which}"]:
            lines.append(f"only in {which.upper()}: {_some(result[f'only_{which}'])}")
    for section in SECTIONS:
        found = result[section]
        lines += ["", f"{section}: {'equal' if not found else len(found)}"]
        for entry in found:
            values = f"{_shown(entry['a'])} -> {_shown(entry['b'])}"
            lines.append(f"  {entry['what']}: {values}  ({_some(entry['stages'])})")
    lines += ["", f"metrics: {result['equal_metrics']} equal, {len(result['metrics'])} differ"]
    for entry in result["metrics"]:
        gap = "" if entry["difference"] is None else f" ({entry['difference']:+.4g})"
        values = f"{_shown(entry['a'])} -> {_shown(entry['b'])}{gap}"
        lines.append(f"  {entry['stage']}, {entry['metric']}: {values}")
    files = result["artifacts"]
    lines += ["", f"artifacts: {_some(files)} differ" if files else "artifacts: bit for bit equal"]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more

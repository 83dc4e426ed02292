"""The frames of a `SuiteView` as look-ups, made once and shared by tables, costs and figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from reports.frames import SuiteView

DONE = ("complete", "stale")


class Facts:
    """Look-ups over one view. `rows` are the stages as dicts, in the view's order."""

    def __init__(self, view: SuiteView) -> None:
        self.view = view
        self.rows: list[dict[str, Any]] = view.stages.to_dicts()
        self.by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
        #: key -> its row; of a shared stage, the first
        self.stages: dict[str, dict[str, Any]] = {}
        #: key -> (variant, seed) of every row of the plan that uses it
        self.users: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for row in self.rows:
            self.by_variant[row["variant"]].append(row)
            self.stages.setdefault(row["key"], row)
            self.users[row["key"]].append((row["variant"], row["seed"]))
        self.metrics: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        measured: dict[str, dict[str, Any]] = {}
        for row in view.metrics.to_dicts():
            self.metrics[row["variant"], row["column"]].append(row)
            measured.setdefault(row["column"], row)
        #: column id -> a metric row of it, for its label, unit and direction
        self.columns: dict[str, dict[str, Any]] = view.columns | measured

    @cached_property
    def attempts(self) -> dict[str, list[dict[str, Any]]]:
        """key -> its attempts, in their order."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.view.attempts.to_dicts():
            found[row["key"]].append(row)
        for rows in found.values():
            rows.sort(key=lambda row: row["attempt"] or 0)
        return found

    def record(self, key: str) -> dict[str, Any]:
        """The record behind a stage; empty where there is none."""
        return self.view.records.get(key, {})

    def training(self, variant: str, *, own: bool = False) -> dict[int, list[dict[str, Any]]]:
        """seed -> training stages of a row; only its own last ones if `own`."""
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in self.by_variant[variant]:
            if row["group"] == "train" and (row["own"] or not own):
                found[row["seed"]].append(row)
        return found

    def evaluations(self, variant: str, evaluation: str) -> list[dict[str, Any]]:
        """Stages that measure `evaluation` for a row, one a seed; matched by name, then by kind."""
        rows = [r for r in self.by_variant[variant] if r["group"] == "evaluate"]
        named = [r for r in rows if r["name"] == evaluation]
        return named or [r for r in rows if r["kind"] == evaluation]

    def evaluation_of(self, column: str) -> str:
        """The evaluation that a column id belongs to."""
        known = self.columns.get(column)
        return str(known["evaluation"]) if known else column.split(".")[0]


def distinct(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """key -> the rows that share it, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["key"], []).append(row)
    return found


def lookup(data: Any, *path: str) -> Any:
    """`data[path[0]][path[1]]...`, or None where a step is missing."""
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted path: {"mae": {"steps": 9}} -> {"mae.steps": 9}."""
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return found

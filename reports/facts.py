"""What tables, costs and figures share of a `SuiteView`: joined frames and look-ups, made once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import polars as pl

from reports.frames import SuiteView

DONE = ("complete", "stale")


class Facts:
    """Frames derived from one view."""

    def __init__(self, view: SuiteView) -> None:
        self.view = view
        #: every stage once, in the plan's order, with the `variants` and `seeds` of its rows
        self.distinct = view.stages.group_by("key", maintain_order=True).agg(
            pl.exclude("variant", "seed", "own").first(),
            pl.col("variant").first(),
            pl.col("seed").first(),
            pl.col("variant").alias("variants"),
            pl.col("seed").alias("seeds"),
        )
        #: stages whose output is there, each once
        self.done = self.distinct.filter(pl.col("status").is_in(DONE))
        measured = view.metrics.unique("column", keep="first", maintain_order=True)
        #: column id -> what it measures: label, unit, direction ...
        self.columns: dict[str, dict[str, Any]] = view.columns | {
            str(row["column"]): row for row in measured.iter_rows(named=True)
        }

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Rows of `distinct` by key, for what is printed of single stages."""
        return {str(row["key"]): row for row in self.distinct.iter_rows(named=True)}

    @cached_property
    def training(self) -> pl.DataFrame:
        """The training stages of all rows; `own` are each row's own last ones."""
        found = self.view.stages.filter(pl.col("group") == "train")
        return found.unique(["variant", "seed", "key"], keep="first", maintain_order=True)

    def record(self, key: str) -> dict[str, Any]:
        """Return the record behind a stage; empty where there is none."""
        return self.view.records.get(key, {})

    def evaluation_of(self, column: str) -> str:
        """Return the evaluation that a column id belongs to."""
        known = self.columns.get(column)
        return str(known["evaluation"]) if known else column.split(".")[0]


def lookup(data: Any, *path: str) -> Any:
    """Return `data[path[0]][path[1]]...`, or None where a step is missing."""
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


def unequal(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each name with other values before and after; None stands for a missing value."""
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)

"""Two runs side by side: one view whose rows are the rows of both, in pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from reports.frames import SuiteView


def side_by_side(a: SuiteView, b: SuiteView, names: tuple[str, str]) -> SuiteView:
    """Return a view with each row of `a` above the same row of `b`, marked by their names.

    Keys are marked too: the same stage in two stores is two measurements. The tables are those
    that `a` declares, without baselines; columns measured under different protocols are refused
    as in any table.
    """
    views = dict(zip(names, (a, b), strict=True))
    ours, theirs = (_marked(view, name) for name, view in views.items())
    order = list(dict.fromkeys([*a.variants, *b.variants]))
    pairs = {v: [f"{v} ({n})" for n, w in views.items() if v in w.variants] for v in order}
    frames = ("stages", "attempts", "metrics", "failures")
    both: dict[str, Any] = {
        name: pl.concat([getattr(ours, name), getattr(theirs, name)]) for name in frames
    }
    scales = "; ".join(f"{n}: {w.scale}" for n, w in views.items())
    return replace(
        ours,
        title=f"{a.title}: {names[0]} beside {names[1]}",
        profile=" and ".join(dict.fromkeys([a.profile, b.profile])),
        scale=a.scale if a.scale == b.scale else scales,
        notes=list(dict.fromkeys([*a.notes, *b.notes])),
        seeds=sorted({*a.seeds, *b.seeds}),
        variants=[row for rows in pairs.values() for row in rows],
        tables=[_paired(table, order, pairs) for table in a.tables],
        records=ours.records | theirs.records,
        curves=ours.curves | theirs.curves,
        provenance={n: w.provenance for n, w in views.items()},
        runs=[*a.runs, *b.runs],
        gallery=None,
        named=[],
        problems=[f"{n}: {p}" for n, w in views.items() for p in w.problems],
        **both,
    )


def _paired(table: dict[str, Any], order: list[str], pairs: dict[str, list[str]]) -> dict[str, Any]:
    """Return the declared table with each row twice, a group a row."""
    rows = [row for row in table.get("rows") or order if row in pairs]
    columns = {
        group: members
        for group, members in (table.get("groups") or {}).items()
        if pairs.keys().isdisjoint(members)
    }
    return table | {
        "rows": [name for row in rows for name in pairs[row]],
        "groups": {row: pairs[row] for row in rows} | columns,
        "baseline": None,
        "published": False,
    }


def _marked(view: SuiteView, name: str) -> SuiteView:
    """Return the view with its name in its variants' names and in all of its keys."""
    key = (f"{name}:" + pl.col("key")).alias("key")
    variant = pl.col("variant") + f" ({name})"
    records = {}
    for old, record in view.records.items():
        inputs = (record.get("inputs") or {}).items()
        marked = {n: given | {"key": f"{name}:{given['key']}"} for n, given in inputs}
        records[f"{name}:{old}"] = record | {"inputs": marked}
    rows = pl.col("rows").list.eval(pl.element() + f" ({name})")
    return replace(
        view,
        stages=view.stages.with_columns(key, variant),
        records=records,
        attempts=view.attempts.with_columns(key),
        metrics=view.metrics.with_columns(key, variant),
        failures=view.failures.with_columns(key, rows),
        curves={f"{name}:{k}": columns for k, columns in view.curves.items()},
    )

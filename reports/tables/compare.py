"""Two runs side by side: one view whose rows are the rows of both, in pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from reports.frames import SuiteView


def side_by_side(a: SuiteView, b: SuiteView, names: tuple[str, str] = ("A", "B")) -> SuiteView:
    """Return a view with each row of `a` above the same row of `b`, marked by their names.

    Keys are marked too: the same stage in two stores is two measurements. The tables are those
    that `a` declares, without baselines; columns measured under different protocols are refused
    as in any table. Raises ValueError if the names are equal.
    """
    if names[0] == names[1]:
        raise ValueError(f"two runs cannot both be called '{names[0]}'")
    ours, theirs = _marked(a, names[0]), _marked(b, names[1])
    order = list(dict.fromkeys([*a.variants, *b.variants]))
    pairs = {
        v: [f"{v} ({n})" for n, w in zip(names, (a, b), strict=True) if v in w.variants]
        for v in order
    }
    same_scale = a.scale == b.scale
    return replace(
        ours,
        title=f"{a.title}: {names[0]} beside {names[1]}",
        profile=a.profile if a.profile == b.profile else f"{a.profile} and {b.profile}",
        scale=a.scale if same_scale else f"{names[0]}: {a.scale}; {names[1]}: {b.scale}",
        notes=list(dict.fromkeys([*a.notes, *b.notes])),
        seeds=sorted({*a.seeds, *b.seeds}),
        variants=[row for rows in pairs.values() for row in rows],
        tables=[_paired(table, order, pairs) for table in a.tables],
        stages=pl.concat([ours.stages, theirs.stages]),
        attempts=pl.concat([ours.attempts, theirs.attempts]),
        records=ours.records | theirs.records,
        metrics=pl.concat([ours.metrics, theirs.metrics]),
        failures=pl.concat([ours.failures, theirs.failures]),
        curves=ours.curves | theirs.curves,
        provenance={names[0]: a.provenance, names[1]: b.provenance},
        runs=[*a.runs, *b.runs],
        gallery=None,
        named=[],
        problems=[f"{n}: {p}" for n, w in zip(names, (a, b), strict=True) for p in w.problems],
    )


def _paired(table: dict[str, Any], order: list[str], pairs: dict[str, list[str]]) -> dict[str, Any]:
    """Return the declared table with each row twice, a group a row."""
    rows = [row for row in table.get("rows") or order if row in pairs]
    columns = {
        group: members
        for group, members in (table.get("groups") or {}).items()
        if not any(member in pairs for member in members)
    }
    return table | {
        "rows": [name for row in rows for name in pairs[row]],
        "groups": {row: pairs[row] for row in rows} | columns,
        "baseline": None,
        "published": False,
    }


def _marked(view: SuiteView, name: str) -> SuiteView:
    """Return the view with its name in its variants' names and in all of its keys."""
    key = pl.concat_str([pl.lit(f"{name}:"), pl.col("key")]).alias("key")
    variant = pl.concat_str([pl.col("variant"), pl.lit(f" ({name})")]).alias("variant")
    return replace(
        view,
        stages=view.stages.with_columns(key, variant),
        records={f"{name}:{k}": _marked_inputs(r, name) for k, r in view.records.items()},
        attempts=view.attempts.with_columns(key),
        metrics=view.metrics.with_columns(key, variant),
        failures=view.failures.with_columns(
            key, pl.col("rows").list.eval(pl.concat_str([pl.element(), pl.lit(f" ({name})")]))
        ),
        curves={f"{name}:{k}": columns for k, columns in view.curves.items()},
    )


def _marked_inputs(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the record with its inputs' keys marked like all others."""
    inputs = record.get("inputs") or {}
    marked = {n: given | {"key": f"{name}:{given['key']}"} for n, given in inputs.items()}
    return record | {"inputs": marked}

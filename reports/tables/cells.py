"""Cells from frames: means over the distinct stages that measured them, or why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from reports.display import short
from reports.frames import DONE, SuiteView, lookup
from reports.tables.model import Cell, Value

#: a number beyond is no measurement; NaN is not below it
_LARGEST = 1e100
#: why a cell has no number, the most telling first: what failed leaves what follows it pending
_OPEN = ("failed", "running", "interrupted", "pending", "pruned", "not measured")


def metric_cells(view: SuiteView) -> dict[tuple[str, str], Cell]:
    """Return (variant, column) -> its cell, of each metric a row was planned or measured for."""
    measured = (
        view.metrics.filter(pl.col("key").is_in(view.done["key"]))
        .group_by("variant", "column", "key", maintain_order=True)
        .agg(pl.col("seed").unique().sort().alias("seeds"), pl.col("value", "protocol").first())
        .with_columns(keys=pl.concat_list("key"))
    )
    evaluations = pl.DataFrame(
        [(column, told["evaluation"]) for column, told in view.measures.items()],
        {"column": pl.String, "kind": pl.String},
        orient="row",
    )
    planned = (
        view.stages.filter(pl.col("group") == "evaluate")
        .group_by("variant", "kind", "key", maintain_order=True)
        .agg(pl.len().alias("uses"), pl.col("status", "reason", "seed").first())
        .join(evaluations, on="kind", maintain_order="left")
    )
    return {
        at: replace(cell, draws_sd=_draws_sd(view, at[1], cell.values))
        for at, cell in gathered(planned, measured).items()
    }


def gathered(planned: pl.DataFrame, measured: pl.DataFrame) -> dict[tuple[str, str], Cell]:
    """Return (variant, column) -> the cell of what was planned and what was measured of it.

    `planned` has a row for each distinct stage or chain: variant, column, seed, status, reason and
    uses, the seeds that share it. `measured` has variant, column, seeds, value, keys, protocol.
    """
    by_column = ["variant", "column"]
    finite = (pl.col("value").abs() < _LARGEST).fill_null(False)
    found = (
        measured.sort(pl.col("seeds").list.first(), maintain_order=True)
        .group_by(by_column, maintain_order=True)
        .agg(
            pl.struct("seeds", "value", "keys").filter(finite).alias("values"),
            pl.col("value").filter(finite).mean().alias("mean"),
            pl.col("value").filter(finite).std().alias("sd"),
            pl.col("protocol").filter(finite).drop_nulls().unique().alias("protocols"),
            pl.col("seeds").list.first().filter(~finite).alias("broken"),
        )
    )
    stages = planned.group_by(by_column, maintain_order=True).agg(
        pl.struct("status", "reason", "seed").alias("stages"), pl.col("uses").first()
    )
    rows = stages.join(found, on=by_column, how="left")
    return {(row["variant"], row["column"]): _cell(row) for row in rows.iter_rows(named=True)}


def _cell(row: dict[str, Any]) -> Cell:
    """Return the cell of one variant and column from what was planned and measured."""
    stages, found, protocols = row["stages"], row["values"] or [], row["protocols"] or []
    values = tuple(Value(tuple(v["seeds"]), v["value"], tuple(v["keys"])) for v in found)
    state, reason = _state(stages, len(values))
    if row["broken"]:
        seeds = ", ".join(map(str, row["broken"]))
        state, reason = "not finite", f"seed {seeds} measured no finite number"
    elif len(protocols) > 1:
        state, reason = "mixed protocols", "its seeds were measured under different protocols"
    return Cell(
        state,
        values,
        row["mean"],
        row["sd"],
        len(stages),
        reason,
        protocols[0] if len(protocols) == 1 else None,
        fixed=len(stages) == 1 and row["uses"] > 1,
    )


def _draws_sd(view: SuiteView, column: str, values: Sequence[Value]) -> float | None:
    """Return the sd (n - 1) over draws of labelled images, the same for all seeds, of their means.

    None where the records tell of no several draws.
    """
    metric = str(view.measures.get(column, {}).get("metric"))
    told = [lookup(view.record(v.keys[0]), "summary", "draws", metric) for v in values]
    try:
        found = np.array(told, dtype=float)  # [seeds, draws]
    except (TypeError, ValueError):
        return None
    several = found.ndim == 2 and found.shape[1] > 1 and bool(np.isfinite(found).all())
    return float(found.mean(0).std(ddof=1)) if several else None


def _state(stages: list[dict[str, Any]], have: int) -> tuple[str, str | None]:
    """Return the state of a cell with `have` values out of its distinct stages, and the reason."""
    statuses = Counter(stage["status"] for stage in stages)
    reason = _open(stages)
    stale = next((stage for stage in stages if stage["status"] == "stale"), None)
    if stale and (have >= len(stages) or not have):
        return "stale", "measured by other code" + _because(stale["reason"])
    if have and have >= len(stages):
        return "ok", None
    if have and statuses["pruned"] == len(stages) - have:
        return "pruned", reason
    if have:
        return "short", reason or "a stage is complete but lacks this metric"
    if status := next((status for status in _OPEN if statuses[status]), None):
        return status, reason
    return "missing", "the stage is complete but its record lacks this metric"


def _open(stages: list[dict[str, Any]]) -> str:
    """Return which seeds are not done, and why: "seeds 0, 2 pending; seed 1 failed: NaN"."""
    seeds: dict[str, list[int]] = {}
    for stage in stages:
        if stage["status"] not in DONE:
            seeds.setdefault(stage["status"] + _because(stage["reason"]), []).append(stage["seed"])
    return "; ".join(
        f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))} {what}"
        for what, found in seeds.items()
    )


def _because(reason: str | None) -> str:
    return f": {short(reason, 200)}" if reason else ""

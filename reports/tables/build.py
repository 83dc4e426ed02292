"""From a `SuiteView` to its tables: aggregation over distinct stages, states, costs, deltas."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from reports.display import plural, short
from reports.facts import DONE, Facts, distinct
from reports.frames import SuiteView
from reports.tables import published, statistics
from reports.tables.costs import cost_cells
from reports.tables.crossed import cross
from reports.tables.model import Cell, Column, Row, Table, Value

#: states whose reason is printed under the table
_SAID = ("failed", "short", "interrupted", "stale", "missing", "not finite", "mixed protocols")


def build_tables(view: SuiteView, facts: Facts | None = None) -> list[Table]:
    """The tables that the suite declares; one over everything where it declares none."""
    facts = facts or Facts(view)
    return [build_table(facts, declared) for declared in view.tables or [{"title": view.title}]]


def build_table(facts: Facts, declared: dict[str, Any]) -> Table:
    """One declared table, complete with comparisons, published numbers and notes."""
    view = facts.view
    variants: list[str] = list(declared.get("rows") or view.variants)
    ids: list[str] = list(declared.get("columns") or _default_columns(facts))
    row_groups, column_groups = _groups(declared.get("groups"), variants)
    baseline = declared.get("baseline")
    table = Table(
        title=str(declared.get("title") or view.title),
        rows=[Row(variant, row_groups.get(variant)) for variant in variants],
        columns=[],
        cells={},
        baseline=baseline if baseline in variants else None,
        seeds=len(view.seeds),
    )
    for column_id in ids:
        if column_id == "cost":
            columns, cells = cost_cells(facts, variants)
            table.columns += columns
            table.cells |= cells
        else:
            _add_metric(table, facts, column_id, column_groups, int(declared.get("digits", 1)))
    if table.baseline:
        statistics.compare(table, deltas=bool(declared.get("deltas")))
    table.notes += _notes(table)
    table.crossed = cross(facts, table)
    if declared.get("published"):
        published.add(table, facts)
    return table


def _default_columns(facts: Facts) -> list[str]:
    primary = [column for column, row in facts.columns.items() if row["primary"]]
    return [*primary, "cost"]


def _groups(
    declared: dict[str, Sequence[str]] | None, variants: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Members of the declared groups: of rows where they are variants, else of columns."""
    rows: dict[str, str] = {}
    columns: dict[str, str] = {}
    for group, members in (declared or {}).items():
        for member in members:
            (rows if member in variants else columns)[member] = group
    return rows, columns


def _add_metric(
    table: Table, facts: Facts, column_id: str, groups: dict[str, str], digits: int
) -> None:
    known = facts.columns.get(column_id, {})
    unit = known.get("unit") or ""
    cells = {row.variant: metric_cell(facts, row.variant, column_id) for row in table.rows}
    protocol = _one_protocol(table, cells, known.get("label") or column_id)
    table.columns.append(
        Column(
            id=column_id,
            label=known.get("label") or column_id,
            unit=unit,
            kind="metric",
            digits=digits if unit == "%" else digits + 2,
            group=groups.get(column_id) or groups.get(facts.evaluation_of(column_id)),
            higher_is_better=bool(known.get("higher_is_better", True)),
            protocol=protocol,
        )
    )
    table.cells |= {(variant, column_id): cell for variant, cell in cells.items()}


def metric_cell(facts: Facts, variant: str, column: str) -> Cell:
    """Mean over the distinct stages that measured `column` for a row, or why there is none."""
    stages = distinct(facts.evaluations(variant, facts.evaluation_of(column)))
    measured = distinct(facts.metrics[variant, column])
    if not stages and not measured:
        return Cell("not planned", reason="the suite does not plan this evaluation for this row")
    values, protocols, broken = [], set(), []
    for key, rows in measured.items():
        if key in facts.stages and facts.stages[key]["status"] not in DONE:
            continue
        if rows[0]["value"] is None or not math.isfinite(rows[0]["value"]):
            broken.append(rows[0]["seed"])
            continue
        seeds = tuple(sorted({row["seed"] for row in rows}))
        values.append(Value(seeds, float(rows[0]["value"]), (key,)))
        protocols.add(rows[0]["protocol"])
    values.sort(key=lambda value: value.seeds)
    planned = list(stages.values()) or list(measured.values())
    one = len(planned) == 1 and len(planned[0]) > 1
    if broken:
        reason = f"seed {', '.join(map(str, broken))} measured no finite number"
        return Cell("not finite", tuple(values), len(planned), reason, fixed=one)
    if len(protocols) > 1:
        reason = "its seeds were measured under different protocols"
        return Cell("mixed protocols", tuple(values), len(planned), reason, fixed=one)
    state, why = _state([rows[0] for rows in stages.values()], len(values))
    protocol = protocols.pop() if protocols else None
    return Cell(state, tuple(values), len(planned), why, protocol, fixed=one)


def _state(stages: list[dict[str, Any]], have: int) -> tuple[str, str | None]:
    """State of a cell with `have` values out of its distinct stages, and the reason."""
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
    for status in ("failed", "running", "interrupted", "pending", "pruned"):
        if statuses[status]:
            return status, reason
    return "missing", "the stage is complete but its record lacks this metric"


def _open(stages: list[dict[str, Any]]) -> str:
    """Which seeds are not done, and why: "seeds 0, 2 pending; seed 1 failed: out of memory"."""
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


def _one_protocol(table: Table, cells: dict[str, Cell], label: str) -> str | None:
    """The column's protocol; a cell measured under another one is withheld and reported."""
    counts = Counter(c.protocol for c in cells.values() if c.valued and c.protocol is not None)
    protocol = counts.most_common(1)[0][0] if counts else None
    for variant, cell in cells.items():
        if cell.state == "mixed protocols":
            table.problems.append(f"{short(variant)}, {short(label)}: {cell.reason}")
        elif cell.valued and cell.protocol != protocol:
            why = f"measured under protocol {cell.protocol}, the column under {protocol}"
            cells[variant] = Cell(
                "mixed protocols", cell.values, cell.planned, why, cell.protocol, cell.fixed
            )
            table.problems.append(f"{short(variant)}, {short(label)}: {why}")
    return protocol


def _notes(table: Table) -> list[str]:
    """Sentences under the table: how cells read, which rows do not vary, why some are open."""
    metrics = [column for column in table.columns if column.kind == "metric"]
    notes = []
    if any(table.cell(row, column).sd is not None for row in table.rows for column in metrics):
        notes.append(
            f"Mean ± standard deviation (n − 1) over {plural(table.seeds, 'seed')}; "
            "a cell with fewer says so."
        )
    for row in table.rows if table.seeds > 1 else []:
        still = [column.label for column in metrics if table.cell(row, column).fixed]
        if still:
            where = "" if len(still) == len(metrics) else f", {', '.join(map(short, still))}"
            notes.append(
                f"{short(row.variant)}{where}: the same for all seeds, so n = 1, no spread."
            )
    return notes + _open_notes(table, metrics)


def _open_notes(table: Table, metrics: Sequence[Column]) -> list[str]:
    """Why cells are open: a sentence a reason and row, or a reason where rows are open alike."""
    columns: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in table.rows:
        for column in metrics:
            cell = table.cell(row, column)
            if cell.state in _SAID:
                columns[remark_of(cell), row.variant].append(short(column.label))
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (remark, variant), labels in columns.items():
        rows[remark, ", ".join(labels)].append(short(variant))
    return [
        f"{'all rows' if 1 < len(table.rows) == len(names) else '; '.join(names)}, {labels}: "
        f"{remark}"
        for (remark, labels), names in rows.items()
    ]


def remark_of(cell: Cell) -> str:
    """State and reason in words."""
    return cell.state + (f" ({cell.reason})" if cell.reason else "")

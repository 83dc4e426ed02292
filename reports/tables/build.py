"""From the frames of a `SuiteView` to its tables: means over distinct stages, and open cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import polars as pl

from reports.display import plural, short
from reports.facts import Facts, lookup
from reports.frames import SuiteView
from reports.tables import published, statistics
from reports.tables.cells import metric_cells
from reports.tables.costs import cost_cells
from reports.tables.crossed import cross
from reports.tables.findings import headline
from reports.tables.model import Cell, Column, Comparison, Row, Table, remark_in_full

#: states whose reason is printed under the table
_SAID = ("failed", "short", "interrupted", "stale", "missing", "not finite", "mixed protocols")
#: what the encoder's tokens become, as settings and as tables call it
_TOKENS = {"cls": "class token", "mean": "mean of patches", "both": "class token and mean"}
#: how the label of a column ends whose rows read different tokens
_BY_ROW = ", tokens by row"
#: what a column without a metric holds
_NOT_PLANNED = Cell("not planned", reason="the suite does not plan this evaluation for this row")


def build_tables(view: SuiteView, facts: Facts | None = None) -> list[Table]:
    """Return the tables that the suite declares; one of everything where it declares none.

    The first one bears the headline. All tests of all tables are judged together.
    """
    facts = facts or Facts(view)
    declared = view.tables or [{"title": view.title}]
    wanted = [column for one in declared for column in one.get("columns") or []]
    cells = metric_cells(facts, wanted + [one["metric"] for one in view.named])
    tables = [_build(facts, one, cells) for one in declared]
    named = [_named(facts, one, cells) for one in view.named]
    tested = statistics.judged(
        [one for one in named if one] + [one for table in tables for one in table.comparisons]
    )
    for table in tables:
        table.comparisons = [tested[comparison.what] for comparison in table.comparisons]
        for found in table.comparisons:
            at = found.variant, found.column
            table.cells[at] = replace(table.cells[at], bold=found.survives)
        table.notes += _notes(table)
        table.crossed = cross(facts, table)
    beside = [t for t, one in zip(tables, declared, strict=True) if one.get("published")]
    tables[0].published = published.reference(beside, facts)
    tables[0].named = [tested[one.what] for one in named if one]
    tables[0].headline = [
        headline(_column(facts, told["metric"]), told, tested[one.what] if one else None)
        for told, one in zip(view.named, named, strict=True)
    ]
    return tables


def _build(facts: Facts, declared: dict[str, Any], cells: dict[tuple[str, str], Cell]) -> Table:
    """Return the rows, columns and cells of a declared table, and its untested comparisons."""
    view = facts.view
    variants: list[str] = list(declared.get("rows") or view.variants)
    groups = {m: name for name, ms in (declared.get("groups") or {}).items() for m in ms}
    baseline = declared.get("baseline")
    table = Table(
        title=str(declared.get("title") or view.title),
        rows=[Row(variant, groups.get(variant)) for variant in variants],
        columns=[],
        cells={},
        baseline=baseline if baseline in variants else None,
        seeds=len(view.seeds),
    )
    primary = [column for column, row in facts.columns.items() if row["primary"]]
    for column_id in declared.get("columns") or [*primary, "cost"]:
        if column_id == "cost":
            columns, own = cost_cells(facts, variants)
        else:
            own = {(v, column_id): cells.get((v, column_id), _NOT_PLANNED) for v in variants}
            column = _column(facts, column_id, int(declared.get("digits", 1)), groups)
            column = replace(column, protocol=_one_protocol(table, own, column.label))
            columns = [_with_tokens(table, facts, column, own)]
        table.columns += columns
        table.cells |= own
    statistics.compare(table)
    return table


def _column(
    facts: Facts, column_id: str, digits: int = 1, groups: Mapping[str, str] = MappingProxyType({})
) -> Column:
    """Return the column of a metric as the suite or a record describes it."""
    known = facts.columns.get(column_id, {})
    unit = known.get("unit") or ""
    return Column(
        id=column_id,
        label=known.get("label") or column_id,
        unit=unit,
        kind="metric",
        digits=digits if unit == "%" else digits + 2,
        group=groups.get(column_id) or groups.get(facts.evaluation_of(column_id)),
        higher_is_better=bool(known.get("higher_is_better", True)),
    )


def _named(
    facts: Facts, told: dict[str, Any], cells: dict[tuple[str, str], Cell]
) -> Comparison | None:
    """Return a comparison that the suite names; None where it cannot be had."""
    found = statistics.paired(cells, told["row"], told["against"], _column(facts, told["metric"]))
    return found and replace(found, primary=told["primary"])


def _one_protocol(table: Table, cells: dict[tuple[str, str], Cell], label: str) -> str | None:
    """Return the column's protocol; withhold and report a cell measured under another."""
    counts = Counter(c.protocol for c in cells.values() if c.valued and c.protocol is not None)
    protocol = counts.most_common(1)[0][0] if counts else None
    for at, cell in cells.items():
        if cell.valued and cell.protocol != protocol:
            why = f"measured under protocol {cell.protocol}, the column under {protocol}"
            cells[at] = replace(cell, state="mixed protocols", reason=why)
        if cells[at].state == "mixed protocols":
            table.problems.append(f"{short(at[0])}, {short(label)}: {cells[at].reason}")
    return protocol


def _with_tokens(
    table: Table, facts: Facts, column: Column, cells: dict[tuple[str, str], Cell]
) -> Column:
    """Return the column; its label and a note say so where rows read different tokens."""
    rows: dict[str, list[str]] = {}
    for (variant, _), cell in cells.items():
        record = facts.record(cell.keys[0]) if cell.keys else {}
        source = facts.record(str(lookup(record, "inputs", "features", "key")))
        pool = lookup(source, "settings", "pool")
        if pool in _TOKENS:
            rows.setdefault(_TOKENS[pool], []).append(short(variant))
    if len(rows) < 2 or column.label.endswith(_BY_ROW):  # the suite's plan has said so
        return column
    told = "; ".join(f"{tokens} in {', '.join(variants)}" for tokens, variants in rows.items())
    table.notes.append(f"{short(column.label)}: {told}.")
    return replace(column, label=column.label + _BY_ROW)


def _notes(table: Table) -> list[str]:
    """Return the sentences under the table: how cells read, what does not vary, what is open."""
    metrics, notes = table.metrics, []
    if any(table.cell(row, column).sd is not None for row in table.rows for column in metrics):
        notes.append(
            f"Mean ± standard deviation (n − 1) over {plural(table.seeds, 'seed')}; "
            "a cell with fewer says so."
        )
    if any(
        table.cell(row, column).draws_sd is not None for row in table.rows for column in metrics
    ):
        notes.append(
            "In brackets: standard deviation (n − 1) over the draws of the labelled images, of the "
            "means over seeds."
        )
    for row in table.rows if table.seeds > 1 else []:
        still = [column.label for column in metrics if table.cell(row, column).fixed]
        if still:
            where = "" if len(still) == len(metrics) else f", {', '.join(map(short, still))}"
            notes.append(
                f"{short(row.variant)}{where}: the same for all seeds, so n = 1, no spread."
            )
    # why cells are open: a sentence for each reason and the rows in which it opens the same columns
    cells = [(row, column, table.cell(row, column)) for row in table.rows for column in metrics]
    said = [
        (remark_in_full(cell), short(row.variant), short(column.label))
        for row, column, cell in cells
        if cell.state in _SAID
    ]
    text = dict.fromkeys(("remark", "row", "columns"), pl.String)
    alike = (
        pl.DataFrame(said, text, orient="row")
        .group_by("remark", "row", maintain_order=True)
        .agg(pl.col("columns").str.join(", "))
        .group_by("remark", "columns", maintain_order=True)
        .agg(pl.col("row"))
    )
    for remark, columns, rows in alike.iter_rows():
        every = 1 < len(table.rows) == len(rows)
        notes.append(f"{'all rows' if every else '; '.join(rows)}, {columns}: {remark}")
    return notes

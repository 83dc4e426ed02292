"""From the frames of a `SuiteView` to its tables: means over distinct stages, and open cells."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import polars as pl

from reports.display import plural, short
from reports.frames import SuiteView
from reports.tables import published, statistics
from reports.tables.cells import metric_cells
from reports.tables.costs import cost_cells
from reports.tables.findings import headline
from reports.tables.model import Cell, Column, Comparison, Row, Table, remark_in_full

#: states whose reason is printed under the table
_SAID = ("failed", "short", "interrupted", "stale", "missing", "not finite", "mixed protocols")
#: columns of a metric beyond which nothing is easier to read crossed
_MOST_COLUMNS = 8
#: what a column without a metric holds
_NOT_PLANNED = Cell("not planned", reason="the suite does not plan this evaluation for this row")


def build_tables(view: SuiteView) -> list[Table]:
    """Return the tables that the suite declares; one of everything where it declares none.

    The first one bears the headline. All tests of all tables are judged together.
    """
    declared = view.tables or [{"title": view.title}]
    cells = metric_cells(view)
    tables = [_build(view, one, cells) for one in declared]
    named = [_named(view, one, cells) for one in view.named]
    tested = statistics.judged(
        [one for one in named if one] + [one for table in tables for one in table.comparisons]
    )
    for table in tables:
        table.comparisons = [tested[comparison.what] for comparison in table.comparisons]
        for found in table.comparisons:
            at = found.variant, found.column
            table.cells[at] = replace(table.cells[at], bold=found.survives)
        table.notes += _notes(table)
        table.crossed = _crossed(view, table)
    beside = [t for t, one in zip(tables, declared, strict=True) if one.get("published")]
    tables[0].published = published.reference(beside, view)
    tables[0].named = [tested[one.what] for one in named if one]
    tables[0].headline = [
        headline(_column(view, told["metric"]), told, tested[one.what] if one else None)
        for told, one in zip(view.named, named, strict=True)
    ]
    return tables


def _build(view: SuiteView, declared: dict[str, Any], cells: dict[tuple[str, str], Cell]) -> Table:
    """Return the rows, columns and cells of a declared table, and its untested comparisons."""
    variants: list[str] = list(declared.get("rows") or view.variants)
    groups = {m: name for name, ms in (declared.get("groups") or {}).items() for m in ms}
    baseline: Any = declared.get("baseline") if declared.get("baseline") in variants else None
    table = Table(
        title=str(declared.get("title") or view.title),
        rows=[Row(variant, groups.get(variant)) for variant in variants],
        columns=[],
        cells={},
        baseline=baseline,
        seeds=len(view.seeds),
    )
    primary = [column for column, row in view.measures.items() if row["primary"]]
    for column_id in declared.get("columns") or [*primary, "cost"]:
        if column_id == "cost":
            columns, own = cost_cells(view, variants)
        else:
            own = {(v, column_id): cells.get((v, column_id), _NOT_PLANNED) for v in variants}
            column = _column(view, column_id, int(declared.get("digits", 1)))
            known = view.measures.get(column_id, {"evaluation": column_id.split(".")[0]})
            group = groups.get(column_id) or groups.get(known["evaluation"])
            protocol = _one_protocol(table, own, column.label)
            columns = [replace(column, group=group, protocol=protocol)]
        table.columns += columns
        table.cells |= own
    for column in table.metrics if baseline else []:  # tested by `judged`, all together
        pairs = (
            statistics.paired(table.cells, variant, baseline, column)
            for variant in variants
            if variant != baseline
        )
        table.comparisons += filter(None, pairs)
    return table


def _column(view: SuiteView, column_id: str, digits: int = 1) -> Column:
    """Return the column of a metric as the suite or a record describes it."""
    known = view.measures.get(column_id, {})
    unit = known.get("unit") or ""
    return Column(
        id=column_id,
        label=known.get("label") or column_id,
        unit=unit,
        kind="metric",
        digits=digits if unit == "%" else digits + 2,
        higher_is_better=bool(known.get("higher_is_better", True)),
    )


def _named(
    view: SuiteView, told: dict[str, Any], cells: dict[tuple[str, str], Cell]
) -> Comparison | None:
    """Return a comparison that the suite names; None where it cannot be had."""
    found = statistics.paired(cells, told["row"], told["against"], _column(view, told["metric"]))
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


def _notes(table: Table) -> list[str]:
    """Return the sentences under the table: how cells read, what does not vary, what is open."""
    metrics, notes = table.metrics, []
    cells = [(row, column, table.cell(row, column)) for row in table.rows for column in metrics]
    if any(cell.sd is not None for _, _, cell in cells):
        notes.append(
            f"Mean ± standard deviation (n − 1) over {plural(table.seeds, 'seed')}; "
            "a cell with fewer says so."
        )
    if any(cell.draws_sd is not None for _, _, cell in cells):
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


def _crossed(view: SuiteView, table: Table) -> list[Table]:
    """Return a table for each metric of `table`, if its rows are all combinations of settings.

    As papers print ablations: the setting of the most values goes down, the others across.
    """
    cells = {row.variant: s for row in table.rows if (s := view.cells.get(row.variant))}
    settings = pl.DataFrame([*cells.values()], infer_schema_length=None)
    axes = {one.name: one.drop_nulls().unique(maintain_order=True).to_list() for one in settings}
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    if len(axes) < 2:
        return []
    down = max(axes, key=lambda name: len(axes[name]))
    across = [name for name in axes if name != down]
    variants = {tuple(s.get(name) for name in (down, *across)): v for v, s in cells.items()}
    combinations = list(product(*(axes[name] for name in across)))
    whole = set(variants) == {(value, *names) for value in axes[down] for names in combinations}
    if not whole or len(cells) > _MOST_COLUMNS * len(axes[down]):
        return []
    group = " × ".join(short(name, 30) for name in across)
    tables = []
    for metric in table.metrics:
        columns = [
            replace(metric, id="\n".join(names), label=", ".join(names), group=group)
            for names in combinations
        ]
        origins = {
            (value, column.id): (variants[value, *names], metric.id)
            for value in axes[down]
            for column, names in zip(columns, combinations, strict=True)
        }
        crossed = Table(
            title=f"{metric.label} by {down} and {', '.join(across)}",
            corner=down,
            rows=[Row(value) for value in axes[down]],
            columns=columns,
            cells={at: table.cells[origin] for at, origin in origins.items()},
            origins=origins,
        )
        tables.append(crossed)
    return tables

"""What would make a reader doubt a table: open cells, mixed code or hardware, test selection."""

from __future__ import annotations

import polars as pl

from reports.display import plural, short
from reports.frames import DONE, SuiteView, flatten
from reports.tables.build import build_tables
from reports.tables.model import Table, full_label, remark_in_full

#: states of a cell that are as planned
_AS_PLANNED = ("ok", "none", "not planned", "pruned")
#: what stages behind one column should have in common -> its column among the stages
_WHERE = {"code": "code", "hardware": "device_model", "torch": "torch"}
#: columns that are open when another one is
_IMPLIED = ("cost.own", "cost.wall", "cost.cpu", "cost.energy")
#: words by which a metric or its label says that it looked at the test split
_ON_TEST = ("test_selected", "chosen on test", "by test labels")
#: words by which a protocol names what was chosen by
_CHOICE = ("select", "choice", "chosen")


def check(view: SuiteView) -> list[str]:
    """Problems of the tables in sentences; an empty list if they can be trusted as they stand."""
    found: list[str] = []
    for table in build_tables(view):
        found += table.problems + _open_cells(table)
        for column in table.metrics:
            label = short(full_label(column))
            keys = {key for row in table.rows for key in table.cell(row, column).keys}
            found += _mixed(view, label, keys)
            found += _test_selected(view, label, column.id, keys)
    found += [f"store: {short(problem, 300)}" for problem in view.problems]
    return list(dict.fromkeys(found))


def checked(view: SuiteView) -> str:
    """Return what `check` looks at, in sentences."""
    tables = build_tables(view)
    keys = {key for t in tables for cell in t.cells.values() for key in cell.keys}
    behind = plural(len(_with_ancestors(view, keys)), "stage")
    valued = sum(cell.valued for table in tables for cell in table.cells.values())
    return (
        f"{plural(valued, 'number')} in {plural(len(tables), 'table')}, with {behind} behind them: "
        "no cell that is planned is open, and each was measured under the protocol of its column. "
        f"The stages of one kind behind a column have the same {', '.join(_WHERE)}. No number was "
        "selected on the test split. No file of the store was damaged. Whether the numbers follow "
        "from the predictions is for `python -m bench verify`."
    )


def _open_cells(table: Table) -> list[str]:
    return [
        f"{short(row.variant)}, {short(full_label(column))}: {remark_in_full(cell)}"
        for row in table.rows
        for column in table.columns
        if column.id not in _IMPLIED
        and (cell := table.cell(row, column)).state not in (*_AS_PLANNED, "mixed protocols")
    ]


def _mixed(view: SuiteView, label: str, keys: set[str]) -> list[str]:
    """Return where stages of one kind behind one column, or ancestors, differ in code or place."""
    behind = view.distinct.filter(pl.col("key").is_in(_with_ancestors(view, keys)))
    found = []
    for what, column in _WHERE.items():
        counts = (
            behind.drop_nulls(column)
            .group_by("kind", column, maintain_order=True)
            .len()
            .group_by("kind", maintain_order=True)
            .agg(column, "len")
            .filter(pl.col("len").list.len() > 1)
        )
        for kind, values, numbers in counts.iter_rows():
            listed = ", ".join(
                f"{short(value, 40)} ({plural(count, 'stage')})"
                for value, count in zip(values, numbers, strict=True)
            )
            found.append(f"{label}: its {short(kind, 30)} stages mix {what}: {listed}")
    return found


def _with_ancestors(view: SuiteView, keys: set[str]) -> list[str]:
    """Return the stages and, through their records' inputs, everything they rest on."""
    found: dict[str, None] = {}
    waiting = sorted(keys)
    while waiting:
        key = waiting.pop(0)
        if key not in found and view.by_key.get(key, {}).get("status") in DONE:
            found[key] = None
            inputs = view.record(key).get("inputs") or {}
            waiting += [given["key"] for given in inputs.values()]
    return list(found)


def _test_selected(view: SuiteView, label: str, column: str, keys: set[str]) -> list[str]:
    """Return whether the column's numbers were chosen by looking at the test split.

    Its name says so, or a setting of a record's protocol named select... or choice... does.
    """
    known = view.measures.get(column, {})
    said = f"{known.get('metric', '')} {known.get('label', '')}"
    chosen_on_test = (
        any(word in path.rpartition(".")[2] for word in _CHOICE) and value == "test"
        for key in keys
        for path, value in flatten(view.record(key).get("protocol")).items()
    )
    if any(word in said for word in _ON_TEST) or any(chosen_on_test):
        return [f"{label}: these numbers were selected on the test split"]
    return []

"""Numbers that others published: a table of their own, never mixed with what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from reports.frames import SuiteView
from reports.tables.model import Cell, Row, Table, Value

PUBLISHED: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
)
#: letters of the footnotes
_MARKS = "abcdefghijklmnopqrstuvwxyz"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find(model: str, variant: str, field: str) -> dict[str, Any] | None:
    """{value, source, conflict} published for a row and field, or None."""
    for row in (*PUBLISHED["rows"], *PUBLISHED["others"]):
        same = row["model"] == model and _plain(row["method"]) == _plain(variant)
        if same and row.get(field) is not None:
            conflict = row.get("conflicts", {}).get(field)
            return {"value": float(row[field]), "source": row["source"], "conflict": conflict}
    return None


def reference(tables: Iterable[Table], view: SuiteView) -> Table | None:
    """Return what is published for the rows and metrics of tables; None where nothing is."""
    own = view.model if view.model in PUBLISHED["models"] else None
    model = own or PUBLISHED["reference_model"]
    name = f"{PUBLISHED['models'][model]} on {PUBLISHED['dataset']}"
    fields = {one: field for field, metrics in PUBLISHED["fields"].items() for one in metrics}
    table = Table(f"Published results of {name}", [], [], {}, corner="Method")
    shown: dict[str, str] = {}
    rows = dict.fromkeys(row.variant for one in tables for row in one.rows)
    for column in {column.id: column for one in tables for column in one.metrics}.values():
        known = view.measures.get(column.id)
        field = fields.get(f"{known['evaluation']}.{known['metric']}") if known else None
        found = {row: find(model, row, field) for row in rows if field}
        if field is not None and any(found.values()):
            shown[field] = column.label
            grey = replace(
                column, id=f"{column.id}.published", kind="published", digits=1, group=None
            )
            table.columns.append(grey)
            table.cells |= {(row, grey.id): _cell(table, found[row]) for row in rows}
    table.rows = [
        Row(row) for row in rows if any(table.cells[row, c.id].values for c in table.columns)
    ]
    table.notes = _notes(own, model, shown, {_plain(row.variant) for row in table.rows})
    return table if shown else None


def beside(table: Table, published: Table | None) -> Table:
    """Return a table with what is published of its metrics behind its own columns."""
    ours = {f"{column.id}.published" for column in table.metrics}
    columns = [c for c in published.columns if c.id in ours] if published else []
    if published is None or not columns:
        return table
    group = f"Published, {published.title.partition(' of ')[2]}"
    at = {(row.variant, c.id): Cell("none") for row in table.rows for c in columns}
    cells = {one: published.cells.get(one, cell) for one, cell in at.items()}
    marks = {mark for cell in cells.values() for mark in cell.marks}
    return replace(
        table,
        columns=table.columns + [replace(column, group=group) for column in columns],
        cells=table.cells | cells,
        footnotes=table.footnotes | {m: t for m, t in published.footnotes.items() if m in marks},
        notes=[*table.notes, f"Grey: {published.notes[0]}"],
    )


def _cell(table: Table, found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell("none", reason="not published")
    marks = [_mark(table, "Source: " + PUBLISHED["sources"][found["source"]] + ".")]
    if found["conflict"]:
        marks.append(_mark(table, PUBLISHED["conflicts"][found["conflict"]]))
    value = found["value"]
    return Cell("ok", (Value((), value, ()),), value, marks=tuple(marks))


def _mark(table: Table, text: str) -> str:
    """Return the letter of a footnote; the same text keeps its letter."""
    marks = {known: mark for mark, known in table.footnotes.items()}
    mark = marks.get(text, _MARKS[len(marks)])
    table.footnotes[mark] = text
    return mark


def _notes(own: str | None, model: str, shown: dict[str, str], rows: set[str]) -> list[str]:
    """Return what the published numbers are, what to beware of, and what other methods reach.

    `rows` are the methods in the table, by their plain names.
    """
    scale = "" if own else ", for reference only: at another scale than the tables above"
    notes = [f"Printed by others{scale}."]
    notes += [PUBLISHED["caveats"][field] for field in shown if field in PUBLISHED["caveats"]]
    others = [
        row
        for row in PUBLISHED["others"]
        if row["model"] == model and shown.keys() & row and _plain(row["method"]) not in rows
    ]
    if others:
        told = [field for field in shown if any(field in row for row in others)]
        listed = "; ".join(
            f"{row['method']} {' / '.join(str(row.get(field, '–')) for field in told)}"
            for row in others
        )
        sources = sorted({PUBLISHED["sources"][row["source"]] for row in others})
        labels = " / ".join(shown[field] for field in told)
        notes.append(f"Other methods, {labels}: {listed} ({'; '.join(sources)}).")
    return list(dict.fromkeys(notes))

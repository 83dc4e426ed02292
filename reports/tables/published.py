"""Numbers that others published, set beside ours in grey and never mixed with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from reports.facts import Facts
from reports.tables.model import Cell, Column, Table, Value

PUBLISHED: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
)
#: letters of the footnotes
_MARKS = "abcdefghijklmnopqrstuvwxyz"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find(model: str, variant: str, field: str) -> dict[str, Any] | None:
    """{value, source, conflict} published for a row and field, or None."""
    for row in PUBLISHED["rows"]:
        same = row["model"] == model and _plain(row["method"]) == _plain(variant)
        if same and row.get(field) is not None:
            conflict = row.get("conflicts", {}).get(field)
            return {"value": float(row[field]), "source": row["source"], "conflict": conflict}
    return None


def add(table: Table, facts: Facts) -> None:
    """Put a grey column behind each metric that has published numbers, with source marks."""
    own = facts.view.model if facts.view.model in PUBLISHED["models"] else None
    model = own or PUBLISHED["reference_model"]
    name = PUBLISHED["models"][model]
    fields = {one: field for field, metrics in PUBLISHED["fields"].items() for one in metrics}
    columns: list[Column] = []
    shown: dict[str, str] = {}
    for column in table.columns:
        columns.append(column)
        known = facts.columns.get(column.id) if column.kind == "metric" else None
        field = fields.get(f"{known['evaluation']}.{known['metric']}") if known else None
        found = {row.variant: find(model, row.variant, field) for row in table.rows if field}
        if field is not None and any(found.values()):
            shown[field] = column.label
            label = f"{name}, published"
            grey = Column(
                f"{column.id}.published", label, column.unit, "published", 1, column.group
            )
            columns.append(grey)
            for row in table.rows:
                table.cells[row.variant, grey.id] = _cell(table, found[row.variant])
    table.columns = columns
    if shown:
        table.reference_notes = _notes(own, model, shown)


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


def _notes(own: str | None, model: str, shown: dict[str, str]) -> list[str]:
    """Return what the published columns are, what to beware of, and what other methods reach."""
    scale = "" if own else ", for reference only, measured at another scale"
    name = f"{PUBLISHED['models'][model]} on {PUBLISHED['dataset']}"
    notes = [f"Published (grey): results of {name}{scale}."]
    notes += [PUBLISHED["caveats"][field] for field in shown if field in PUBLISHED["caveats"]]
    others = [row for row in PUBLISHED["others"] if row["model"] == model and shown.keys() & row]
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

"""Numbers that others published, set beside ours in grey and never mixed with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from reports.facts import Facts, lookup
from reports.tables.model import Cell, Column, Row, Table, Value

PUBLISHED: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
)
_MARKS = "abcdefghijklmnopqrstuvwxyz"


def model_of(resolved: str) -> str | None:
    """The published model that a resolved suite trains: 1,000 classes, same size and patch."""
    try:
        suite = yaml.load(resolved, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return None
    model, data = _find(suite, "model"), _find(suite, "data")
    if lookup(data, "classes") != 1000:
        return None
    name = f"vit_{lookup(model, 'size')}_patch{lookup(model, 'patch_size')}"
    return name if name in PUBLISHED["models"] else None


def _find(node: Any, name: str) -> Any:
    """Return the first mapping called `name` in a nest of mappings, nearest the top."""
    level = [node]
    while level:
        level = [item for item in level if isinstance(item, dict)]
        for item in level:
            if isinstance(item.get(name), dict):
                return item[name]
        level = [child for item in level for child in item.values()]
    return None


def field_of(facts: Facts, column: str) -> str | None:
    """The published field that a column measures, once a record says what it does measure."""
    known = facts.columns.get(column)
    if known is None:
        return None
    name = f"{known['evaluation']}.{known['metric']}"
    return next((field for field, names in PUBLISHED["fields"].items() if name in names), None)


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
    own = model_of(facts.view.resolved)
    model = own or PUBLISHED["reference_model"]
    name = PUBLISHED["models"][model]
    columns: list[Column] = []
    shown: dict[str, str] = {}
    for column in table.columns:
        columns.append(column)
        field = field_of(facts, column.id) if column.kind == "metric" else None
        found = {row.variant: find(model, row.variant, field) for row in table.rows if field}
        if field is None or not any(found.values()):
            continue
        shown[field] = column.label
        label = f"{name}, published"
        grey = Column(f"{column.id}.published", label, column.unit, "published", 1, column.group)
        columns.append(grey)
        for row in table.rows:
            table.cells[row.variant, grey.id] = _cell(table, row, found[row.variant])
    table.columns = columns
    if shown:
        table.reference_notes = _notes(own, model, shown)


def _cell(table: Table, row: Row, found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell("none", reason="not published")
    marks = [_mark(table, "Source: " + PUBLISHED["sources"][found["source"]] + ".")]
    if found["conflict"]:
        marks.append(_mark(table, PUBLISHED["conflicts"][found["conflict"]]))
    value = found["value"]
    return Cell("ok", (Value((), value, ()),), value, marks=tuple(marks))


def _mark(table: Table, text: str) -> str:
    """Return the letter of a footnote; the same text keeps its letter."""
    for mark, known in table.footnotes.items():
        if known == text:
            return mark
    mark = _MARKS[len(table.footnotes)]
    table.footnotes[mark] = text
    return mark


def _notes(own: str | None, model: str, shown: dict[str, str]) -> list[str]:
    """Return what the published columns are, what to beware of, and what other methods reach."""
    name = f"{PUBLISHED['models'][model]} on {PUBLISHED['dataset']}"
    notes = [f"Published (grey): results of {name}."]
    if own is None:
        notes = [
            f"Published (grey): results of {name}, for reference only, measured at another scale."
        ]
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

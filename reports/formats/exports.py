"""LaTeX, Markdown, CSV, Parquet and JSON of the same tables, with the same digits."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from reports.display import short
from reports.formats.templates import environment
from reports.tables.against import Against
from reports.tables.model import (
    Column,
    Row,
    Table,
    cell_text,
    each,
    full_label,
    number,
    raised,
    remark,
)

_TEXT = ("table", "row_group", "row", "column", "label", "unit", "kind", "state", "text")
#: columns of the long form, one row a cell; `text` is the number as every format prints it
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(_TEXT, pl.String),
    **{
        "mean": pl.Float64,
        "sd": pl.Float64,
        "draws_sd": pl.Float64,
        "n": pl.Int64,
        "planned": pl.Int64,
        "bold": pl.Boolean,
    },
    **dict.fromkeys(("protocol", "reason", "values", "keys", "sources"), pl.String),
}
#: those that are fields of a cell
_OF_CELL = ("state", "mean", "sd", "draws_sd", "n", "planned", "bold", "protocol", "reason")
#: what `reports.display.plain` replaces
_CONTROL = r"[[\p{C}\p{Zl}\p{Zp}]--[\n\t\u200d]]"


def to_frame(tables: Sequence[Table]) -> pl.DataFrame:
    """Return one row a cell.

    `values` is JSON, [[seeds, value], ...]; `keys` are joined by spaces.
    """
    rows = [_long(t, row, column) for t in tables for row in t.rows for column in t.columns]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _long(table: Table, row: Row, column: Column) -> dict[str, Any]:
    cell = table.cell(row, column)
    return _plain(table, row, column) | {
        "table": table.title,
        "row_group": row.group,
        "row": row.variant,
        "column": column.id,
        "label": full_label(table, column),
        "unit": column.unit,
        "kind": column.kind,
        "values": json.dumps([[list(value.seeds), value.value] for value in cell.values]),
        "keys": " ".join(cell.keys),
        "sources": " ".join(table.footnotes[mark] for mark in cell.marks),
    }


def _plain(table: Table, row: Row, column: Column) -> dict[str, Any]:
    """Return the fields of a cell and its printed number; no mean of what is withheld."""
    cell = table.cell(row, column)
    shown = cell if cell.valued else replace(cell, mean=None, sd=None, draws_sd=None)
    return {name: getattr(shown, name) for name in _OF_CELL} | {"text": number(cell, column)}


def to_csv(tables: Sequence[Table]) -> str:
    """Return the long form; numbers in full precision, `text` as printed.

    Text that a spreadsheet would take for a formula has an apostrophe before it, and all text is
    quoted; only the printed number stays as it is. Control characters are replaced.
    """
    foreign = pl.col(pl.String).exclude("text").str.replace_all(_CONTROL, "\ufffd")
    formula = foreign.str.contains(r"^\s*[=+\-@＝＋－＠]")
    safe = pl.when(formula).then("'" + foreign).otherwise(foreign).name.keep()
    return to_frame(tables).with_columns(safe).write_csv(quote_style="non_numeric")


def to_parquet(tables: Sequence[Table]) -> bytes:
    """Return the long form as Parquet."""
    buffer = io.BytesIO()
    to_frame(tables).write_parquet(buffer)
    return buffer.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Return tables with their cells, comparisons, notes and problems."""
    return json.dumps(plain_tables(tables), indent=1) + "\n"


def plain_tables(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return tables with their cells, comparisons, notes and problems as plain data.

    The first one has the headline and the comparisons that the suite names.
    """
    return [
        {
            "title": table.title,
            "headline": table.headline,
            "named": [vars(comparison) for comparison in table.named],
            "baseline": table.baseline,
            "columns": [vars(column) for column in table.columns],
            "rows": [
                {
                    "row": row.variant,
                    "group": row.group,
                    "cells": {
                        column.id: _plain(table, row, column)
                        | {"values": [vars(value) for value in table.cell(row, column).values]}
                        for column in table.columns
                    },
                }
                for row in table.rows
            ],
            "comparisons": [vars(comparison) for comparison in table.comparisons],
            "footnotes": table.footnotes,
            "notes": [*table.notes, *table.reference_notes],
            "problems": table.problems,
        }
        for table in tables
    ]


def plain_against(found: Against) -> dict[str, Any]:
    """Return how far tables reproduce a reference as plain data."""
    return {
        "against": found.reference.name,
        "sentence": found.sentence,
        "reproduced": found.reproduced,
        "cells": [
            {"verdict": one.verdict, "here": one.ours.mean, "there": one.reference.mean}
            | vars(one.test)
            for one in found.cells
        ],
        **{name: getattr(found, name) for name in ("only_here", "only_there", "environment")},
    }


def to_markdown(tables: Sequence[Table]) -> str:
    """Return pipe tables; bold where a difference survives its test."""
    told = {"cell_text": cell_text, "full_label": full_label, "raised": raised}
    made = environment(markdown_escaped, keep_trailing_newline=True)
    return made.get_template("tables.md").render(tables=[*each(tables)], **told)


def markdown_escaped(text: object) -> str:
    """Return one line of text that Markdown shows as it stands."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|&$~" else c for c in short(text, 1000))


# ------------------------------------------------------------------------------------ LaTeX

#: characters by the name of what sets them in text, and in mathematics; then all that LaTeX minds
_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_NAMED |= {"|": "bar"}
_MATH = {"±": "pm", "×": "times", "≤": "leq", "≥": "geq", "Δ": "Delta", "α": "alpha", "σ": "sigma"}
_MATH |= {"µ": "mu", "μ": "mu", "·": "cdot", "→": "rightarrow", "↑": "uparrow", "↓": "downarrow"}
_SPECIAL = {char: f"\\{char}" for char in "{}&#%_"}
_SPECIAL |= {char: rf"\text{name}{{}}" for char, name in _NAMED.items()}
_SPECIAL |= {char: rf"$\{name}$" for char, name in _MATH.items()}
# behind a line's end these would be read as its options
_SPECIAL |= {char: f"{{{char}}}" for char in "[]*"}
_SPECIAL |= {"$": r"\char36{}", "°": r"$^\circ$", "²": "$^2$", "³": "$^3$", "…": r"\dots{}"}
_SPECIAL |= {"−": "$-$", "–": "--", "—": "---", "\u00a0": "~"}
_SPECIAL |= {"`": r"\char96{}", "’": "'", "‘": "`", "“": "``", "”": "''", '"': "''"}


def latex_escaped(text: object, limit: int = 400) -> str:
    """Return one line of text that any LaTeX engine sets as it stands.

    A character without a glyph in pdflatex becomes its code point, "U+1F600".
    """
    parts = []
    for char in short(text, limit):
        if char in _SPECIAL:
            parts.append(_SPECIAL[char])
        elif char.isascii() or _accented(char):
            parts.append(char)
        else:
            parts.append(f"U+{ord(char):04X}")
    return "".join(parts)


def _accented(char: str) -> bool:
    """Return whether LaTeX's own fonts set a character of Latin-1 as it is."""
    if char in "æøåßÆØÅ":
        return True
    parts = unicodedata.decomposition(char).split()
    return ord(char) < 0x100 and len(parts) == 2 and not parts[0].startswith("<")


def to_latex(tables: Sequence[Table]) -> str:
    """Return a document that compiles by itself; each table stands alone for pasting elsewhere.

    All that the template prints is escaped.
    """
    made = environment(
        latex_escaped,
        keep_trailing_newline=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
    )
    return made.get_template("tables.tex").render(
        tables=[*each(tables)], number=number, remark=remark
    )


#: format -> (file suffix, function of the tables to text or bytes)
FORMATS: dict[str, tuple[str, Callable[[Sequence[Table]], str | bytes]]] = {
    "latex": (".tex", to_latex),
    "markdown": (".md", to_markdown),
    "csv": (".csv", to_csv),
    "parquet": (".parquet", to_parquet),
    "json": (".json", to_json),
}

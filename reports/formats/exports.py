"""LaTeX, Markdown, CSV, Parquet and JSON of the same tables, with the same digits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import polars as pl

from reports.display import short, slug
from reports.formats.templates import environment
from reports.frames import SuiteView
from reports.tables.against import Against
from reports.tables.findings import bold_note
from reports.tables.model import (
    Cell,
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
from reports.tables.published import beside

#: columns of the tidy form, one row a measured value; a cell without one has a row with its state
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("table", "row_group", "row", "metric", "label", "unit", "kind"), pl.String),
    "seed": pl.Int64,
    "value": pl.Float64,
    **dict.fromkeys(("seeds", "protocol", "state", "reason", "keys", "source"), pl.String),
}
#: those that are fields of a cell in JSON
_OF_CELL = ("state", "mean", "sd", "draws_sd", "n", "planned", "bold", "protocol", "reason")
#: what `reports.display.plain` replaces
_CONTROL = r"[[\p{C}\p{Zl}\p{Zp}]--[\n\t\u200d]]"


def to_frame(tables: Sequence[Table]) -> pl.DataFrame:
    """Return one row a value.

    What is the same for several seeds is one value, without `seed`; `seeds` has all of them. `keys`
    are those of the stages behind it, joined by spaces.
    """
    everything = [(t, row, column) for t in each(tables) for row in t.rows for column in t.columns]
    rows = [one for at in everything if not at[0].origins for one in _tidy(*at)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _tidy(table: Table, row: Row, column: Column) -> Iterator[dict[str, Any]]:
    cell = table.cell(row, column)
    told = {
        "table": table.title,
        "row_group": row.group,
        "row": row.variant,
        "metric": column.id.removesuffix(".published"),
        "label": full_label(column),
        "unit": column.unit,
        "kind": column.kind,
        "protocol": cell.protocol,
        "state": cell.state,
        "reason": cell.reason,
        "source": " ".join(table.footnotes[mark] for mark in cell.marks),
    }
    for value in cell.values if cell.valued else ():
        yield told | {
            "seed": value.seeds[0] if len(value.seeds) == 1 else None,
            "seeds": " ".join(map(str, value.seeds)),
            "value": value.value,
            "keys": " ".join(value.keys),
        }
    if not cell.valued and cell.state not in ("none", "not planned"):
        yield told


def to_csv(tables: Sequence[Table]) -> str:
    """Return the tidy form, in full precision.

    Text that a spreadsheet would take for a formula has an apostrophe before it, and all text is
    quoted. Control characters are replaced.
    """
    foreign = pl.col(pl.String).str.replace_all(_CONTROL, "\ufffd")
    formula = foreign.str.contains(r"^\s*[=+\-@＝＋－＠]")
    safe = pl.when(formula).then("'" + foreign).otherwise(foreign).name.keep()
    return to_frame(tables).with_columns(safe).write_csv(quote_style="non_numeric")


def to_parquet(tables: Sequence[Table]) -> bytes:
    """Return the tidy form as Parquet."""
    buffer = io.BytesIO()
    to_frame(tables).write_parquet(buffer)
    return buffer.getvalue()


def to_json(view: SuiteView, tables: Sequence[Table]) -> str:
    """Return tables with where they come from, see `plain_report`."""
    return json.dumps(plain_report(view, tables), indent=1, default=str) + "\n"


def plain_report(view: SuiteView, tables: Sequence[Table]) -> dict[str, Any]:
    """Return tables as plain data, with commit, environment, data and the protocols of columns."""
    told = {
        str(record["protocol_fingerprint"]): record.get("protocol")
        for record in view.records.values()
        if record.get("protocol_fingerprint")
    }
    used = (c.protocol for t in tables for c in t.columns if c.protocol is not None)
    return {
        **view.provenance,
        **{name: getattr(view, name) for name in ("suite", "profile", "title", "scale", "seeds")},
        "protocols": {name: told[name] for name in dict.fromkeys(used) if name in told},
        "tables": [_plain(table) for table in tables],
        "published": _plain(tables[0].published) if tables[0].published else None,
    }


def _plain(table: Table) -> dict[str, Any]:
    """Return a table with its cells, comparisons, notes and problems as plain data.

    The first one has the headline and the comparisons that the suite names.
    """
    return {
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
                    column.id: _plain_cell(table.cell(row, column), column)
                    for column in table.columns
                },
            }
            for row in table.rows
        ],
        "comparisons": [vars(comparison) for comparison in table.comparisons],
        "footnotes": table.footnotes,
        "notes": table.notes,
        "problems": table.problems,
    }


def _plain_cell(cell: Cell, column: Column) -> dict[str, Any]:
    """Return the fields of a cell, its printed number, its values; no mean of what is withheld."""
    shown = cell if cell.valued else replace(cell, mean=None, sd=None, draws_sd=None)
    told = {name: getattr(shown, name) for name in _OF_CELL}
    return told | {"text": number(cell, column), "values": [vars(value) for value in cell.values]}


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
#: letters beyond ASCII that LaTeX's own fonts set as they are
_LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ"


def latex_escaped(text: object) -> str:
    """Return one line of text that any LaTeX engine sets as it stands.

    A character without a glyph in pdflatex becomes its code point, "U+1F600".
    """

    def plainly(char: str) -> str:
        return char if char.isascii() or char in _LETTERS else f"U+{ord(char):04X}"

    return "".join(_SPECIAL.get(char) or plainly(char) for char in short(text, 400))


def to_latex(view: SuiteView, tables: Sequence[Table], *, published: bool = False) -> str:
    """Return a fragment for `\\input`: a float for each table, with caption and label.

    With `published` what others printed stands in grey behind the measured columns. All that the
    template prints is escaped.
    """
    made = environment(
        lambda value: value if isinstance(value, _Set) else latex_escaped(value),
        keep_trailing_newline=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
    )
    grey = tables[0].published if published else None
    shown = [beside(table, grey) for table in each(replace(t, published=None) for t in tables)]
    return made.get_template("tables.tex").render(
        tables=shown,
        name=slug(f"{view.suite}-{view.profile}")[:60],
        number=lambda cell, column: number(cell, column).partition(" [")[0].replace("±", "+-"),
        after=_after,
        remark=remark,
        format=_number_format,
        wide=_is_wide,
        bold=bold_note,
    )


class _Set(str):
    """LaTeX of ours, which is set as it stands."""


def _after(cell: Cell, column: Column) -> _Set:
    """Return what stands behind a number, which siunitx takes for text."""
    draws, beside = number(cell, column).partition(" [")[2], remark(cell)
    told = rf"\,{{[}}{draws[:-1]}{{]}}" if draws else ""
    told += rf"\,({latex_escaped(beside)})" if beside else ""
    told += f"$^{{{''.join(cell.marks)}}}$" if cell.marks else ""
    return _Set(f"{{{told}}}" if told else "")


def _number_format(table: Table, column: Column) -> _Set:
    """Return siunitx's options of a column: digits of its longest number, and what follows it."""
    numbers = [number(table.cell(row, column), column).partition(" [")[0] for row in table.rows]
    parts = [text.partition(" ± ") for text in numbers if text] or [("0", "", "")]
    whole = max(len(mean.partition(".")[0]) for mean, _, _ in parts)
    after = max(len(mean.partition(".")[2]) for mean, _, _ in parts)
    spread = max(len(sd.replace(".", "").lstrip("0")) or 1 for _, _, sd in parts)
    uncertain = f"({spread})" if any(sd for _, _, sd in parts) else ""
    valued = (table.cell(row, column) for row in table.rows)
    post = max((_after(cell, column) for cell in valued if cell.valued), key=len, default="")
    post = f",table-space-text-post={post}" if post else ""
    grey = ",color=gray" if column.kind == "published" else ""
    return _Set(f"table-format={whole}.{after}{uncertain}{post}{grey}")


def _is_wide(table: Table) -> bool:
    """Return whether a table needs the width of both columns of a paper: about 50 letters."""
    cells = (
        max((len(cell_text(table.cell(row, column), column)) for row in table.rows), default=0)
        for column in table.columns
    )
    names = max((len(row.variant) for row in table.rows), default=0)
    return min(names, 48) + sum(max(cell, 6) + 2 for cell in cells) > 50


#: format -> (file suffix, function of a view and its tables to text or bytes)
FORMATS: dict[str, tuple[str, Callable[[SuiteView, Sequence[Table]], str | bytes]]] = {
    "latex": (".tex", to_latex),
    "latex-published": (".published.tex", partial(to_latex, published=True)),
    "markdown": (".md", lambda view, tables: to_markdown(tables)),
    "csv": (".csv", lambda view, tables: to_csv(tables)),
    "parquet": (".parquet", lambda view, tables: to_parquet(tables)),
    "json": (".json", to_json),
}

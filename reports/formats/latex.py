"""LaTeX of the tables: booktabs rules, grey published columns, everything escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from reports.display import short
from reports.tables.model import Cell, Column, Row, Table, each, number, remark

#: characters by the name of what sets them in text, and in mathematics; then all that LaTeX minds
_TEXT = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_TEXT |= {"|": "bar"}
_MATH = {"±": "pm", "×": "times", "≤": "leq", "≥": "geq", "Δ": "Delta", "α": "alpha", "σ": "sigma"}
_MATH |= {"µ": "mu", "μ": "mu", "·": "cdot", "→": "rightarrow", "↑": "uparrow", "↓": "downarrow"}
_SPECIAL = {char: f"\\{char}" for char in "{}&#%_"}
_SPECIAL |= {char: rf"\text{name}{{}}" for char, name in _TEXT.items()}
_SPECIAL |= {char: rf"$\{name}$" for char, name in _MATH.items()}
# behind a line's end these would be read as its options
_SPECIAL |= {char: f"{{{char}}}" for char in "[]*"}
_SPECIAL |= {"$": r"\char36{}", "°": r"$^\circ$", "²": "$^2$", "³": "$^3$", "…": r"\dots{}"}
_SPECIAL |= {"−": "$-$", "–": "--", "—": "---", "\u00a0": "~"}
_SPECIAL |= {"`": r"\char96{}", "’": "'", "‘": "`", "“": "``", "”": "''", '"': "''"}

_PREAMBLE = r"""% Needs: \usepackage{booktabs,graphicx,xcolor}
\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm,landscape]{geometry}
\usepackage{booktabs,graphicx,xcolor}
\begin{document}
"""


def escape(text: object, limit: int = 400) -> str:
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
    """Return a document that compiles by itself; each table stands alone for pasting elsewhere."""
    return _PREAMBLE + "\n".join(_table(table) for table in each(tables)) + "\\end{document}\n"


def _table(table: Table) -> str:
    aligned = "l" + "r" * len(table.columns)
    lines = [
        r"\begin{table}[htbp]",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escape(table.title)}}}",
        # as wide as it is, but no wider than the page
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{aligned}}}",
        r"\toprule",
        *_heads(table),
        r"\midrule",
    ]
    for i, (group, rows) in enumerate(table.row_groups()):
        if i:
            lines.append(r"\addlinespace")
        if group is not None:
            wide = len(table.columns) + 1
            lines.append(rf"\multicolumn{{{wide}}}{{l}}{{\emph{{{escape(group, 60)}}}}} \\")
        lines += [_row(table, row) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    said = [f"$^{{{mark}}}$ {escape(text)}" for mark, text in table.footnotes.items()]
    said = [*(escape(n) for n in [*table.notes, *table.reference_notes]), *said]
    if said:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [rf"{sentence}\par" for sentence in said] + [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _heads(table: Table) -> list[str]:
    """Return groups over rules where there are any, labels, units."""
    lines = []
    groups = table.column_groups()
    if any(group is not None for group, _ in groups):
        cells, rules, at = [""], [], 2
        for group, columns in groups:
            end = at + len(columns) - 1
            if group is None:
                cells.append("")
            else:
                cells.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{escape(group, 60)}}}")
                rules.append(rf"\cmidrule(lr){{{at}-{end}}}")
            at = end + 1
        lines += [" & ".join(cells) + r" \\", "".join(rules)]
    labels = (_grey(c, _label(c)) for c in table.columns)
    lines.append(" & ".join([escape(table.corner, 40), *labels]) + r" \\")
    if any(column.unit for column in table.columns):
        units = [_grey(c, escape(_unit(c), 20)) for c in table.columns]
        lines.append(" & ".join(["", *units]) + r" \\")
    return lines


def _label(column: Column) -> str:
    """Return the label; a long one goes on below behind its commas."""
    label = escape(column.label, 40)
    if len(column.label) <= 12 or ", " not in label:
        return label
    return r"\shortstack[r]{" + label.replace(", ", r",\\") + "}"


def _unit(column: Column) -> str:
    arrow = " ↑" if column.higher_is_better else " ↓"
    return column.unit + (arrow if column.kind == "metric" else "")


def _row(table: Table, row: Row) -> str:
    cells = [_cell(table.cell(row, column), column) for column in table.columns]
    return " & ".join([escape(row.variant, 48), *cells]) + r" \\"


def _cell(cell: Cell, column: Column) -> str:
    value, beside = escape(number(cell, column)), escape(remark(cell))
    if cell.bold:
        value = rf"\textbf{{\boldmath {value}}}"
    mark = f"$^{{{''.join(cell.marks)}}}$" if cell.marks else ""
    text = f"{value}{mark} ({beside})" if value and beside else f"{value or beside}{mark}"
    return _grey(column, text)


def _grey(column: Column, text: str) -> str:
    return rf"\textcolor{{gray}}{{{text}}}" if column.kind == "published" and text else text

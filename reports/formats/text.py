"""The result as plain text for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from reports.display import amount, duration, plain, plural, short, time_unit, width
from reports.facts import Facts
from reports.frames import SuiteView
from reports.tables.build import build_tables
from reports.tables.costs import ENERGY, Ledger, ledger
from reports.tables.findings import numerics, ranking, tests
from reports.tables.model import Column, Table, cell_text, row_label

#: columns where no terminal tells, and of sentences at the most
_WIDTH = 100
#: lines of a failed stage's log
_LOG_LINES = 6
#: columns of a heading before it goes on below
_HEADING = 14


def render_text(
    view: SuiteView, facts: Facts | None = None, tables: list[Table] | None = None
) -> str:
    """Scale, tables, costs and problems of a suite, ending with a newline."""
    facts = facts or Facts(view)
    lines = [f"{short(view.title, 80)} · profile {short(view.profile, 30)}", short(view.scale, 120)]
    lines += [part for note in view.notes for part in _wrap(short(note, 600))]
    for table in tables or build_tables(view, facts):
        lines += ["", *table_text(table), *_said(table, facts)]
        lines += [line for crossed in table.crossed for line in ["", *table_text(crossed)]]
    lines += ["", *ledger_text(ledger(facts))]
    for failure in view.failures.iter_rows(named=True):
        lines += ["", *_failure_text(failure)]
    if view.problems:
        lines += ["", f"{plural(len(view.problems), 'problem')} in the store:"]
        lines += [part for problem in view.problems[:10] for part in _wrap(short(problem, 300))]
        if len(view.problems) > 10:
            lines.append(f"  and {len(view.problems) - 10} more, in the report")
    return "\n".join(plain(line) for line in lines) + "\n"


def table_text(table: Table) -> list[str]:
    """Return one table, ruled as in print; published numbers are left to the report.

    Columns past the width of the terminal go on below, beside the same rows.
    """
    columns = [column for column in table.columns if column.kind != "published"]
    lines = [short(table.title, 80)]
    while columns:
        count = len(columns)
        while (part := _ruled(table, columns[:count])) and count > 1 and width(part[0]) > _room():
            count -= 1
        lines += part
        columns = columns[count:]
    return lines


def _room() -> int:
    """Return columns of the terminal."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def _ruled(table: Table, columns: Sequence[Column]) -> list[str]:
    """Return all rows with some of the columns, between rules."""
    body: list[list[str] | str] = []
    for group, rows in table.row_groups():
        if group is not None:
            body.append(short(group, 48))
        for row in rows:
            indent = "  " if group is not None else ""
            cells = [_cell(table, row.variant, column) for column in columns]
            body.append([indent + row_label(row.variant), *cells])
    heads = [["", *line] for line in zip(*_heads(columns), strict=True)]
    heads[-1][0] = short(table.corner, 48)
    grid = [*heads, *(line for line in body if isinstance(line, list))]
    widths = [max(width(line[i]) for line in grid) for i in range(len(columns) + 1)]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [rule, *(_line(head, widths) for head in heads), rule]
    lines += [line if isinstance(line, str) else _line(line, widths) for line in body]
    return [*lines, rule]


def _cell(table: Table, variant: str, column: Column) -> str:
    cell = table.cells[variant, column.id]
    text = cell_text(cell, column)
    if any(table.cells[row.variant, column.id].bold for row in table.rows):
        text += " *" if cell.bold else "  "
    return text


def _heads(columns: Sequence[Column]) -> list[list[str]]:
    """Return the label of each column in lines of whole words, then its unit; all of one height."""
    found = []
    for column in columns:
        lines = ["training"] if column.kind == "cost" else []
        lines += textwrap.wrap(short(column.label, 80), _HEADING, break_on_hyphens=False)
        found.append([*lines, column.unit])
    height = max(map(len, found))
    return [[""] * (height - len(lines)) + [short(line, 24) for line in lines] for lines in found]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0] + " " * (widths[0] - width(cells[0]))
    rest = [" " * (w - width(c)) + c for c, w in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest]).rstrip()


def _said(table: Table, facts: Facts) -> list[str]:
    said = [*table.notes, *tests(table), *ranking(table, facts), *numerics(table, facts)]
    if any(cell.bold for cell in table.cells.values()):
        said.append("* stands for bold.")
    said += [f"Problem: {problem}" for problem in table.problems]
    return [part for sentence in said for part in _wrap(sentence)]


def ledger_text(found: Ledger) -> list[str]:
    """Return costs of the suite in a few lines."""
    lines = []
    for kind, hours in found.total.hours.items():
        unit, factor = time_unit(hours)
        parts = [
            f"{line.label.lower()} {amount(line.hours[kind] * factor)}"
            for line in found.lines
            if not line.apart and kind in line.hours
        ]
        text = f"Cost: {amount(hours * factor)} {kind}-{unit} ({', '.join(parts)})"
        if found.saved.get(kind):
            text += f"; sharing stages saved {amount(found.saved[kind] * factor)}"
        lines.append(text + ".")
    energy, _ = found.total.measured(ENERGY)
    if energy is not None:
        lines.append(f"Energy: {amount(energy)} kWh.")
    for line in found.lines:
        if line.apart:
            lines.append(f"Apart: {line.label.lower()}, {line.count}, {duration(line.wall_s)}.")
    lines += found.sentences
    return [part for line in lines for part in _wrap(line)]


def _failure_text(failure: dict[str, Any]) -> list[str]:
    """Return what failed, why, the rows that it cost, and the end of its log."""
    rows = ", ".join(short(variant, 40) for variant in failure["rows"])
    error = f"{failure['error']}: " if failure["error"] else ""
    said = f"{short(failure['name'], 80)} {failure['status']}: {error}{failure['message']}"
    log = (failure["log_tail"] or "").rstrip().splitlines()[-_LOG_LINES:]
    return [*_wrap(short(said, 600)), f"  It costs the rows {rows}.", *(f"  | {x}" for x in log)]


def _wrap(text: str) -> list[str]:
    columns = max(40, min(_room(), _WIDTH))
    return textwrap.wrap(plain(text), columns, subsequent_indent="  ", break_on_hyphens=False) or [
        ""
    ]

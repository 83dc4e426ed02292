"""The result as plain text for a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from io import StringIO
from itertools import islice
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from reports import display
from reports.display import amount, duration, mean_sd, middle, plain, plural, short, time_unit
from reports.frames import SuiteView
from reports.tables.against import DIFFERENT, NOISE, SAME, Against, Held
from reports.tables.build import build_tables
from reports.tables.costs import CPU_TIME, ENERGY, Ledger, ledger
from reports.tables.findings import best_row, how_tested, numerics, ranking
from reports.tables.model import Column, Table, cell_text

#: columns where no terminal tells, and of sentences at the most
_WIDTH = 100
_room = partial(display.room, _WIDTH)
#: lines of a failed stage's log, and columns of each
_LOG_LINES, _LOG_WIDTH = 6, 240
#: columns of a heading before it goes on below
_HEADING = 14
#: one rule, below the headings
_RULE = Box("    \n    \n────\n" + 5 * "    \n")
#: lays out without colours, whatever standard output is, and never cuts a line
_WIDE = Console(file=StringIO(), width=1_000_000, color_system=None)
#: what stands for a character that standard output lacks; "?" for all others
_INSTEAD = {"±": "+/-", "−": "-", "–": "-", "─": "-", "…": "...", "×": "x", "·": "-", "Δ": "delta"}


def render_text(view: SuiteView, tables: list[Table] | None = None, *, brief: bool = False) -> str:
    """Return scale, tables, costs, failures and problems of a suite, ending with a newline.

    With `brief` the tables alone, the sentence on the result, failures and problems.
    """
    tables = tables or build_tables(view)
    if brief:
        lines = [line for table in tables for line in [*table_text(table), *_stars(table), ""]]
        lines += _wrapped(tables[0].headline or [best_row(tables[0])])
    else:
        title = f"{short(view.title, 80)} · profile {short(view.profile, 30)}"
        told = [title, short(view.scale, 120), *tables[0].headline]
        told += [short(note, 600) for note in view.notes]
        lines = _wrapped(told)
        for table in tables:
            lines += ["", *table_text(table), *_said(table, view)]
            lines += [line for crossed in table.crossed for line in ["", *table_text(crossed)]]
        lines += ["", *ledger_text(ledger(view))]
    for failure in view.failures.iter_rows(named=True):
        lines += ["", *_failure_text(failure)]
    if view.problems:
        lines += ["", f"{plural(len(view.problems), 'problem')} in the store:"]
        lines += _wrapped(short(problem, 300) for problem in view.problems[:10])
        if len(view.problems) > 10:
            lines.append(f"  and {len(view.problems) - 10} more, in the report")
    return "\n".join(map(_printed, lines)) + "\n"


def against_text(found: Against) -> str:
    """Return how far tables reproduce a reference: a sentence, then the cells of other digits."""
    of = f" ({short(found.reference.what, 200)})" if found.reference.what else ""
    told = [found.sentence, f"Reference: {short(found.reference.name, 200)}{of}."]
    other = [one for one in found.cells if one.verdict != SAME]
    for verdict in (DIFFERENT, NOISE):
        lines = [_held_text(one) for one in other if one.verdict == verdict]
        told += [f"{verdict}:", *lines] if lines else []
    if any(one.test.p_holm is not None for one in other):
        told.append(
            "p: how often the mean of other seeds lies so far off (Student's t, prediction "
            "interval of the reference's seeds), by Holm's correction over these cells. Seen from: "
            "the smallest true difference that this shows with 80 % power."
        )
    if other:
        named = (f"{name} {short(a)} here, {short(b)} there" for name, a, b in found.environment)
        listed = "; ".join(named) or "no difference of versions, processor or commit is known"
        told.append(f"What may explain other digits: {listed}.")
    for where, alone in (("here", found.only_here), ("there", found.only_there)):
        if alone:
            names = (dict.fromkeys(one[i] for one in alone) for i in (0, 1))
            rows, columns = (", ".join(map(short, some)) for some in names)
            told.append(f"Only {where}: {plural(len(alone), 'cell')} ({rows}: {columns}).")
    return "\n".join(map(_printed, _wrapped(told)))


def _held_text(one: Held) -> str:
    """Return a cell of other digits, why it is judged so, and what would have been seen."""
    digits, test = one.column.digits, one.test
    here, there = (mean_sd(cell.mean or 0.0, cell.sd, digits) for cell in (one.ours, one.reference))
    why = "one seed or no spread there"
    if test.p_holm is not None and test.detectable is not None:
        p = "< 0.001" if test.p_holm < 0.001 else f"= {test.p_holm:.3f}"
        why = f"p {p}, seen from {mean_sd(test.detectable, None, digits)}"
    name = f"{middle(test.variant)}, {short(one.column.label)}"
    return f"  {name}: {here} here, {there} there ({why})"


def table_text(table: Table) -> list[str]:
    """Return one table, ruled as in print.

    Columns past the width of the terminal go on below, beside the same rows.
    """
    rows = _WIDE.measure(_grid(table, [])).maximum
    parts: list[list[Column]] = []
    room = 0
    for column in table.columns:
        taken = _WIDE.measure(_grid(table, [column])).maximum - rows
        if not parts or taken > room:
            parts.append([])
            room = _room() - rows
        parts[-1].append(column)
        room -= taken
    return [short(table.title, 80), *(line for part in parts for line in _ruled(table, part))]


def _printed(text: str) -> str:
    """Return text as standard output can print it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    known = (c if c.encode(encoding, "ignore") else _INSTEAD.get(c, "?") for c in plain(text))
    return "".join(known)


def _ruled(table: Table, columns: Sequence[Column]) -> list[str]:
    """Return all rows with some of the columns, between rules, and the names of groups."""
    with _WIDE.capture() as printed:
        _WIDE.print(_grid(table, columns))
    lines = [line.rstrip() for line in printed.get().splitlines()]
    rule = next(line for line in lines if set(line) == {"─"})
    body = lines.index(rule) + 1
    found, rest = [rule, *lines[:body]], iter(lines[body:])
    for group, rows in table.row_groups():
        found += [] if group is None else [short(group, 48)]
        found += islice(rest, len(rows))
    return [*found, rule]


def _grid(table: Table, columns: Sequence[Column]) -> Grid:
    """Return all rows with some of the columns, a line each, two blanks between columns."""
    grid = Grid(box=_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(Text(short(table.corner, 48)), vertical="bottom", no_wrap=True)
    for column in columns:
        grid.add_column(
            Text(_printed(_head(column))), justify="right", vertical="bottom", no_wrap=True
        )
    for row in table.rows:
        indent = "" if row.group is None else "  "
        label = indent + middle(row.variant, max(20, min(48, _room() - 22)))
        cells = (_cell(table, row.variant, column) for column in columns)
        grid.add_row(*(Text(_printed(text)) for text in (label, *cells)))
    return grid


def _cell(table: Table, variant: str, column: Column) -> str:
    cell = table.cells[variant, column.id]
    text = cell_text(cell, column)
    if any(table.cells[row.variant, column.id].bold for row in table.rows):
        text += " *" if cell.bold else "  "
    return text


def _head(column: Column) -> str:
    """Return the label of a column in lines of whole words, then its unit."""
    lines = ["training"] if column.kind == "cost" else []
    lines += textwrap.wrap(short(column.label, 80), _HEADING, break_on_hyphens=False)
    return "\n".join(short(line, 24) for line in [*lines, column.unit])


def _said(table: Table, view: SuiteView) -> list[str]:
    said = [*table.notes, *how_tested(table), *ranking(table, view), *numerics(table, view)]
    said += _stars(table) + [f"Problem: {problem}" for problem in table.problems]
    return _wrapped(said)


def _stars(table: Table) -> list[str]:
    bold = any(cell.bold for cell in table.cells.values())
    return [f"* stands for bold: better than {short(table.baseline or '')}."] if bold else []


def ledger_text(found: Ledger) -> list[str]:
    """Return costs of the suite in a few lines."""
    lines = []
    for kind, hours in found.total.hours.items():
        unit, factor = time_unit(hours)
        parts = ", ".join(
            f"{line.label.lower()} {amount(line.hours[kind] * factor)}"
            for line in found.lines
            if not line.apart and kind in line.hours
        )
        saved = found.saved.get(kind, 0.0) * factor
        saved_text = f"; sharing stages saved {amount(saved)}" if saved else ""
        lines.append(f"Cost: {amount(hours * factor)} {kind}-{unit} ({parts}){saved_text}.")
    for quantity, said in ((CPU_TIME, "CPU time of the processes"), (ENERGY, "Energy")):
        value, _ = found.total.measured(quantity)
        if value is not None:
            lines.append(f"{said}: {quantity.text(value)}.")
    for line in found.lines:
        if line.apart:
            count = len(line.rows)
            took = "not measured" if line.unmeasured == count else duration(line.wall_s)
            lines.append(f"Apart: {line.label.lower()}, {count}, {took}.")
    return _wrapped(lines + found.sentences)


def _failure_text(failure: dict[str, Any]) -> list[str]:
    """Return what failed, why, the rows that it cost, and the end of its log."""
    rows = ", ".join(short(variant, 40) for variant in failure["rows"])
    error = f"{failure['error']}: " if failure["error"] else ""
    said = f"{short(failure['name'], 80)} {failure['status']}: {error}{failure['message']}"
    log = plain(failure["log_tail"] or "").rstrip().splitlines()[-_LOG_LINES:]
    cut = (line if len(line) <= _LOG_WIDTH else line[: _LOG_WIDTH - 1] + "…" for line in log)
    told = _wrapped([short(said, 600), f"  It costs the rows {rows}."])
    return told + [part for line in cut for part in display.wrap(f"  | {line}", _room(), "  |   ")]


def _wrapped(sentences: Iterable[str]) -> list[str]:
    """Return the lines of sentences, none wider than the terminal."""
    width = min(_room(), _WIDTH)
    return [line for one in sentences for line in display.wrap(plain(one), width)]

"""Curves over a number: a metric along one setting of the rows, or along numbered metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import polars as pl

from reports.display import short, slug
from reports.figures.charts import legend_of, off_scale, with_unit
from reports.figures.model import Figure, Note, Panel, Point, Series, figure
from reports.figures.palette import looks
from reports.figures.svg import LEFT, RIGHT, spanning
from reports.frames import DONE, SuiteView, flatten
from reports.tables.cells import metric_cells
from reports.tables.model import Cell, Table

#: panels and lines beyond which a figure says nothing more
_PANELS, _LINES = 8, 24
#: what a metric is measured along: title of the figure, label of the axis
_ALONG = {
    "block": ("By encoder depth", "after encoder block, before any norm"),
    "images a class": ("By number of labels", "labelled images a class"),
    "share of labels": ("By share of labels", "labelled images, %"),
    "neighbours": ("By number of neighbours", "neighbours"),
}

# -------------------------------------------------------------------- along one setting of the rows


def ablation(view: SuiteView, table: Table) -> Figure | None:
    """Return metrics against each number that at least three comparable rows differ in."""
    panels: list[Panel] = []
    legend: list[tuple[int, str]] = []
    title = ""
    for setting, lines in _lines(view, [row.variant for row in table.rows]).items():
        kind, _, name = setting.partition(".")
        name = name.rpartition(".")[2]
        shared = [_common(line) for line in lines]
        numbers = looks(shared)
        legend = legend or [(numbers[label], label) for label in shared]
        title = title or f"By {name.replace('_', ' ')}"
        for column in table.metrics:
            series: list[Series] = []
            for label, line in zip(shared, lines, strict=True):
                cells = ((x, table.cells[variant, column.id]) for x, variant in line)
                series += _series(numbers[label], label, cells)
            if series:
                panels.append(_panel(with_unit(column), f"{name} ({kind})", series))
    caption = (
        "Mean over seeds against a setting in which the rows differ, whiskers one sd; rows that "
        "are alike in all other settings are joined."
    )
    return figure("ablations", title, caption, panels[:_PANELS], legend)


def _series(number: int, name: str, cells: Iterable[tuple[float, Cell]]) -> list[Series]:
    """Return the line through the cells that have a number; none through fewer than two."""
    points = [
        Point(x, cell.mean, cell.sd, f"{short(name)}: {cell.mean:.4g} at {x:g}")
        for x, cell in cells
        if cell.valued and cell.mean is not None
    ]
    return [Series(number, name, points)] if len(points) > 1 else []


def _lines(view: SuiteView, variants: Sequence[str]) -> dict[str, list[list[tuple[float, str]]]]:
    """Return setting -> the rows that differ in it alone, as (value, variant) by value.

    A line has three values at least. A stage's record may repeat a setting of the stage before it;
    of settings that are alike in every row the first one stands for all.
    """
    rows = [_settings(view, variant) for variant in variants]
    paths = dict.fromkeys(path for row in rows for path in row)
    values = {path: [row.get(path) for row in rows] for path in paths}
    values = {path: found for path, found in values.items() if len({*map(repr, found)}) > 1}
    first = {repr(found): path for path, found in reversed(values.items())}
    values = {path: found for path, found in values.items() if first[repr(found)] == path}
    lines: dict[str, list[list[tuple[float, str]]]] = {}
    for path, found in values.items():
        groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for i, (value, variant) in enumerate(zip(found, variants, strict=True)):
            if _drawable(value):
                rest = repr([others[i] for other, others in values.items() if other != path])
                groups[rest].append((float(str(value)), variant))
        long = [sorted(group) for group in groups.values() if len({x for x, _ in group}) >= 3]
        lines |= {path: long[:_LINES]} if long else {}
    return lines


def _settings(view: SuiteView, variant: str) -> dict[str, Any]:
    """Return the settings of a row's training stages of one seed: "head.queue_size" -> 512."""
    mine = view.training.filter(pl.col("variant") == variant)
    first = mine.filter((pl.col("seed") == pl.col("seed").first()) & pl.col("status").is_in(DONE))
    flat: dict[str, Any] = {}
    for key, kind in first.select("key", "kind").iter_rows():
        flat |= flatten(view.record(key).get("settings") or {}, kind)
    return {path: value for path, value in flat.items() if not path.endswith(".seed")}


def _drawable(value: object) -> bool:
    """Return whether an axis can have a mark at a value: NaN and what no setting is can not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1e-12 < abs(value) < 1e12


def _common(line: list[tuple[float, str]]) -> str:
    """Return what the names of a line's rows have in common; the first of them if nothing."""
    names = [variant.split() for _, variant in line]
    return short(" ".join(w for w in names[0] if all(w in name for name in names)) or line[0][1])


# ------------------------------------------------------------------------ along what metrics say


def by_number(view: SuiteView, printed: Collection[str] = ()) -> list[Figure]:
    """Return a figure for each thing that metrics are measured along: blocks, labels, neighbours.

    Each series of metrics is a panel, each row of the table a line. `printed` are the
    ids of the tables' columns: a figure that shows these alone is folded.
    """
    cells = metric_cells(view)
    columns: dict[str, dict[tuple[str, str], list[tuple[float, str]]]] = {}
    for column, row in view.measures.items():
        if _drawable(row["at"]):
            found = columns.setdefault(row["along"], {})
            found.setdefault((row["evaluation"], row["series"]), []).append((row["at"], column))
    figures = []
    numbers = looks(view.variants)
    for along, (title, x_label) in _ALONG.items():
        panels, drawn, folded = [], [], True
        for (_, label), numbered in columns.get(along, {}).items():
            series: list[Series] = []
            for v in view.variants[:_LINES]:
                known = ((x, cells[v, c]) for x, c in sorted(numbered) if (v, c) in cells)
                series += _series(numbers[v], v, known)
            if series and len({x for x, _ in numbered}) >= 3:
                unit = view.measures[numbered[0][1]]["unit"]
                told = short(label, 56) + (f", {unit}" if unit else "")
                panels.append(_panel(told, x_label, series))
                drawn += [one.name for one in series]
                folded = folded and all(column in printed for _, column in numbered)
        legend = legend_of(view, drawn)
        caption = "Mean over seeds; whiskers are one sd."
        panels = panels[:_PANELS]
        figures.append(figure(slug(title), title, caption, panels, legend, folded=folded))
    return [found for found in figures if found is not None]


def _panel(y_label: str, x_label: str, series: Sequence[Series]) -> Panel:
    """Return lines over one number; those so far from all others that these would be flat are told
    in words."""
    values = {one.name: [point.y for point in one.points] for one in series}
    apart = off_scale({name: fmean(ys) for name, ys in values.items()})
    rest = [y for name, ys in values.items() if name not in apart for y in ys]
    beyond = [
        one
        for one in series
        if one.name in apart
        and (max(values[one.name]) < min(rest) or min(values[one.name]) > max(rest))
    ]
    series = [one for one in series if one not in beyond]
    marks = sorted({point.x for one in series for point in one.points})
    log = marks[0] > 0 and marks[-1] / marks[0] >= 8
    scale = spanning(marks, LEFT, RIGHT, log=log)
    crowded = any(scale(b) - scale(a) < 24 for a, b in pairwise(marks))

    notes = []
    for one in beyond:
        first, last = one.points[0].y, one.points[-1].y
        notes.append(Note(f"off the scale: {short(one.name, 24)}, {first:.1f} to {last:.1f}"))
    said = "; ".join(short(one.name, 40) for one in series[:8])
    at = None if crowded else marks
    x_label = short(x_label, 50)
    return Panel("", series, said, x_label, y_label, log_x=log, marks=at, notes=notes)

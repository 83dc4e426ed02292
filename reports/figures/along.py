"""Curves over a number: a metric along one setting of the rows, or along numbered metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import polars as pl
from markupsafe import Markup

from reports.display import short, slug
from reports.facts import DONE, Facts, flatten
from reports.figures.charts import Figure, colour, legend_of, off_scale, with_unit
from reports.figures.svg import LEFT, PALETTE, RIGHT, Panel, polyline, spanning, tag
from reports.tables.build import metric_cells
from reports.tables.model import Cell, Column, Table

#: panels and lines beyond which a figure says nothing more
_PANELS, _LINES = 8, 24
#: what a metric is measured along: title of the figure, label of the axis
_ALONG = {
    "block": ("By encoder depth", "after encoder block, before any norm"),
    "images a class": ("By number of labels", "labelled images a class"),
    "share of labels": ("By share of labels", "labelled images, %"),
    "neighbours": ("By number of neighbours", "neighbours"),
}

#: (x, mean, sd) of one line
_Points = list[tuple[float, float, float | None]]


# -------------------------------------------------------------------- along one setting of the rows


def ablation(facts: Facts, table: Table) -> Figure | None:
    """Metrics against each number that at least three otherwise comparable rows differ in."""
    rows = {row.variant: _settings(facts, row.variant) for row in table.rows}
    panels = []
    legend: list[tuple[str, str]] = []
    for setting, tied in _varied(rows).items():
        lines = _lines(rows, setting, tied)
        legend = legend or [(f"c{i % PALETTE}", _common(line)) for i, line in enumerate(lines)]
        kind, _, name = setting.partition(".")
        for column in (c for c in table.columns if c.kind == "metric"):
            drawn = _measured(table, lines, column)
            if drawn:
                label = f"{name.rpartition('.')[2]} ({kind})"
                panels.append(_panel(with_unit(column), label, drawn))
    if not panels:
        return None
    caption = (
        "Mean over seeds against a setting in which the rows differ, whiskers one sd; rows that "
        "are alike in all other settings are joined."
    )
    return Figure("ablations", "Ablations", caption, panels[:_PANELS], legend[:_LINES])


def _settings(facts: Facts, variant: str) -> dict[str, Any]:
    """Return the settings of a row's training stages of one seed: "head.queue_size" -> 512."""
    mine = facts.training().filter(pl.col("variant") == variant)
    first = mine.filter((pl.col("seed") == pl.col("seed").first()) & pl.col("status").is_in(DONE))
    flat: dict[str, Any] = {}
    for key, kind in first.select("key", "kind").iter_rows():
        settings = flatten(facts.record(key).get("settings") or {}, kind)
        flat |= {
            path: str(value) if isinstance(value, list) else value
            for path, value in settings.items()
            if not path.endswith(".seed")
        }
    return flat


def _varied(rows: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Numbers with at least three values over the rows, each with the settings that go along.

    A stage's record may repeat a setting of the stage before it; such paths have the same values
    in every row, and the first of them stands for all.
    """
    paths = list(dict.fromkeys(path for flat in rows.values() for path in flat))
    tied: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        tied[tuple(repr(flat.get(path)) for flat in rows.values())].append(path)
    found = {}
    for same in tied.values():
        values = {flat[same[0]] for flat in rows.values() if same[0] in flat}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numbers and len(values) >= 3:
            found[same[0]] = set(same)
    return found


def _lines(
    rows: dict[str, dict[str, Any]], setting: str, tied: set[str]
) -> list[list[tuple[float, str]]]:
    """Rows that differ in `setting` alone, as (value, variant) in the order of the values."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[float, str]]] = defaultdict(list)
    for variant, flat in rows.items():
        if setting in flat:
            rest = tuple(sorted((k, str(v)) for k, v in flat.items() if k not in tied))
            groups[rest].append((float(flat[setting]), variant))
    return [sorted(group) for group in groups.values() if len({x for x, _ in group}) >= 3]


def _common(line: list[tuple[float, str]]) -> str:
    """What the names of a line's rows have in common; the first of them if nothing."""
    names = [variant for _, variant in line]
    shared = [w for w in names[0].split() if all(w in name.split() for name in names)]
    return short(" ".join(shared) or names[0])


def _measured(
    table: Table, lines: list[list[tuple[float, str]]], column: Column
) -> list[tuple[str, str, _Points]]:
    """(colour, what it is, points) of each line that has at least two numbers."""
    found = []
    for i, line in enumerate(lines[:_LINES]):
        cells = [(x, table.cells[variant, column.id]) for x, variant in line]
        points = [(x, c.mean, c.sd) for x, c in cells if c.valued and c.mean is not None]
        if len(points) > 1:
            names = ", ".join(variant for _, variant in line)
            found.append((f"c{i % PALETTE}", names, points))
    return found


# --------------------------------------------------------------------------- numbered metrics


def by_number(facts: Facts) -> list[Figure]:
    """Return a figure for each thing that metrics are measured along: blocks, labels, neighbours.

    Each series of metrics is a panel, each row of the table a line.
    """
    cells = metric_cells(facts)
    points: dict[str, dict[tuple[str, str], list[tuple[float, str]]]] = {}
    for column, row in facts.columns.items():
        if row["along"] in _ALONG:
            series = points.setdefault(row["along"], {})
            series.setdefault((row["evaluation"], row["series"]), []).append((row["at"], column))
    figures = []
    for along, (title, x_label) in _ALONG.items():
        panels, drawn = [], []
        for (_, label), columns in points.get(along, {}).items():
            lines = _over_rows(facts, cells, sorted(columns))
            if len({x for x, _ in columns}) < 3 or not lines:
                continue
            unit = facts.columns[columns[0][1]]["unit"]
            told = short(label, 40) + (f", {unit}" if unit else "")
            panels.append(_panel(told, x_label, lines))
            drawn += [name for _, name, _ in lines]
        if panels:
            legend = legend_of(facts, drawn)
            caption = "Mean over seeds; whiskers are one sd."
            figures.append(Figure(f"by-{slug(title)}", title, caption, panels[:_PANELS], legend))
    return figures


def _over_rows(
    facts: Facts, cells: dict[tuple[str, str], Cell], columns: Sequence[tuple[float, str]]
) -> list[tuple[str, str, _Points]]:
    """Return (colour, variant, points) of each row that has at least two numbers."""
    found = []
    for variant in facts.view.variants[:_LINES]:
        known = [(x, cells.get((variant, column))) for x, column in columns]
        points = [(x, c.mean, c.sd) for x, c in known if c and c.valued and c.mean is not None]
        if len(points) > 1:
            found.append((colour(facts, variant), variant, points))
    return found


def _beyond(lines: list[tuple[str, str, _Points]]) -> list[tuple[str, str, _Points]]:
    """Lines so far from all others that these would be flat: told in words."""
    values = {name: [y for _, y, _ in points] for _, name, points in lines}
    apart = off_scale({name: math.fsum(ys) / len(ys) for name, ys in values.items()})
    rest = [y for name, ys in values.items() if name not in apart for y in ys]
    return [
        line
        for line in lines
        if line[1] in apart
        and (max(values[line[1]]) < min(rest) or min(values[line[1]]) > max(rest))
    ]


def _panel(title: str, x_label: str, lines: list[tuple[str, str, _Points]]) -> Markup:
    beyond = _beyond(lines)
    lines = [line for line in lines if line not in beyond]
    xs = [x for _, _, points in lines for x, _, _ in points]
    ends = [y + s * (sd or 0.0) for _, _, points in lines for _, y, sd in points for s in (-1, 1)]
    log = min(xs) > 0 and max(xs) / min(xs) >= 8
    scale = spanning(xs, LEFT, RIGHT, log=log)
    marks = sorted(set(xs))
    crowded = any(scale(b) - scale(a) < 24 for a, b in pairwise(marks))
    panel = Panel(
        title, scale, spanning(ends, 214, 26), marks=None if crowded else marks,
        x_label=short(x_label, 50) + (", log scale" if log else ""),
    )  # fmt: skip
    for i, (shade, name, points) in enumerate(beyond):
        text = f"off the scale: {short(name, 24)}, {points[0][1]:.1f} to {points[-1][1]:.1f}"
        at = panel.y.start - 8 - 16 * i
        end = {"x": RIGHT - 4, "text_anchor": "end"}
        panel.body.append(tag("text", text, y=at, class_=f"edge {shade}", **end))
    for shade, name, points in lines:
        panel.body.append(
            polyline([(panel.x(x), panel.y(y)) for x, y, _ in points], f"line {shade}")
        )
        for x, y, sd in points:
            px = panel.x(x)
            if sd:
                low, high = panel.y(y - sd), panel.y(y + sd)
                panel.body.append(
                    tag("line", x1=px, x2=px, y1=low, y2=high, class_=f"whisker {shade}")
                )
            text = tag("title", f"{short(name)}: {y:.4g} at {x:g}")
            panel.body.append(
                tag("circle", text, cx=px, cy=panel.y(y), r=3.5, class_=f"dot {shade}")
            )
    return panel.svg("; ".join(short(name, 40) for _, name, _ in lines[:8]))

"""Curves over a number: a metric along one setting of the rows, or along numbered metrics."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from reports.display import short, slug
from reports.facts import DONE, Facts
from reports.figures.charts import Figure, colour, legend_of, off_scale, with_unit
from reports.figures.svg import LEFT, PALETTE, RIGHT, Panel, polyline, spanning, tag
from reports.tables.build import metric_cell
from reports.tables.model import Column, Table

#: panels and lines beyond which a figure says nothing more
_PANELS, _LINES = 8, 24
_NUMBERED = re.compile(r"^(.*?)_?([a-z]*?)(\d+)$")
#: what a metric's number counts, by the word beside it in the label: (title, label of the axis)
_COUNTED = {
    "block": ("By encoder depth", "after encoder block, before any norm"),
    "shot": ("By number of labels", "labelled images a class"),
    "k": ("By number of neighbours", "neighbours"),
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
    """Settings of a row's training stages of one seed, flat: "head.queue_size" -> 512."""
    chains = facts.training(variant)
    flat: dict[str, Any] = {}
    for stage in next(iter(chains.values()), []):
        if stage["status"] in DONE:
            _flatten(facts.record(stage["key"]).get("settings") or {}, stage["kind"], flat)
    return flat


def _flatten(data: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(data, dict):
        for name, value in data.items():
            if name != "seed":
                _flatten(value, f"{path}.{name}", into)
    else:
        into[path] = str(data) if isinstance(data, list) else data


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
    """Metrics of one evaluation that differ by a number, a figure for each that is counted: the
    encoder's blocks, labels, neighbours.
    """
    series: dict[tuple[str, str, str], list[tuple[float, str]]] = defaultdict(list)
    for column, row in facts.columns.items():
        match = _NUMBERED.match(str(row["metric"]))
        if match:
            stem, unit, value = match.groups()
            series[row["evaluation"], stem, unit].append((float(value), column))
    figures: dict[str, Figure] = {}
    for (evaluation, stem, _), columns in series.items():
        lines = _over_rows(facts, sorted(columns))
        if len({x for x, _ in columns}) < 3 or not lines:
            continue
        row = facts.columns[columns[0][1]]
        word, rest = _counted(str(row["label"]), columns[0][0])
        label = rest or f"{evaluation}: {stem}".replace("_", " ")
        title, x_label = _COUNTED.get(word, ("By number", word or "number in the metric's name"))
        names = legend_of(facts, [name for _, name, _ in lines])
        figure = figures.setdefault(
            title,
            Figure(f"by-{slug(title)}", title, "Mean over seeds; whiskers are one sd.", [], names),
        )
        told = f"{short(label, 40)}, {row['unit']}" if row["unit"] else short(label, 40)
        figure.panels.append(_panel(told, x_label, lines))
    for figure in figures.values():
        del figure.panels[_PANELS:]
    return list(figures.values())


def _counted(label: str, value: float) -> tuple[str, str]:
    """The word beside a number in a label, and the label without the two."""
    spot = rf"(?:, *)?(?:([a-z]+)[ =]?)?(?<!\d){value:g}(?!\d)(?:-([a-z]+))?"
    found = list(re.finditer(spot, label))
    if not found:
        return "", label
    match = found[-1]
    rest = (label[: match.start()] + label[match.end() :]).strip(" ,")
    while len(rest) > 40 and ", " in rest:  # a panel has no room for more
        rest = rest.rpartition(", ")[0]
    return match.group(1) or match.group(2) or "", rest


def _over_rows(
    facts: Facts, columns: Sequence[tuple[float, str]]
) -> list[tuple[str, str, _Points]]:
    found = []
    for variant in facts.view.variants[:_LINES]:
        cells = [(x, metric_cell(facts, variant, column)) for x, column in columns]
        points = [(x, c.mean, c.sd) for x, c in cells if c.valued and c.mean is not None]
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

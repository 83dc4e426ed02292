"""The report's figures as inline SVG: curves, seeds, accuracy against cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from markupsafe import Markup

from reports.display import middle, plural, short
from reports.facts import Facts
from reports.figures.svg import PALETTE, Point, Scale, Series, line, plot, polyline, words
from reports.tables.model import Column, Table, number

#: lines in one panel, points in one line, rows in one panel: a picture with more gets heavier,
#: not clearer
_LINES, _POINTS, _ROWS = 60, 80, 40
_STAGES = {"mae": "MAE", "head": "head", "tune": "tuning"}


@dataclass
class Figure:
    """Panels under one caption; `legend` is (colour class, text)."""

    id: str
    title: str
    caption: str
    panels: list[Markup]
    legend: list[tuple[str, str]]
    wide: bool = False


def colour(facts: Facts, variant: str) -> str:
    """Return the class that gives a variant its colour, the same in every figure."""
    return f"c{facts.view.variants.index(variant) % PALETTE}"


def legend_of(facts: Facts, variants: Collection[str]) -> list[tuple[str, str]]:
    """Return (colour class, label) of the first 24 variants, in row order."""
    ordered = [v for v in facts.view.variants if v in variants]
    return [(colour(facts, v), middle(v)) for v in ordered[:24]]


# ------------------------------------------------------------------------------ training curves


def curves(facts: Facts) -> Figure | None:
    """Return the loss and every other logged column against the step, one panel a kind of stage."""
    panels: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, columns in facts.view.curves.items():
        if key in facts.stages and len(columns.get("step", [])) > 1:
            for name, values in columns.items():
                if name not in ("step", "lr") and any(map(math.isfinite, values)):
                    panels[name, facts.stages[key]["kind"]].append(key)
    order = {kind: i for i, kind in enumerate(_STAGES)}
    chosen = sorted(panels, key=lambda p: (p[0] != "loss", p[0], order.get(p[1], 9)))
    shown = {facts.stages[key]["variant"] for keys in panels.values() for key in keys[:_LINES]}
    figure = Figure(
        "curves",
        "Training",
        "Training curves, one line a seed, over long runs means of "
        "neighbouring steps. A stage that rows share has the colour of the first of them.",
        [_curve_panel(facts, kind, name, panels[name, kind]) for name, kind in chosen],
        legend_of(facts, shown),
    )
    return figure if panels else None


def _curve_panel(facts: Facts, kind: str, name: str, keys: list[str]) -> Markup:
    series = []
    for key in keys[:_LINES]:
        stage, columns = facts.stages[key], facts.view.curves[key]
        points = zip(columns["step"], columns[name], strict=False)
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        label = f"{short(stage['variant'])}, seed {stage['seed']}"
        series.append(Series(colour(facts, stage["variant"]), label, smoothed(finite), dots=False))
    ys = [point.y for one in series for point in one.points]
    # a loss that falls far at first would be a corner and a flat line on a linear axis
    log = name == "loss" and min(ys) > 0 and max(ys) / min(ys) > 4
    what = short(name, 30).replace("_", " ").replace("neighbor", "neighbour")
    trained = _STAGES.get(kind, short(kind, 20).replace("_", " "))
    title = f"{trained}: {what}{', log scale' if log else ''}"
    more = f" The first {_LINES} of {len(keys):,} are drawn." if len(keys) > _LINES else ""
    said = f"{plural(len(series), 'line')} against the step.{more}"
    return plot(title, series, said, x_label="step", log_y=log)


def smoothed(points: list[tuple[float, float]]) -> list[Point]:
    """Return means of as many consecutive points as leave no more than `_POINTS`."""
    size = max(1, math.ceil(len(points) / _POINTS))
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [Point(*(sum(along) / len(part) for along in zip(*part, strict=True))) for part in parts]


# --------------------------------------------------------------------------------- metric by seed


def by_seed(facts: Facts, table: Table) -> Figure | None:
    """Return a dot a seed and a tick at the mean, rows below each other, one panel a metric."""
    rows = [r.variant for r in table.rows][:_ROWS]
    drawn = [c for c in table.metrics if any(table.cells[v, c.id].valued for v in rows)]
    caption = "Each dot is one seed, the bar their mean; an arrow stands for a row off the scale."
    if len(rows) < len(table.rows):
        caption += f" The first {len(rows)} of {len(table.rows):,} rows are drawn."
    panels = [_seed_panel(facts, table, column, rows) for column in drawn]
    return Figure("seeds", "Metric by seed", caption, panels, []) if panels else None


def _seed_panel(facts: Facts, table: Table, column: Column, rows: list[str]) -> Markup:
    cells = {v: table.cells[v, column.id] for v in rows}
    means = {v: c.mean for v, c in cells.items() if c.valued and c.mean is not None}
    apart = off_scale(means)
    series = []
    for i, (variant, cell) in enumerate(cells.items()):
        if variant in means and variant not in apart:
            points = []
            for value in cell.values:
                seeds = "all seeds" if cell.fixed else f"seed {value.seeds[0]}"
                text = f"{short(variant)}, {seeds}: {value.value:.{column.digits}f}"
                points.append(Point(value.value, i, text=text))
            series.append(Series(colour(facts, variant), variant, points, line=False))

    def middles(x: Scale, y: Scale) -> list[Markup]:
        """Return the bar at each row's mean; of a row off the scale an arrow and its number."""
        found = []
        for i, (variant, cell) in enumerate(cells.items()):
            css, at = colour(facts, variant), y(i)
            if variant not in means:
                continue
            if variant not in apart:
                mean = x(means[variant])
                found.append(line(mean, mean, at - 8, at + 8, f"mean {css}"))
            elif means[variant] < x.low:
                text = f"◂ {number(cell, column)}"
                found.append(words(text, x.start + 4, at + 4, f"edge {css}", "start"))
            else:
                text = f"{number(cell, column)} ▸"
                found.append(words(text, x.end - 4, at + 4, f"edge {css}", "end"))
        return found

    said = "; ".join(f"{short(v)} {number(cells[v], column)}" for v in means)
    labels = [middle(label, 28) for label in told_apart(rows)]
    return plot(with_unit(column), series, said, categories=labels, under=middles)


def told_apart(names: Sequence[str]) -> list[str]:
    """Return the names, those too long without the words that they all begin with."""
    long = [name.split()[:-1] for name in names if len(name) > 28]
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*long, strict=False))
    shared = len(list(alike)) if len(long) > 1 else 0
    return [" ".join(name.split()[shared:]) if len(name) > 28 else name for name in names]


def off_scale(means: dict[str, float]) -> set[str]:
    """Return rows so far from the rest that they would leave it no room.

    Each alone stretches the range of the others more than two and a half times. Three rows are
    always left.
    """
    ordered = sorted(means, key=lambda variant: means[variant])
    found: set[str] = set()
    while len(ordered) > 3:
        span = means[ordered[-1]] - means[ordered[0]]
        low, high = means[ordered[-1]] - means[ordered[1]], means[ordered[-2]] - means[ordered[0]]
        if span <= 2.5 * min(low, high):
            break
        found.add(ordered.pop(0 if low < high else -1))
    return found


def with_unit(column: Column) -> str:
    """Return the column's label with its unit, unless it ends with the unit."""
    label = short(column.label, 40)
    told = not column.unit or label.endswith(column.unit)  # "10%" says it already
    return label if told else f"{label}, {column.unit}"


# --------------------------------------------------------------------------- accuracy against cost


def pareto(facts: Facts, table: Table) -> Figure | None:
    """Return metrics against cumulative training cost, with the rows that none beats on both."""
    cost = next((c for c in table.columns if c.id == "cost.total"), None)
    if cost is None:
        return None
    panels: list[Markup] = []
    shown: list[str] = []
    for column in table.metrics[:6]:
        points = {}
        for row in table.rows:
            x, y = table.cell(row, cost), table.cell(row, column)
            if not (x.valued and y.valued) or x.mean is None or y.mean is None:
                continue
            if 1e-9 < x.mean < 1e12:  # a cost beyond is none of a stage that ran
                text = f"{y.mean:.{column.digits}f} {column.unit} at {x.mean:.3g} {cost.unit}"
                said = f"{short(row.variant)}: {text}"
                points[row.variant] = Point(x.mean, y.mean, y.sd, said)
        if len(points) > 1:
            panels.append(_pareto_panel(facts, points, column, cost))
            shown += points
    caption = (
        f"Mean over seeds against the training cost of one seed, ancestors included ({cost.unit}); "
        "whiskers are one sd. The line joins the rows that no other row beats on both. Rows that "
        "train nothing are left out."
    )
    legend = legend_of(facts, shown)
    return Figure("pareto", "Accuracy against cost", caption, panels, legend) if panels else None


def front(points: dict[str, Point], higher_is_better: bool) -> list[str]:
    """Return the names of the points (cost, value) that no cheaper or equally dear one reaches."""
    sign = -1.0 if higher_is_better else 1.0
    best, found = math.inf, []
    for name, point in sorted(points.items(), key=lambda p: (p[1].x, sign * p[1].y)):
        if sign * point.y < best:
            best = sign * point.y
            found.append(name)
    return found


def _pareto_panel(facts: Facts, points: dict[str, Point], column: Column, cost: Column) -> Markup:
    costs = [point.x for point in points.values()]
    names = front(points, column.higher_is_better)

    def steps(x: Scale, y: Scale) -> list[Markup]:
        """Return the line through the front, in steps."""
        at = [(x(points[name].x), y(points[name].y)) for name in names]
        corners = [
            corner for (_, low), (b, high) in pairwise(at) for corner in ((b, low), (b, high))
        ]
        return [polyline([*at[:1], *corners], "front")]

    series = [Series(colour(facts, v), v, [point], line=False) for v, point in points.items()]
    said = "On the front: " + ", ".join(short(name) for name in names)
    log = max(costs) / min(costs) > 8
    return plot(with_unit(column), series, said, x_label=cost.unit, log_x=log, under=steps)

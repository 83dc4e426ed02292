"""The report's figures as inline SVG: curves, seeds, accuracy against cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from markupsafe import Markup

from reports.display import middle, plural, short
from reports.facts import Facts
from reports.figures.svg import PALETTE, Point, Scale, Series, line, plot, polyline, words
from reports.tables.model import Cell, Column, Table, number

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


def legend_of(facts: Facts, variants: Sequence[str]) -> list[tuple[str, str]]:
    """Return (colour class, label) of the first 24 variants, in row order."""
    ordered = [v for v in facts.view.variants if v in variants]
    return [(colour(facts, v), middle(v)) for v in ordered[:24]]


# ------------------------------------------------------------------------------ training curves


def curves(facts: Facts) -> Figure | None:
    """Return the loss and every other logged column against the step, one panel a kind of stage."""
    panels: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, columns in facts.view.curves.items():
        stage = facts.stages.get(key)
        if stage is None or len(columns.get("step", [])) < 2:
            continue
        for name, values in columns.items():
            if name not in ("step", "lr") and any(math.isfinite(v) for v in values):
                panels[stage["kind"], name].append(key)
    if not panels:
        return None
    order = {kind: i for i, kind in enumerate(_STAGES)}
    chosen = sorted(
        panels.items(), key=lambda p: (p[0][1] != "loss", p[0][1], order.get(p[0][0], 9))
    )
    shown = {facts.stages[key]["variant"] for _, keys in chosen for key in keys[:_LINES]}
    return Figure(
        "curves",
        "Training",
        "Training curves, one line a seed, over long runs means of "
        "neighbouring steps. A stage that rows share has the colour of the first of them.",
        [_curve_panel(facts, kind, name, keys) for (kind, name), keys in chosen],
        legend_of(facts, list(shown)),
    )


def _curve_panel(facts: Facts, kind: str, name: str, keys: list[str]) -> Markup:
    series = []
    for key in keys[:_LINES]:
        stage, columns = facts.stages[key], facts.view.curves[key]
        points = zip(columns["step"], columns[name], strict=False)
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        label = f"{short(stage['variant'])}, seed {stage['seed']}"
        smooth = [Point(x, y) for x, y in smoothed(finite)]
        series.append(Series(colour(facts, stage["variant"]), label, smooth, dots=False))
    ys = [point.y for one in series for point in one.points]
    # a loss that falls far at first would be a corner and a flat line on a linear axis
    log = name == "loss" and min(ys) > 0 and max(ys) / min(ys) > 4
    title = f"{_STAGES.get(kind, short(kind, 20))}: {_readable(name)}{', log scale' if log else ''}"
    more = f" The first {_LINES} of {len(keys):,} are drawn." if len(keys) > _LINES else ""
    said = f"{plural(len(series), 'line')} against the step.{more}"
    return plot(title, series, said, x_label="step", log_y=log)


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of as many consecutive points as leave no more than `_POINTS`."""
    size = max(1, math.ceil(len(points) / _POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _readable(name: str) -> str:
    """Return a logged column's name in words."""
    return short(name, 30).replace("_", " ").replace("neighbor", "neighbour")


# --------------------------------------------------------------------------------- metric by seed


def by_seed(facts: Facts, table: Table) -> Figure | None:
    """Return a dot a seed and a tick at the mean, rows below each other, one panel a metric."""
    metrics = [c for c in table.columns if c.kind == "metric"]
    rows = [r.variant for r in table.rows][:_ROWS]
    drawn = [c for c in metrics if any(table.cells[v, c.id].valued for v in rows)]
    if not drawn:
        return None
    caption = "Each dot is one seed, the bar their mean; an arrow stands for a row off the scale."
    if len(rows) < len(table.rows):
        caption += f" The first {len(rows)} of {len(table.rows):,} rows are drawn."
    panels = [_seed_panel(facts, table, column, rows) for column in drawn]
    return Figure("seeds", "Metric by seed", caption, panels, [])


def _seed_panel(facts: Facts, table: Table, column: Column, rows: list[str]) -> Markup:
    cells = {v: table.cells[v, column.id] for v in rows}
    means = {v: c.mean for v, c in cells.items() if c.valued and c.mean is not None}
    apart = off_scale(means)
    series = [
        Series(colour(facts, variant), variant, _seeds(variant, i, cell, column), line=False)
        for i, (variant, cell) in enumerate(cells.items())
        if variant in means and variant not in apart
    ]

    def middles(x: Scale, y: Scale) -> list[Markup]:
        """Return the bar at each row's mean; of a row off the scale an arrow at the edge."""
        found = []
        for i, variant in enumerate(rows):
            css = colour(facts, variant)
            if variant in apart:
                found.append(_edge(cells[variant], column, x, y(i), css))
            elif variant in means:
                mean = x(means[variant])
                found.append(line(mean, mean, y(i) - 8, y(i) + 8, f"mean {css}"))
        return found

    said = "; ".join(f"{short(v)} {number(cells[v], column)}" for v in means)
    labels = [middle(label, 28) for label in told_apart(rows)]
    return plot(with_unit(column), series, said, categories=labels, under=middles)


def _seeds(variant: str, at: int, cell: Cell, column: Column) -> list[Point]:
    """Return a point a seed in the row `at`."""
    found = []
    for value in cell.values:
        seeds = "all seeds" if cell.fixed else f"seed {value.seeds[0]}"
        text = f"{short(variant)}, {seeds}: {value.value:.{column.digits}f}"
        found.append(Point(value.value, at, text=text))
    return found


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


def _edge(cell: Cell, column: Column, x: Scale, at: float, shade: str) -> Markup:
    """Return the mark of a row off the scale: an arrow at the panel's edge, and its number."""
    assert cell.mean is not None
    left = cell.mean < x.low
    text = f"◂ {number(cell, column)}" if left else f"{number(cell, column)} ▸"
    edge, anchor = (x.start + 4, "start") if left else (x.end - 4, "end")
    return words(text, edge, at + 4, f"edge {shade}", anchor)


def with_unit(column: Column) -> str:
    """Return the column's label with its unit, unless it ends with the unit."""
    label = short(column.label, 40)
    told = not column.unit or label.endswith(column.unit)  # "10%" says it already
    return label if told else f"{label}, {column.unit}"


# --------------------------------------------------------------------------- accuracy against cost


def pareto(facts: Facts, table: Table) -> Figure | None:
    """Return metrics against cumulative training cost, with the rows that none beats on both."""
    cost = next((c for c in table.columns if c.id == "cost.total"), None)
    metrics = [c for c in table.columns if c.kind == "metric"][:6]
    if cost is None:
        return None
    panels: list[Markup] = []
    shown: list[str] = []
    for column in metrics:
        points = {}
        for row in table.rows:
            x, y = table.cell(row, cost), table.cell(row, column)
            # a cost beyond is none of a stage that ran
            usual = x.valued and x.mean is not None and 1e-9 < x.mean < 1e12
            if usual and y.valued and x.mean is not None and y.mean is not None:
                text = f"{y.mean:.{column.digits}f} {column.unit} at {x.mean:.3g} {cost.unit}"
                said = f"{short(row.variant)}: {text}"
                points[row.variant] = Point(x.mean, y.mean, y.sd, said)
        if len(points) > 1:
            panels.append(_pareto_panel(facts, points, column, cost))
            shown += points
    if not panels:
        return None
    caption = (
        f"Mean over seeds against the training cost of one seed, ancestors included ({cost.unit}); "
        "whiskers are one sd. The line joins the rows that no other row beats on both. Rows that "
        "train nothing are left out."
    )
    return Figure("pareto", "Accuracy against cost", caption, panels, legend_of(facts, shown))


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
        corners: list[tuple[float, float]] = []
        for point in (points[name] for name in names):
            corners += [(point.x, corners[-1][1])] if corners else []
            corners.append((point.x, point.y))
        return [polyline([(x(a), y(b)) for a, b in corners], "front")]

    series = [Series(colour(facts, v), v, [point], line=False) for v, point in points.items()]
    said = "On the front: " + ", ".join(short(name) for name in names)
    log = max(costs) / min(costs) > 8
    return plot(with_unit(column), series, said, x_label=cost.unit, log_x=log, under=steps)

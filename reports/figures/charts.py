"""The report's figures as data: curves, seeds, accuracy against cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise, takewhile

from reports.display import middle, plural, short
from reports.figures.model import Figure, Note, Panel, Point, Series, figure
from reports.figures.palette import PLAIN, looks
from reports.frames import SuiteView
from reports.tables.model import Column, Table, number

#: lines in one panel, points in one line, rows in one panel: a picture with more gets heavier,
#: not clearer
_LINES, _POINTS, _ROWS = 60, 80, 40
_STAGES = {"mae": "MAE", "head": "head", "tune": "tuning"}


def legend_of(view: SuiteView, variants: Collection[str]) -> list[tuple[int, str]]:
    """Return (look, label) of the first 24 variants, in row order."""
    numbers = looks(view.variants)
    return [(numbers[v], middle(v)) for v in view.variants if v in variants][:24]


# ------------------------------------------------------------------------------ training curves


def curves(view: SuiteView) -> Figure | None:
    """Return the loss and every other logged column against the step, one panel a kind of stage."""
    panels: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, columns in view.curves.items():
        if key in view.by_key and len(columns["step"]) > 1:
            for name, values in columns.items():
                if name not in ("step", "lr") and any(map(math.isfinite, values)):
                    panels[name, view.by_key[key]["kind"]].append(key)
    order = {kind: i for i, kind in enumerate(_STAGES)}
    chosen = sorted(panels, key=lambda p: (p[0] != "loss", p[0], order.get(p[1], 9)))
    shown = {view.by_key[key]["variant"] for keys in panels.values() for key in keys[:_LINES]}
    return figure(
        "curves",
        "Training",
        "Training curves, one line a seed, over long runs means of "
        "neighbouring steps. A stage that rows share has the look of the first of them.",
        (_curve_panel(view, kind, name, panels[name, kind]) for name, kind in chosen),
        legend_of(view, shown),
        folded=True,
    )


def _curve_panel(view: SuiteView, kind: str, name: str, keys: list[str]) -> Panel:
    series, numbers = [], looks(view.variants)
    for key in keys[:_LINES]:
        stage, columns = view.by_key[key], view.curves[key]
        points = zip(columns["step"], columns[name], strict=True)
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        label, look = f"{short(stage['variant'])}, seed {stage['seed']}", numbers[stage["variant"]]
        series.append(Series(look, label, smoothed(finite), dots=False, width=1.2))
    ys = [point.y for one in series for point in one.points]
    # a loss that falls far at first would be a corner and a flat line on a linear axis
    log = name == "loss" and min(ys) > 0 and max(ys) / min(ys) > 4
    what = short(name, 30).replace("_", " ").replace("neighbor", "neighbour")
    trained = _STAGES.get(kind, short(kind, 20).replace("_", " "))
    title = f"{trained}: {what}"
    more = f" The first {_LINES} of {len(keys):,} are drawn." if len(keys) > _LINES else ""
    said = f"{plural(len(series), 'line')} against the step.{more}"
    return Panel(title, series, said, "step", what, log_y=log)


def smoothed(points: list[tuple[float, float]]) -> list[Point]:
    """Return means of as many consecutive points as leave no more than `_POINTS`."""
    size = max(1, math.ceil(len(points) / _POINTS))
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [Point(*(sum(along) / len(part) for along in zip(*part, strict=True))) for part in parts]


# --------------------------------------------------------------------------------- metric by seed


def by_seed(view: SuiteView, table: Table) -> Figure | None:
    """Return a dot a seed and a tick at the mean, rows below each other, one panel a metric."""
    rows = [r.variant for r in table.rows][:_ROWS]
    drawn = [c for c in table.metrics if any(table.cells[v, c.id].valued for v in rows)]
    caption = "Each dot is one seed, the bar their mean; an arrow stands for a row off the scale."
    if len(rows) < len(table.rows):
        caption += f" The first {len(rows)} of {len(table.rows):,} rows are drawn."
    panels = (_seed_panel(view, table, column, rows) for column in drawn)
    return figure("seeds", "Metric by seed", caption, panels, [])


def _seed_panel(view: SuiteView, table: Table, column: Column, rows: list[str]) -> Panel:
    cells = {v: table.cells[v, column.id] for v in rows}
    means = {v: c.mean for v, c in cells.items() if c.valued and c.mean is not None}
    apart, numbers = off_scale(means), looks(view.variants)
    lowest = min((mean for v, mean in means.items() if v not in apart), default=0.0)
    series, notes = [], []
    for i, (variant, cell) in enumerate(cells.items()):
        if variant in apart:
            above, text = means[variant] > lowest, number(cell, column)
            notes.append(Note(f"{text} ▸" if above else f"◂ {text}", above, i))
        elif variant in means:
            points = []
            for value in cell.values:
                seeds = "all seeds" if cell.fixed else f"seed {value.seeds[0]}"
                text = f"{short(variant)}, {seeds}: {value.value:.{column.digits}f}"
                points.append(Point(value.value, i, text=text))
            series.append(Series(numbers[variant], variant, points, line=False))
            bar = [Point(means[variant], i + end) for end in (-0.34, 0.34)]
            series.append(Series(numbers[variant], "mean", bar, dots=False, width=2, dash=""))
    said = "; ".join(f"{short(v)} {number(cells[v], column)}" for v in means)
    labels = [middle(label, 28) for label in told_apart(rows)]
    label = with_unit(column)
    return Panel("", series, said, label, categories=labels, notes=notes)


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


def pareto(view: SuiteView, table: Table) -> Figure | None:
    """Return metrics against cumulative training cost, with the rows that none beats on both."""
    cost = next((c for c in table.columns if c.id == "cost.total"), None)
    if cost is None:
        return None
    panels: list[Panel] = []
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
            panels.append(_pareto_panel(view, points, column, cost))
            shown += points
    caption = (
        f"Mean over seeds against the training cost of one seed, ancestors included ({cost.unit}); "
        "whiskers are one sd. The line joins the rows that no other row beats on both. Rows that "
        "train nothing are left out."
    )
    return figure("pareto", "Accuracy against cost", caption, panels, legend_of(view, shown))


def front(points: dict[str, Point], higher_is_better: bool) -> list[str]:
    """Return the names of the points (cost, value) that no cheaper or equally dear one reaches."""
    sign = -1.0 if higher_is_better else 1.0
    best, found = math.inf, []
    for name, point in sorted(points.items(), key=lambda p: (p[1].x, sign * p[1].y)):
        if sign * point.y < best:
            best = sign * point.y
            found.append(name)
    return found


def _pareto_panel(view: SuiteView, points: dict[str, Point], column: Column, cost: Column) -> Panel:
    costs = [point.x for point in points.values()]
    names, numbers = front(points, column.higher_is_better), looks(view.variants)
    at = [points[name] for name in names]
    corners = [Point(b.x, level) for a, b in pairwise(at) for level in (a.y, b.y)]
    series = [Series(PLAIN, "front", [*at[:1], *corners], dots=False, width=1, dash="4 3")]
    series += [Series(numbers[v], v, [point], line=False) for v, point in points.items()]
    said = "On the front: " + ", ".join(short(name) for name in names)
    log = max(costs) / min(costs) > 8
    x_label = f"training cost of a seed, {cost.unit}"
    return Panel("", series, said, x_label, with_unit(column), log_x=log)

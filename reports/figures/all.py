"""The figures of a suite, in the order of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reports.figures import along, charts
from reports.figures.model import Figure
from reports.figures.timeline import timeline
from reports.frames import SuiteView
from reports.tables.model import Table


def all_figures(view: SuiteView, tables: Sequence[Table]) -> list[Figure]:
    """Return figures of each table, then those of the run; what two tables share is drawn once.

    A figure bears the number of its table, but for those of the first one.
    """
    found: list[Figure | None] = []
    drawn: list[tuple[list[str], list[str]]] = []
    for i, table in enumerate(tables, 1):
        what = [row.variant for row in table.rows], [column.id for column in table.metrics]
        for make in (along.ablation, charts.pareto, charts.by_seed) if what not in drawn else ():
            figure = make(view, table)
            if figure is not None and i > 1:
                title = f"{figure.title}, table {i}"
                figure = replace(figure, id=f"{figure.id}-{i}", title=title)
            found.append(figure)
        drawn.append(what)
    printed = {column.id for table in tables for column in table.metrics}
    found += [*along.by_number(view, printed), charts.curves(view), timeline(view)]
    return [figure for figure in found if figure is not None]

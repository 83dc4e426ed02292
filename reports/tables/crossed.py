"""The cells of a grid as papers print ablations: one setting down, the others across."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from reports.display import short
from reports.frames import SuiteView
from reports.tables.model import Row, Table

#: columns of a metric beyond which nothing is easier to read so
_MOST_COLUMNS = 8


def cross(view: SuiteView, table: Table) -> list[Table]:
    """Return a table for each metric of `table`, if its cells are all combinations of settings.

    The setting of the most values goes down. The cells are those of `table`.
    """
    cells = {row.variant: view.cells.get(row.variant, {}) for row in table.rows}
    cells = {variant: settings for variant, settings in cells.items() if settings}
    axes: dict[str, dict[str, None]] = {}
    for settings in cells.values():
        for name, value in settings.items():
            axes.setdefault(name, {})[value] = None
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    if len(axes) < 2:
        return []
    down = max(axes, key=lambda name: len(axes[name]))
    across = [name for name in axes if name != down]
    variants = {tuple(s.get(name) for name in (down, *across)): v for v, s in cells.items()}
    combinations = list(product(*(axes[name] for name in across)))
    whole = set(variants) == {(value, *names) for value in axes[down] for names in combinations}
    if not whole or len(cells) > _MOST_COLUMNS * len(axes[down]):
        return []
    group = " × ".join(short(name, 30) for name in across)
    tables = []
    for metric in table.metrics:
        columns = [
            replace(metric, id="\n".join(names), label=", ".join(names), group=group)
            for names in combinations
        ]
        origins = {
            (value, column.id): (variants[value, *names], metric.id)
            for value in axes[down]
            for column, names in zip(columns, combinations, strict=True)
        }
        crossed = Table(
            title=f"{metric.label} by {down} and {', '.join(across)}",
            corner=down,
            rows=[Row(value) for value in axes[down]],
            columns=columns,
            cells={at: table.cells[origin] for at, origin in origins.items()},
            origins=origins,
        )
        tables.append(crossed)
    return tables

"""The cells of a grid as papers print ablations: one setting down, the others across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from reports.display import short
from reports.facts import Facts
from reports.tables.model import Row, Table

#: columns of a metric beyond which nothing is easier to read so
_MOST_COLUMNS = 8


def cross(facts: Facts, table: Table) -> list[Table]:
    """A table for each metric of `table`, if its cells are all combinations of several settings.

    The setting of the most values goes down. The cells are those of `table`.
    """
    cells = {row.variant: facts.view.cells.get(row.variant, {}) for row in table.rows}
    cells = {variant: settings for variant, settings in cells.items() if settings}
    axes: dict[str, dict[str, None]] = {}
    for settings in cells.values():
        for name, value in settings.items():
            axes.setdefault(name, {})[value] = None
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    found = {tuple(settings.get(name) for name in axes) for settings in cells.values()}
    if len(axes) < 2 or found != set(product(*axes.values())):
        return []
    down = max(axes, key=lambda name: len(axes[name]))
    across = [name for name in axes if name != down]
    if len(cells) > _MOST_COLUMNS * len(axes[down]):
        return []
    variants = {tuple(s[name] for name in (down, *across)): v for v, s in cells.items()}
    combinations = list(product(*(axes[name] for name in across)))
    return [
        _crossed(table, column_id, down, across, list(axes[down]), combinations, variants)
        for column_id in [column.id for column in table.columns if column.kind == "metric"]
    ]


def _crossed(
    table: Table,
    column_id: str,
    down: str,
    across: Sequence[str],
    values: Sequence[str],
    combinations: Sequence[tuple[str, ...]],
    variants: dict[tuple[str, ...], str],
) -> Table:
    metric = next(column for column in table.columns if column.id == column_id)
    group = " × ".join(short(name, 30) for name in across)
    columns = [
        replace(metric, id="\n".join(names), label=", ".join(names), group=group)
        for names in combinations
    ]
    origins = {
        (value, column.id): (variants[value, *names], column_id)
        for value in values
        for column, names in zip(columns, combinations, strict=True)
    }
    return Table(
        title=f"{metric.label} by {down} and {', '.join(across)}",
        corner=down,
        rows=[Row(value) for value in values],
        columns=columns,
        cells={at: table.cells[origin] for at, origin in origins.items()},
        baseline=table.baseline,
        seeds=table.seeds,
        origins=origins,
    )

"""The search that a suite declares: cells over settings, each a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from math import inf, prod
from typing import Any

import numpy as np

from bench.errors import short
from bench.suite.messages import Place, fault, require, shown
from bench.suite.schema import Choice, Choices, SearchSettings
from bench.suite.yamlfile import Map
from maect.streams import Stream

#: more cells than this are a slip of the keyboard
MAX_CELLS = 1000
#: cells that `random` draws from
MAX_DRAWN_FROM = 100_000


def cells_of(search: SearchSettings, variants: Collection[str], tree: Map) -> dict[str, Choices]:
    """Return the search's cells: row label to its settings, in the grid's order.

    Raises `UserError` with the place in the suite's `tree`.
    """
    several, at = search.variants, ("search", "variant")
    for index, name in enumerate(several):
        require(name, variants, "variant", tree, at if len(several) == 1 else (*at, index))
        if name in several[:index]:
            raise fault(f"'{name}' stands twice; keep one", tree, (*at, index))
    where = ("search", "grid")
    # from the tree, whose mappings know their lines
    axes = {}
    if len(several) > 1:
        axes["variant"] = [Choice(name, name) for name in several]
    ranges = dict[str, list[Choice]]()
    for path, values in tree["search"]["grid"].items():
        if isinstance(values, dict) and [*values] == ["loguniform"]:
            ranges[path] = _drawn(search, path, values["loguniform"], tree, (*where, path))
        else:
            axes[path] = _axis(path, values, tree, (*where, path))
    total = prod(map(len, axes.values()))
    most = MAX_DRAWN_FROM if search.method == "random" else MAX_CELLS
    if search.method != "each" and total > most:
        raise fault(f"the grid has more than {most} cells; write fewer", tree, where)
    possible = MAX_CELLS if ranges else min(total, MAX_CELLS)
    if (search.samples or 0) > possible:
        message = f"samples {search.samples} is more than the {possible} cells"
        raise fault(f"{message} there can be", tree, ("search", "samples"))
    names = setting_names([*axes, *ranges])
    found = {}
    for cell in _cells(search, axes, total, ranges):
        settings = [f"{names[p]}={choice.name}" for p, choice in cell.items() if p != "variant"]
        found[" ".join([varied_by(cell, search), *settings])] = cell
    for label in found:
        if label in variants:
            message = f"a cell of the search is named '{label}' too; rename this variant"
            raise fault(message, tree, ("variants", label))
    return found


def varied_by(cell: Choices, search: SearchSettings) -> str:
    """Return the variant that a cell of the search varies."""
    return cell["variant"].name if "variant" in cell else search.variants[0]


def _axis(path: str, values: Any, tree: Map, at: Place) -> list[Choice]:
    """Return the values of one setting, checked as far as the setting itself does not."""
    if path == "variant":
        raise fault("write the variants to vary as 'search: {variant: [...]}'", tree, at)
    if not values or not isinstance(values, list | dict) or not all(path.split(".")):
        message = f"'{short(path)}' should name a setting and list values, e.g. [1, 2]"
        raise fault(message, tree, at)
    named, choices = isinstance(values, dict), list[Choice]()
    for place, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict) and not named:
            problem = "a mapping needs a name; write {name: {...}, other: {...}}"
        elif value in [choice.value for choice in choices]:
            problem = f"{shown(value)} stands twice; keep one"
        elif path == "augment" and not isinstance(value, str):
            problem = f"{shown(value)} is no pipeline; write the names of pipelines"
        else:
            name = str(place) if named else value if isinstance(value, str) else shown(value)
            choices.append(Choice(name, value))
            continue
        raise fault(problem, tree, (*at, place))
    return choices


def _drawn(search: SearchSettings, path: str, bounds: Any, tree: Map, at: Place) -> list[Choice]:
    """Return the values of one setting by sample, drawn evenly on a logarithmic scale."""
    match bounds:
        case _ if search.method != "random":
            problem = f"a range is drawn from by method 'random'; list values for '{search.method}'"
        case [int() | float() as least, int() | float() as most] if 0 < least < most < inf:
            each = np.arange(min(search.samples or 0, MAX_CELLS))
            draws = Stream(search.seed, "search", path).uniform(0, each, 1)[:, 0].tolist()
            values = [float(f"{least * (most / least) ** draw:.4g}") for draw in draws]
            return [Choice(shown(value), value) for value in values]
        case _:
            problem = "loguniform takes two numbers above 0 in order, e.g. [1e-4, 1e-1]"
    raise fault(problem, tree, at)


def setting_names(axes: Collection[str]) -> dict[str, str]:
    """Return settings by the last part of their path, or all of it where that is not unique."""
    last = [path.split(".")[-1] for path in axes]
    return {
        path: name if last.count(name) == 1 else path for path, name in zip(axes, last, strict=True)
    }


def _cells(
    search: SearchSettings,
    axes: dict[str, list[Choice]],
    total: int,
    ranges: dict[str, list[Choice]],
) -> list[Choices]:
    """Return the cells of `axes`; of all combinations the last setting varies fastest.

    With `ranges`, whose values are given by sample, a combination may stand in several cells.
    """
    if search.method == "each":
        rows = [{"variant": variant} for variant in axes.pop("variant", [])] or [{}]
        return [row | {p: c} for row in rows for p, choices in axes.items() for c in choices]
    wanted: Sequence[int] = range(total)
    if search.method == "random":
        wanted = [*Stream(search.seed, "search", "cells").permutation(0, total)[: search.samples]]
    combined = [dict(zip(axes, cell, strict=True)) for cell in product(*axes.values())]
    if not ranges:
        return [combined[number] for number in sorted(wanted)]
    drawn = (
        dict(zip(ranges, values, strict=True)) for values in zip(*ranges.values(), strict=True)
    )
    return [combined[wanted[n % total]] | values for n, values in enumerate(drawn)]

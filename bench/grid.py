"""The search that a suite declares: a grid over settings, each cell a row."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Annotated, Any

from pydantic import Field

from bench.errors import short, suggestion
from bench.explain import fault, shown
from bench.yamlfile import Map
from maect.settings import Settings

#: more cells than this are a slip of the keyboard
MAX_CELLS = 1000


class SearchSettings(Settings):
    """A search over settings, run by `python -m bench sweep`: each cell becomes a row."""

    #: the variant that the cells vary; it is no row itself
    variant: str
    #: dotted setting (or `augment`) to the values it takes; every combination is run
    grid: Annotated[dict[str, list[Any]], Field(min_length=1)]


def cells(
    search: SearchSettings | None, variants: Iterable[str], tree: Map
) -> dict[str, dict[str, Any]]:
    """Every cell of the search's grid: row label to its settings, in the grid's order.

    Raises `UserError` with the place in the suite's `tree`.
    """
    if search is None:
        return {}
    if search.variant not in variants:
        message = f"there is no variant '{short(search.variant)}'"
        raise fault(message + suggestion(search.variant, variants), tree, ("search", "variant"))
    where = ("search", "grid")
    for path, values in search.grid.items():
        _check_axis(path, values, tree, (*where, path))
    if prod(len(values) for values in search.grid.values()) > MAX_CELLS:
        raise fault(f"the grid has more than {MAX_CELLS} cells; write fewer", tree, where)
    found = _expand(search)
    for label in found:
        if label in variants:
            message = f"a cell of the search is named '{label}' too; rename this variant"
            raise fault(message, tree, ("variants", label))
    return found


def _check_axis(path: str, values: list[Any], tree: Map, at: tuple[Any, ...]) -> None:
    if not values or not all(path.split(".")):
        message = f"'{short(path)}' should name a setting and list values, e.g. [1, 2]"
        raise fault(message, tree, at)
    for index, value in enumerate(values):
        if value in values[:index]:
            raise fault(f"{shown(value)} stands twice; keep one", tree, (*at, index))
        if path == "augment" and not isinstance(value, str):
            message = f"{shown(value)} is no pipeline; write the names of pipelines"
            raise fault(message, tree, (*at, index))


def _expand(search: SearchSettings) -> dict[str, dict[str, Any]]:
    last = [path.split(".")[-1] for path in search.grid]
    names = {
        path: name if last.count(name) == 1 else path
        for path, name in zip(search.grid, last, strict=True)
    }
    found: list[dict[str, Any]] = [{}]
    for path, values in search.grid.items():
        found = [cell | {path: value} for cell in found for value in values]
    return {
        " ".join(
            [search.variant, *(f"{names[path]}={value}" for path, value in cell.items())]
        ): cell
        for cell in found
    }

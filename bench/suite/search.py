"""The search that a suite declares: cells over settings, each a row."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from bench.errors import short, suggestion
from bench.suite.messages import check, fault, shown
from bench.suite.schema import Cell, Choice, SearchSettings
from bench.suite.yamlfile import Map
from maect.settings import TRAINING_STAGES
from maect.streams import Stream

#: more cells than this are a slip of the keyboard
MAX_CELLS = 1000
#: cells that `random` draws from
MAX_DRAWN_FROM = 100_000


def of_profile(
    search: SearchSettings | None, base: Map, tree: Map, profile: str
) -> SearchSettings | None:
    """The suite's search, each key that its profile `base` has of its own in place of the suite's.

    Takes the profile's out of `base`, and puts the whole in the `tree`, for messages.
    """
    own = base.pop("search", None)
    if own is None:
        return search
    if not isinstance(own, Map):
        message = "'search' should be a mapping, e.g. {grid: {tune.topk: [1, 5]}}"
        raise fault(message, tree, ("profiles", profile, "search"))
    merged = Map(own.file, own.line)
    for part in (tree.get("search"), own):
        if isinstance(part, Map):
            for key, value in part.items():
                merged.put(key, value, *part.lines[key])
    tree["search"] = merged
    return check(SearchSettings, merged, ("search",), tree)


def cells_of(search: SearchSettings | None, variants: Iterable[str], tree: Map) -> dict[str, Cell]:
    """The search's cells: row label to its settings, in the grid's order.

    Raises `UserError` with the place in the suite's `tree`.
    """
    if search is None:
        return {}
    if search.variant not in variants:
        message = f"there is no variant '{short(search.variant)}'"
        raise fault(message + suggestion(search.variant, variants), tree, ("search", "variant"))
    where = ("search", "grid")
    # from the tree, whose mappings know their lines
    axes = {p: _axis(p, values, tree, (*where, p)) for p, values in tree["search"]["grid"].items()}
    total, drawn = prod(map(len, axes.values())), search.method == "random"
    if search.method != "each" and total > (MAX_DRAWN_FROM if drawn else MAX_CELLS):
        message = f"the grid has more than {MAX_DRAWN_FROM if drawn else MAX_CELLS} cells"
        raise fault(f"{message}; write fewer", tree, where)
    if (search.samples or 0) > min(total, MAX_CELLS):
        message = f"samples {search.samples} is more than the {min(total, MAX_CELLS)} cells"
        raise fault(f"{message} there can be", tree, ("search", "samples"))
    named = setting_names(axes)
    found = {
        " ".join([search.variant, *(f"{named[p]}={c.name}" for p, c in cell.items())]): cell
        for cell in _expand(search, axes, total)
    }
    for label in found:
        if label in variants:
            message = f"a cell of the search is named '{label}' too; rename this variant"
            raise fault(message, tree, ("variants", label))
    return found


def _axis(path: str, values: Any, tree: Map, at: tuple[Any, ...]) -> list[Choice]:
    """The values of one setting, checked as far as the setting itself does not."""
    if not values or not isinstance(values, list | dict) or not all(path.split(".")):
        message = f"'{short(path)}' should name a setting and list values, e.g. [1, 2]"
        raise fault(message, tree, at)
    if isinstance(values, dict):
        choices = [Choice(name, value) for name, value in values.items()]
    else:
        choices = [Choice(v if isinstance(v, str) else shown(v), v) for v in values]
    places = list(values) if isinstance(values, dict) else range(len(values))
    for index, (place, value) in enumerate(zip(places, [c.value for c in choices], strict=True)):
        if isinstance(values, list) and isinstance(value, dict):
            message = "a mapping needs a name; write {name: {...}, other: {...}}"
            raise fault(message, tree, (*at, place))
        if value in [c.value for c in choices[:index]]:
            raise fault(f"{shown(value)} stands twice; keep one", tree, (*at, place))
        if path == "augment" and not isinstance(value, str):
            message = f"{shown(value)} is no pipeline; write the names of pipelines"
            raise fault(message, tree, (*at, place))
        if path == "stages" and not (
            isinstance(value, list) and {*map(str, value)} <= {*TRAINING_STAGES}
        ):
            message = f"{shown(value)} is no list of stages; write e.g. [mae, head, tune]"
            raise fault(message, tree, (*at, place))
    return choices


def setting_names(axes: Iterable[str]) -> dict[str, str]:
    """Settings by the last part of their path where that tells them apart."""
    last = [path.split(".")[-1] for path in axes]
    return {
        path: name if last.count(name) == 1 else path for path, name in zip(axes, last, strict=True)
    }


def _expand(search: SearchSettings, axes: dict[str, list[Choice]], total: int) -> list[Cell]:
    if search.method == "each":
        return [{path: choice} for path, choices in axes.items() for choice in choices]
    numbers = list(range(total))
    if search.method == "random":
        order = Stream(search.seed, "search", "cells").permutation(0, total)
        numbers = sorted(int(number) for number in order[: search.samples])
    return [_cell(axes, number) for number in numbers]


def _cell(axes: dict[str, list[Choice]], number: int) -> Cell:
    """Of all combinations the one of that number; the last setting varies fastest."""
    found: Cell = {}
    for path, choices in reversed(axes.items()):
        number, index = divmod(number, len(choices))
        found[path] = choices[index]
    return dict(reversed(found.items()))

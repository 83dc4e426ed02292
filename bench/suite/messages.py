"""What pydantic finds wrong with settings, in a sentence with its place and what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from bench.errors import UserError, several, short, suggestion
from bench.suite import yamlfile
from maect.settings import Settings

M = TypeVar("M", bound=Settings)
#: keys and indices that lead to a value
Place = tuple[Any, ...]

#: where pydantic says e.g. `int_type`
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list, e.g. [a, b]",
    "tuple_type": "a list, e.g. [0.5, 1.0]",
    "dict_type": "a mapping, e.g. {name: value}",
    "model_type": "a mapping, e.g. {name: value}",
}
_MEANT = {"on": "true", "yes": "true", "off": "false", "no": "false"}


def fault(message: str, tree: yamlfile.Map, *places: Place) -> UserError:
    """Return an error at the first of the places in `tree`, or at the one that `--set` gave."""
    found = [yamlfile.locate(tree, place) for place in places]
    given = [place for place in found if str(place[0]).startswith("--set")]
    file, line = (given or found)[0]
    return UserError(message, file=file, line=line)


def require(name: str, known: Collection[str], what: str, tree: yamlfile.Map, place: Place) -> None:
    """Raise `UserError` at `place` in `tree` unless `name` is known; `what` says what it names."""
    if name not in known:
        message = f"there is no {what} '{short(name)}'{suggestion(name, known)}"
        raise fault(message, tree, place)


def check(kind: type[M], tree: Any, at: Place = (), root: yamlfile.Map | None = None) -> M:
    """Return `tree` as settings; `at` is where it stands in `root`. Raises `UserError` with all
    faults."""
    try:
        return kind.parse(tree)
    except ValidationError as error:
        # a misspelt key is told before that the right one is missing
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    with several() as each:
        for wrong in errors:
            with each():
                raise _fault(kind, wrong, at, tree if root is None else root)
    raise AssertionError


def _fault(kind: type[BaseModel], error: Any, at: Place, root: yamlfile.Map) -> UserError:
    """Return what pydantic finds wrong with settings that stand at `at` in `root`."""
    loc = (*at, *(step for step in error["loc"] if step != "[key]"))
    message = _sentence(kind, error, loc)
    places = [loc]
    if error["type"] == "value_error":  # of several values: the place of the first it names
        section = root
        for step in loc:
            section = section[step]
        if isinstance(section, yamlfile.Map):
            words = re.findall(r"\w+", message)
            places = [(*loc, word) for word in words if word in section] or places
    return fault(message, root, *places)


def dotted(loc: Sequence[Any]) -> str:
    """Return a place as people write it: `tables[0].columns`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc]
    return short("".join(steps).lstrip("."))


def _sentence(kind: type[BaseModel], error: Any, loc: Place) -> str:
    """Return what is wrong with the value at `loc` and what to write."""
    name, given, sort = dotted(loc), error.get("input"), error["type"]
    match sort:
        case "extra_forbidden":
            hint = suggestion(str(loc[-1]), _fields_at(kind, error["loc"][:-1]))
            return f"unknown setting '{name}'{hint}"
        case "missing" if isinstance(loc[-1], int):
            return f"'{dotted(loc[:-1])}' has too few values; write {loc[-1] + 1}"
        case "missing":
            return f"'{name}' is missing; add it"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{name}: {message}" if name else message
        case "literal_error":
            words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"'{name}' cannot be {shown(given)}{suggestion(str(given), words)}"
        case "string_pattern_mismatch":
            return f"the name '{name}' may hold letters, digits, '-' and '_' only; write another"
        case "too_short" | "string_too_short":
            return f"'{name}' is empty; give it at least one value"
        case "too_long":
            return f"'{name}' has too many values; write {error['ctx']['max_length']}"
        case _ if sort in _EXPECTED:
            return f"'{name}' should be {_EXPECTED[sort]}, not {shown(given)}{_cure(sort, given)}"
    message = error["msg"].replace("Input should be", "should be")
    return f"'{name}' {message}, not {shown(given)}"


def _cure(sort: str, given: Any) -> str:
    """Return what to write, where it follows from what was written; else nothing."""
    match sort, given:
        case "int_type", float() if given.is_integer():
            return f"; write {int(given)}"
        case "int_type" | "float_type", str() if (plain := yamlfile.number(given)) is not None:
            return f"; write {plain} without quotes"
        case "bool_type", str() if given.lower() in _MEANT:
            return f"; write {_MEANT[given.lower()]}"
        case "string_type", int() | float():
            return f'; write it in quotes: "{shown(given)}"'
    return ""


def shown(value: Any) -> str:
    """Return a value as it would be written in a suite, cut where it is long."""
    return short(json.dumps(value, ensure_ascii=False))


def _fields_at(kind: type[BaseModel], loc: Place) -> list[str]:
    """Return the field names of the model that `loc` leads to, for suggestions."""
    found: type[BaseModel] | None = kind
    for step in map(str, loc):
        if found is not None and step in found.model_fields:  # else a key or an index
            kinds = found.model_fields[step].annotation
            types = (t for t in (kinds, *get_args(kinds)) if isinstance(t, type))
            found = next((t for t in types if issubclass(t, BaseModel)), None)
    return [] if found is None else [*found.model_fields]
